"""Building a trajectory store: base, groups of steps, files, and the commit marker, in that order."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from relexio.dtypes import KINDS, Table
from relexio.errors import CheckpointError
from relexio.store.schema import DIGEST, FILE_CHUNK, Group, lay_out
from relexio.store.seal import metadata_hashes, seal
from relexio.store.storage import METADATA, place
from relexio.store.store import FILE_DIGITS, Store, damage, file_digest, kinds_of
from relexio.store.zarrs import AnyArray, create, create_base, create_steps, open_group


def create_store(address: str, block: int, table: Table) -> Store:
    """A new store at an address that does not exist: the base's empty arrays and tensor table, no step.

    ``table`` has the base's tensors in file order; ``block`` elements make a block.
    """
    tensors = lay_out(table, block)
    store = Store(address, block, tensors, (), "")
    place(address).put(METADATA, _marker(store))  # whatever is written after that is a conversion that began
    root = open_group(address, "r+")
    root.create_group("groups")
    base = root.create_group("base")
    for kind, blocks in kinds_of(tensors, block).items():
        create_base(base, KINDS[kind], blocks, block)
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


def _nodes(store: Store, path: str, arrays: tuple[str, ...]) -> list[str]:
    kinds = kinds_of(store.tensors, store.block)
    return [
        path,
        *(f"{path}/{kind}" for kind in kinds),
        *(f"{path}/{kind}/{name}" for kind in kinds for name in arrays),
    ]


def create_steps_group(store: Store, group: Group) -> None:
    """The empty arrays of a new group; nothing refers to it yet."""
    made, count = open_group(store.address, "r+").create_group(group.path), len(group.steps)
    for name, blocks in kinds_of(store.tensors, store.block).items():
        create_steps(made, KINDS[name], blocks, store.block, count)
    table = (len(store.tensors), count)
    create(made, "changed", table, table, "<i8", ("tensor", "step"))


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
            array = create(group, digest, (size,), (min(size, FILE_CHUNK),), "|u1", ("byte",))
            hashed, first = hashlib.sha256(), 0
            for piece in _pieces(data, size):
                hashed.update(piece)
                array[first : first + len(piece)] = np.frombuffer(piece, np.uint8)
                first += len(piece)
            if hashed.hexdigest()[:FILE_DIGITS] != digest:
                raise CheckpointError(f"{data!s}: changed while it was read; run again when nothing writes it any more")


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
    writable(store, f"{group.path}/changed")[:] = table


def content_hashes(store: Store, path: str, steps: int) -> list[str]:
    """SHA-256 over the digests of all blocks, kind by kind, for the base (``steps`` = 0: one hash) or each step."""
    hashes = [hashlib.sha256() for _ in range(max(steps, 1))]
    for kind in KINDS:
        for tensor in (tensor for tensor in store.tensors if tensor.kind.name == kind):
            for block in store.blocks(tensor):
                for hashed, digest in zip(hashes, store.digests(path, block).reshape(-1, DIGEST), strict=True):
                    hashed.update(digest)
    return [hashed.hexdigest() for hashed in hashes]


def set_attribute(store: Store, path: str, name: str, value: Any) -> None:
    """Set one attribute of a Zarr group of the store."""
    found = open_group(store.address, "r+")[path]
    found.attrs[name] = value


def attribute(store: Store, path: str, name: str) -> Any:
    """One attribute of a Zarr group of the store, None where it is not set."""
    with damage(f"{store.shown}: attributes of {path}"):
        return open_group(store.address, "r")[path].attrs.get(name)


def writable(store: Store, path: str) -> AnyArray:
    """An array of the store, opened for writing."""
    return store.array(path, "r+")


def commit(store: Store, group: Group, files: Iterable[str], base_content: str) -> Store:
    """Write the commit marker with one more group; from here on its steps exist. ``files`` are those that it names."""
    where, base = place(store.address), store.base_metadata
    if not base:
        base = metadata_hashes(where, ["groups", *_nodes(store, "base", ("bits", "digest"))])
    nodes = _nodes(store, group.path, ("count", "step", "xor", "digest"))
    own = sorted({name for name in files if name.startswith(f"{group.path}/")})
    nodes += [f"{group.path}/changed", f"{group.path}/files", *own]
    group = replace(group, metadata=metadata_hashes(where, nodes))
    done = Store(store.address, store.block, store.tensors, (*store.groups, group), base_content, base)
    where.commit(_marker(done))
    return done
