"""DCP in safetensors, as NeMo-RL and torchtitan write it: each file holds the rows that one rank has of every tensor."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from relexio.checkpoints.files import inside, is_file, side_files
from relexio.checkpoints.header import Entry, Shard, parse_json, parse_once, read_shard
from relexio.checkpoints.pieces import Piece, Pieced, Where, present, tiled
from relexio.dtypes import Table, tensor_bytes
from relexio.errors import CheckpointError, IncompleteError

_NAME = re.compile(r"shard-(\d{5,6})-model-(\d{5,6})-of-(\d{5,6})\.safetensors")
_INFO, _VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"
_ADVICE = (
    "; save the model whole instead (NeMo-RL: checkpointing.save_consolidated=true; "
    "torchtitan: --checkpoint.last_save_in_hf --checkpoint.last_save_model_only)"
)


class _Chunk(NamedTuple):
    """Some rows of a tensor: where they begin in it, and in a file (by its number)."""

    offsets: tuple[int, ...]
    file: int
    entry: Entry


def weight_files(path: Path) -> list[Path]:
    """The files of chunks in a directory."""
    return sorted(
        file for file in path.glob("shard-*-model-*-of-*.safetensors") if _NAME.fullmatch(file.name) and is_file(file)
    )


def open_directory(path: Path, step: int | None = None, top: Path | None = None) -> Pieced:
    """Read the headers, and list the side files. Raises as ``layout.open_checkpoint``."""
    files = present(path, weight_files(path))
    ranks = {int(match[1]) for file in files if (match := _NAME.fullmatch(file.name))}
    if missing := set(range(1, max(ranks) + 1)) - ranks:
        raise IncompleteError(f"{path}: the files shard-{min(missing):05}-* are missing; copy them again")
    shards = tuple(read_shard(inside(path, file)) for file in files)
    tensors, pieces = _tables(path, shards)
    names = [file.name for file in files]
    side = side_files(path, names)
    return Pieced(Where(path, step, top, side, (*side, *names)), shards, tensors, pieces)


def _tables(path: Path, shards: tuple[Shard, ...]) -> tuple[Table, dict[str, tuple[Piece, ...]]]:
    offsets = [_offsets(shard.header, shard.path) for shard in shards]
    try:
        return _together(tuple((shard.header, shard.size) for shard in shards), tuple(offsets))
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error


class _Offsets(dict[str, tuple[int, ...]]):
    """Offsets by tensor, hashed as the object that steps share."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _offsets(header: bytes, path: Path) -> _Offsets:
    try:
        return _parsed(header)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


@lru_cache(maxsize=512)
def _parsed(header: bytes) -> _Offsets:
    metadata = parse_json(header, "its header").get("__metadata__") or {}
    if not isinstance(metadata.get(_INFO), str) or metadata.get(_VERSION) != "1.0":
        raise CheckpointError(f"has no {_INFO} of {_VERSION} 1.0{_ADVICE}")
    info = parse_json(metadata[_INFO].encode(), _INFO)
    return _Offsets((name, _counts(name, value)) for name, value in info.items())


def _counts(name: str, value: Any) -> tuple[int, ...]:
    offsets = value.get("saved_offsets") if isinstance(value, dict) else None
    if not isinstance(offsets, list) or not all(type(n) is int and 0 <= n < 2**62 for n in offsets):
        raise CheckpointError(f"tensor {name}: its saved_offsets are not numbers")
    return tuple(offsets)


@lru_cache(maxsize=64)
def _together(
    shards: tuple[tuple[bytes, int], ...], offsets: tuple[_Offsets, ...]
) -> tuple[Table, dict[str, tuple[Piece, ...]]]:
    """The tensors, and the pieces of each; the same objects for equal headers, as most steps have."""
    chunks: dict[str, list[_Chunk]] = {}
    for number, ((header, size), known) in enumerate(zip(shards, offsets, strict=True)):
        for entry in parse_once(header, size):
            at = known.get(entry.name, (0,) * len(entry.shape))
            chunks.setdefault(entry.name, []).append(_Chunk(at, number, entry))
    tensors: Table = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, parts in chunks.items():
        try:
            tensors[name], pieces[name] = _whole(parts)
        except CheckpointError as error:
            raise type(error)(f"tensor {name}: {error}") from error
    return tensors, pieces


def _whole(parts: list[_Chunk]) -> tuple[tuple[str, tuple[int, ...]], tuple[Piece, ...]]:
    """The type, shape and pieces of a tensor. Raises CheckpointError (which names no file) unless its chunks tile it."""
    first = parts[0].entry
    if any((part.entry.dtype, len(part.entry.shape)) != (first.dtype, len(first.shape)) for part in parts):
        raise CheckpointError("its parts have different types")
    if any(len(part.offsets) != len(part.entry.shape) for part in parts):
        raise CheckpointError("its saved_offsets do not fit its shape")
    if any(any(part.offsets[1:]) or part.entry.shape[1:] != first.shape[1:] for part in parts):
        raise CheckpointError(f"is sharded along another dimension than 0{_ADVICE}")
    if not first.shape:
        return (first.dtype, ()), tiled(list(_pieces(parts, first.nbytes)), first.dtype, ())
    shape = (max(part.offsets[0] + part.entry.shape[0] for part in parts), *first.shape[1:])
    rows = sum(part.entry.shape[0] for part in parts)
    if rows != shape[0]:
        raise CheckpointError(f"its parts have {rows:,} rows of {shape[0]:,}; copy the files of all ranks")
    row = tensor_bytes(first.dtype, first.shape[1:])
    return (first.dtype, shape), tiled(list(_pieces(parts, row)), first.dtype, shape)


def _pieces(parts: Iterable[_Chunk], row: int) -> Iterable[Piece]:
    for offsets, file, entry in parts:
        if entry.nbytes:
            yield Piece(offsets[0] * row if offsets else 0, entry.nbytes, file, entry.start, entry.nbytes, entry.nbytes)
