"""Building a trajectory store: base, groups of steps, files, and the commit marker, in that order."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from relexio.dtypes import KINDS, Table
from relexio.errors import CheckpointError
from relexio.store.arrays import block_arrays, changed_array, file_array
from relexio.store.schema import DIGEST, FILE_CHUNK, Group, lay_out
from relexio.store.seal import metadata_hashes, seal
from relexio.store.storage import METADATA, attributes, locate
from relexio.store.store import FILE_DIGITS, Store, file_digest
from relexio.store.zarrs import create, open_group


def create_store(address: str, block: int, table: Table) -> Store:
    """A new store at an address that does not exist: the base's empty arrays and tensor table, no step.

    ``table`` has the base's tensors in file order; ``block`` elements make a block.
    """
    tensors = lay_out(table, block)
    store = Store(address, block, tensors, (), "")
    locate(address).put(METADATA, _marker(store))  # whatever is written after that is a conversion that began
    root = open_group(address, "r+")
    root.create_group("groups")
    base = root.create_group("base")
    _create_arrays(base, store, 0)
    base.attrs["tensors"] = [{**asdict(t), "shape": list(t.shape)} for t in tensors]
    return store


def _marker(store: Store) -> bytes:
    record = {
        "block": store.block,
        "base_content": store.base_content,
        "metadata": store.base_metadata,
        "groups": [asdict(group) for group in store.groups],
    }
    return seal(record)


def _create_arrays(parent: zarr.Group, store: Store, steps: int) -> None:
    for kind, arrays in block_arrays(store.tensors, store.block, steps).items():
        group = parent.create_group(kind)
        for name, layout in arrays.items():
            create(group, name, layout)


def _nodes(store: Store, path: str, steps: int) -> list[str]:
    kinds = block_arrays(store.tensors, store.block, steps)
    below = [*kinds, *(f"{kind}/{name}" for kind, arrays in kinds.items() for name in arrays)]
    return [path, *(f"{path}/{node}" for node in below)]


def create_steps_group(store: Store, group: Group) -> None:
    """The empty arrays of a new group; nothing refers to it yet."""
    parent = open_group(store.address, "r+").create_group(group.path)
    _create_arrays(parent, store, len(group.steps))
    create(parent, "changed", changed_array(len(store.tensors), len(group.steps)))


class Files:
    """Names for file contents below a group, each content once; contents that earlier groups hold keep their name."""

    def __init__(self, store: Store, path: str, known: Iterable[str]) -> None:
        self._store, self._path = store, path
        self._names = {name.rsplit("/", 1)[1]: name for name in known}
        self._new: dict[str, bytes | Path] = {}

    def name(self, data: bytes | Path) -> str:
        """The name of the array that holds, or after ``write`` will hold, these bytes or this file's."""
        digest = file_digest(data)
        if digest not in self._names:
            self._names[digest] = f"{self._path}/files/{digest}"
            self._new[digest] = data
        return self._names[digest]

    def write(self) -> None:
        """Store all new contents, a chunk in memory at a time. Raises CheckpointError for one that changed meanwhile."""
        group = open_group(self._store.address, "r+").require_group(f"{self._path}/files")
        for digest, data in self._new.items():
            size = len(data) if isinstance(data, bytes) else data.stat().st_size
            layout, hashed = file_array(size), hashlib.sha256()
            create(group, digest, layout)
            for number, piece in enumerate(_pieces(data, size)):
                hashed.update(piece)
                chunk = np.zeros(layout.chunks, layout.dtype)
                chunk[: len(piece)] = np.frombuffer(piece, np.uint8)
                self._store.write_chunk(f"{self._path}/files/{digest}", chunk, number)
            if hashed.hexdigest()[:FILE_DIGITS] != digest:
                raise CheckpointError(f"{data!s}: changed while it was read; run again once nothing writes to it")


def _pieces(data: bytes | Path, size: int) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield from (data[first : first + FILE_CHUNK] for first in range(0, size, FILE_CHUNK))
        return
    with open(data, "rb") as file:
        for first in range(0, size, FILE_CHUNK):
            yield file.read(min(FILE_CHUNK, size - first))


def write_changed(store: Store, group: Group, counts: dict[str, np.ndarray]) -> None:
    """Store how many elements of each tensor changed at each step of a group: int64 [K] by tensor, absent for none."""
    table = np.zeros((len(store.tensors), len(group.steps)), np.int64)
    for row, tensor in zip(table, store.tensors, strict=True):
        row[:] = counts.get(tensor.name, 0)
    store.write_chunk(f"{group.path}/changed", table)


def content_hashes(store: Store, path: str, steps: int) -> list[str]:
    """SHA-256 over the digests of all blocks, kind by kind, for the base (``steps`` = 0: one hash) or each step."""
    hashes = [hashlib.sha256() for _ in range(max(steps, 1))]
    for kind in KINDS:
        for tensor in (tensor for tensor in store.tensors if tensor.kind.name == kind):
            for block in store.blocks(tensor):
                for hashed, digest in zip(hashes, store.digests(path, block).reshape(-1, DIGEST), strict=True):
                    hashed.update(digest.data)
    return [hashed.hexdigest() for hashed in hashes]


def set_attribute(store: Store, path: str, name: str, value: Any) -> None:
    """Set one attribute of a Zarr group of the store."""
    open_group(store.address, "r+")[path].attrs[name] = value


def attribute(store: Store, path: str, name: str) -> Any:
    """One attribute of a Zarr group of the store, None where it is not set or cannot be read."""
    return attributes(locate(store.address).below(path)).get(name)


def commit(store: Store, group: Group, files: Iterable[str], base_content: str) -> Store:
    """Write the commit marker with one more group; from here on its steps exist. ``files`` are those that it names."""
    location, base = locate(store.address), store.base_metadata
    if not base:
        base = metadata_hashes(location, ["groups", *_nodes(store, "base", 0)])
    own = sorted({name for name in files if name.startswith(f"{group.path}/")})
    nodes = [*_nodes(store, group.path, len(group.steps)), f"{group.path}/changed", f"{group.path}/files", *own]
    group = replace(group, metadata=metadata_hashes(location, nodes))
    committed = Store(store.address, store.block, store.tensors, (*store.groups, group), base_content, base)
    location.commit(_marker(committed))
    return committed
