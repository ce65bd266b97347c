"""What a version of a delta chain says of itself: the index of slime and miles, the manifest of SkyRL."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from relexio.checkpoints.files import INDEX, inside, is_file
from relexio.checkpoints.header import Entry, Shard, parse_json, read_shard
from relexio.checkpoints.patch import CHECKSUMS, OVERWRITE, XOR, Patch
from relexio.checkpoints.safetensors import sharded
from relexio.dtypes import Table
from relexio.errors import CheckpointError, IncompleteError

MANIFEST = "manifest.json"
#: Names of the files that SkyRL writes.
PAYLOAD = re.compile(r"delta-rank\d{5,}-file\d{6,}\.safetensors")
_TEXTS = ("name", "dtype", "payload_file", "payload_key", "checksum", "checksum_algorithm")
#: What SkyRL, in torch's words, calls the types of safetensors files that it takes.
_TYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "float64": "F64", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


class Content(NamedTuple):
    """What a version says of itself: how its patches are to be read, by tensor, and the tensors that it says they are for."""

    version: int
    encoding: str
    algorithm: str
    shards: tuple[Shard, ...]
    patches: Mapping[str, Patch]
    tensors: Table


def indexed(path: Path, data: bytes) -> Content:
    """A version of slime or miles. Raises CheckpointError."""
    index = path / INDEX
    metadata = parse_json(data, index).get("metadata")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{index}: its metadata is no object")
    encoding, algorithm = metadata.get("delta_encoding"), metadata.get("checksum_format")
    version = _versions(index, _number(metadata.get("version")), _number(metadata.get("base_version")))
    if encoding not in (XOR, OVERWRITE) or metadata.get("compression_format") != "zstd":
        raise CheckpointError(
            f"{index}: its deltas are {str(encoding)[:40]!r} in {str(metadata.get('compression_format'))[:40]!r}; "
            f"xor and overwrite in zstd are read"
        )
    algorithm = _known(index, algorithm)
    shards = sharded(path, data)
    patches = {}
    for number, shard in enumerate(shards):
        checksums = parse_json(shard.header, shard.path).get("__metadata__") or {}
        for entry in shard.entries:
            if entry.dtype != "U8" or entry.name not in checksums:
                raise CheckpointError(f"{shard.path}: tensor {entry.name}: is no delta with a checksum")
            patches[entry.name] = Patch(number, entry.start, entry.nbytes, checksums[entry.name])
    return Content(version, encoding, algorithm, shards, patches, {})


def manifested(path: Path, data: bytes) -> Content:
    """A version of SkyRL. Raises CheckpointError."""
    manifest = path / MANIFEST
    value = parse_json(data, manifest)
    records, names = value.get("tensors"), value.get("payload_files")
    version = _versions(manifest, value.get("version"), value.get("base_version"))
    if not isinstance(records, list) or not isinstance(names, list):
        raise CheckpointError(f"{manifest}: has no lists tensors and payload_files")
    for name in names:
        if not isinstance(name, str) or not PAYLOAD.fullmatch(name):
            raise CheckpointError(f"{manifest}: names a file that SkyRL does not write: {str(name)[:80]!r}")
        if not is_file(path / name):
            raise IncompleteError(f"{path / name}: the manifest names this file, but it is missing; copy it again")
    shards = tuple(read_shard(inside(path, path / name)) for name in names)
    entries = {(shard.path.name, entry.name): (i, entry) for i, shard in enumerate(shards) for entry in shard.entries}
    patches: dict[str, Patch] = {}
    tensors: Table = {}
    for record in records:
        name, tensor, patch = _recorded(manifest, record, entries)
        if name in patches:
            raise CheckpointError(f"{manifest}: tensor {name}: is there twice")
        patches[name], tensors[name] = patch, tensor
    algorithms = {record["checksum_algorithm"] for record in records} or {"xxh3-128"}
    if len(algorithms) > 1 or len(entries) != len(patches):
        raise CheckpointError(f"{manifest}: its checksums are of several kinds, or its tensors not those of its files")
    return Content(version, XOR, _known(manifest, algorithms.pop()), shards, patches, tensors)


def _recorded(
    manifest: Path, record: Any, entries: Mapping[tuple[str, str], tuple[int, Entry]]
) -> tuple[str, tuple[str, tuple[int, ...]], Patch]:
    """One tensor of a manifest: its name, type and shape, and its patch among the entries of the files."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in _TEXTS):
        raise CheckpointError(f"{manifest}: an entry of tensors lacks one of {', '.join(_TEXTS)}")
    where, shape = f"{manifest}: tensor {record['name']}", record.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where}: its shape is not a list of sizes")
    number, entry = entries.get((record["payload_file"], record["payload_key"]), (0, None))
    if entry is None or entry.dtype != "U8" or entry.nbytes != record.get("compressed_num_bytes"):
        raise CheckpointError(f"{where}: {record['payload_file']} does not hold what the manifest says; copy it again")
    dtype: str = _TYPES.get(record["dtype"]) or record["dtype"]
    return record["name"], (dtype, tuple(shape)), Patch(number, entry.start, entry.nbytes, record["checksum"])


def _number(text: Any) -> int | None:
    return int(text) if isinstance(text, str) and re.fullmatch(r"[0-9]{1,15}", text) else None


def _versions(file: Path, version: Any, base: Any) -> int:
    """The version, which must build on the one before it."""
    if type(version) is not int or type(base) is not int or not 0 < version < 10**15:
        raise CheckpointError(f"{file}: says no version and base_version")
    if base != version - 1:
        raise CheckpointError(
            f"{file}: version {version} builds on version {base}; one that builds on the last is read"
        )
    return version


def _known(file: Path, algorithm: Any) -> str:
    if isinstance(algorithm, str) and algorithm in CHECKSUMS:
        return algorithm
    raise CheckpointError(
        f"{file}: its checksums are {str(algorithm)[:40]!r}; those that are read are {', '.join(CHECKSUMS)}"
    )
