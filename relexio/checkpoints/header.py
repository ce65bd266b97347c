"""Safetensors headers: parsed and checked before any byte of a tensor is used."""

import json
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from relexio.bounded import loads
from relexio.checkpoints.files import File
from relexio.dtypes import BITS, Table, tensor_bytes
from relexio.errors import CheckpointError, IncompleteError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; ``start`` and ``end`` count bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


@dataclass(frozen=True)
class Shard(File):
    """One safetensors file: its header as written (JSON bytes, padding included) and what the header says."""

    header: bytes

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The tensors in the order of their bytes; shared by all shards with this header, as most steps have."""
        return parse_once(self.header, self.size)


@lru_cache(maxsize=256)
def parse_once(header: bytes, size: int) -> tuple[Entry, ...]:
    """The tensors of a header that was checked before; the same objects for equal headers."""
    return parse_header(header, size, "safetensors header")


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Raises CheckpointError for a file that is truncated, malformed, or whose header does not fit its size.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        prefix = file.read(8)
        if len(prefix) < 8:
            raise IncompleteError(f"{path}: truncated: {stat.st_size} bytes, too short for a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER, stat.st_size - 8):
            raise IncompleteError(
                f"{path}: truncated or not a safetensors file: "
                f"its header should have {length:,} bytes and has {stat.st_size:,} in all; copy the file again"
            )
        header = _keep_one(file.read(length))
    parse_header(header, stat.st_size, path)
    return Shard(path.absolute(), stat.st_size, stat.st_mtime_ns, header)


@lru_cache(maxsize=256)
def _keep_one(header: bytes) -> bytes:
    """The first of equal headers, so that hundreds of steps do not hold hundreds of copies."""
    return header


def parse_header(header: bytes, size: int, path: Path | str) -> tuple[Entry, ...]:
    """The tensors that a header describes, in the order of their bytes, for a file of ``size`` bytes.

    Raises CheckpointError unless the tensors fill the file exactly: no gap, no overlap, sizes as dtype and shape say.
    """
    table = parse_json(header, path)
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"{path}: its __metadata__ does not map strings to strings")
    first = 8 + len(header)
    entries = sorted(
        (_entry(name, value, first, path) for name, value in table.items()), key=lambda e: (e.start, e.end)
    )
    if entries and entries[0].start != first:
        raise CheckpointError(f"{path}: tensor {entries[0].name}: does not begin where the header ends")
    for before, after in pairwise(entries):
        if after.start != before.end:
            word = "overlap" if after.start < before.end else "leave a gap"
            raise CheckpointError(f"{path}: tensors {before.name} and {after.name} {word} in the file")
    end = entries[-1].end if entries else first
    if end != size:
        word, kind = ("truncated", IncompleteError) if end > size else ("longer than its header says", CheckpointError)
        raise kind(f"{path}: {word}: {size:,} bytes where the header needs {end:,}; copy the file again")
    return tuple(entries)


def parse_json(data: bytes, path: Path | str) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises CheckpointError naming the file."""
    try:
        value = loads(data, _no_duplicates)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates, as every other reader will
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(name: str, value: Any, first: int, path: Path | str) -> Entry:
    where = f"{path}: tensor {name}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where}: its header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: its shape is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where}: its data_offsets are not two positions")
    bits = prod(shape) * BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise CheckpointError(
            f"{where}: {dtype} of shape {str(shape)[:80]} does not fit the {offsets[1] - offsets[0]} bytes of its data_offsets"
        )
    return Entry(name, dtype, tuple(shape), first + offsets[0], first + offsets[1])


def header_of(table: Table) -> bytes:
    """A header for one file with these tensors, one after the other in their order, that ``from_pretrained`` takes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in table.items():
        start, end = end, end + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return _padded(entries)


def header_for_transformers(header: bytes) -> bytes:
    """The same header with ``format: pt`` in its metadata, which ``from_pretrained`` asks for; offsets are unchanged."""
    table = json.loads(header)
    metadata = table.get("__metadata__") or {}
    if metadata.get("format") == "pt":
        return header
    table["__metadata__"] = {**metadata, "format": "pt"}
    return _padded(table)


def _padded(table: dict[str, Any]) -> bytes:
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
