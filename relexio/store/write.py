"""Building a trajectory store: base, segments of steps, files, and the commit marker, in that order."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relexio.dtypes import Table
from relexio.errors import CheckpointError, StoreError
from relexio.store.arrays import MOVES, block_arrays, changed_array, file_array
from relexio.store.chunks import chunk_key
from relexio.store.schema import DIGEST, FILE_CHUNK, Segment, lay_out
from relexio.store.seal import Json, consolidated, damage, file_of, read_bound, seal, unseal
from relexio.store.storage import METADATA, Location, attributes, locate
from relexio.store.store import FILE_DIGITS, Store, file_digest
from relexio.store.zarrs import create, open_group

if TYPE_CHECKING:
    import zarr


def create_store(address: str, block: int, table: Table) -> Store:
    """A new store at an address that does not exist: the base's empty arrays and tensor table, no step.

    ``table`` has the base's tensors in file order; ``block`` elements make a block.
    """
    tensors = lay_out(table, block)
    store = Store(address, block, tensors, (), "")
    locate(address).put(METADATA, _marker(store))  # whatever is written after that is a conversion that began
    root = open_group(address, "r+")
    root.create_group("segments")
    root.create_group("files")
    base = root.create_group("base")
    _create_arrays(base, store, 0)
    base.attrs["tensors"] = [{**asdict(t), "shape": list(t.shape)} for t in tensors]
    return store


def _marker(store: Store, nodes: Json | None = None) -> bytes:
    record = {
        "block": store.block,
        "base_content": store.base_content,
        "metadata": store.metadata,
        "next": store.next,
        "segments": [asdict(segment) for segment in store.segments],
    }
    return seal(record, nodes)


def _create_arrays(parent: "zarr.Group", store: Store, columns: int) -> None:
    for kind, arrays in block_arrays(store.tensors, store.block, columns).items():
        group = parent.create_group(kind)
        for name, layout in arrays.items():
            create(group, name, layout)


def _sealed(store: Store, path: str, columns: int) -> list[str]:
    """The paths of the groups and arrays of the base or a segment, and of the chunks that only the marker binds."""
    arrays = {
        f"{path}/{kind}/{name}": layout
        for kind, own in block_arrays(store.tensors, store.block, columns).items()
        for name, layout in own.items()
    }
    if columns:
        arrays[f"{path}/changed"] = changed_array(len(store.tensors), columns)
    chunks = [
        chunk_key(array, layout, number)
        for array, layout in arrays.items()
        if array.rpartition("/")[2] not in ("bits", *MOVES)
        for number in range(-(-layout.shape[0] // layout.chunks[0]))
    ]
    return [path, *(f"{path}/{kind}" for kind in store.block_counts), *arrays, *chunks]


def create_segment(store: Store, segment: Segment) -> None:
    """The empty arrays of a new segment; nothing refers to it yet."""
    parent = open_group(store.address, "r+").create_group(segment.path)
    _create_arrays(parent, store, segment.columns)
    create(parent, "changed", changed_array(len(store.tensors), segment.columns))


class Files:
    """Names for file contents, each stored once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._new: dict[str, bytes | Path] = {}

    def name(self, data: bytes | Path) -> str:
        """The name of the array that holds, or after ``write`` will hold, these bytes or this file's."""
        name = f"files/{file_digest(data)}"
        if name not in self._store.metadata:
            self._new[name] = data
        return name

    def write(self) -> None:
        """Store all new contents, a chunk in memory at a time. Raises CheckpointError for one that changed meanwhile."""
        group = open_group(self._store.address, "r+")
        for name, data in self._new.items():
            if self._is_whole(name):  # an interrupted conversion wrote it
                continue
            size = len(data) if isinstance(data, bytes) else data.stat().st_size
            layout, hashed = file_array(size, name), hashlib.sha256()
            create(group, name, layout, overwrite=True)
            for number, piece in enumerate(_pieces(data, size)):
                hashed.update(piece)
                chunk = np.zeros(layout.chunks, layout.dtype)
                chunk[: len(piece)] = np.frombuffer(piece, np.uint8)
                self._store.write_chunk(name, chunk, number)
            if f"files/{hashed.hexdigest()[:FILE_DIGITS]}" != name:
                raise CheckpointError(f"{data!s}: changed while it was read; run again once nothing writes to it")

    def _is_whole(self, name: str) -> bool:
        try:
            for _ in self._store.pieces(name):
                pass
        except StoreError:
            return False
        return True


def _pieces(data: bytes | Path, size: int) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield from (data[first : first + FILE_CHUNK] for first in range(0, size, FILE_CHUNK))
        return
    with open(data, "rb") as file:
        for first in range(0, size, FILE_CHUNK):
            yield file.read(min(FILE_CHUNK, size - first))


def write_changed(store: Store, segment: Segment, table: np.ndarray) -> None:
    """Store how many elements of each tensor differ from the base in each state of a segment: int64 [tensors, K]."""
    store.write_chunk(f"{segment.path}/changed", table)


def content_hashes(store: Store, path: str, columns: int) -> list[str]:
    """SHA-256 over the digests of all blocks, kind by kind, for the base (0 columns: one hash) or each column."""
    hashes = [hashlib.sha256() for _ in range(max(columns, 1))]
    for block in store.blocks:
        for hashed, digest in zip(hashes, store.digests(path, block).reshape(-1, DIGEST), strict=True):
            hashed.update(digest.tobytes())
    return [hashed.hexdigest() for hashed in hashes]


def set_attribute(store: Store, path: str, name: str, value: Any) -> None:
    """Set one attribute of a Zarr group of the store."""
    open_group(store.address, "r+")[path].attrs[name] = value


def attribute(store: Store, path: str, name: str) -> Any:
    """One attribute of a Zarr group of the store, None where it is not set or cannot be read."""
    return attributes(locate(store.address).below(path)).get(name)


def commit(store: Store, segments: Iterable[Segment], files: Iterable[str], base_content: str) -> Store:
    """Write the commit marker with these segments: those that the store has, cut or not, and new ones that are whole.

    From here on their steps exist, and no others. ``files`` are those that the records of all of them name.
    """
    location, chosen = locate(store.address), []
    with damage(f"{store.shown}/{METADATA}"):
        nodes = consolidated(location.get(METADATA) or b"") or {}
    for segment in segments:
        if not segment.metadata:
            paths = _sealed(store, segment.path, segment.columns)
            segment = replace(segment, metadata=_bind(location, paths, nodes))
        chosen.append(segment)
    wanted = ["segments", "files", *_sealed(store, "base", 0), *sorted({*files})]
    metadata = _bind(location, [name for name in wanted if name not in store.metadata], nodes)
    metadata |= {name: store.metadata[name] for name in wanted if name in store.metadata}
    number = max(store.next, *(int(segment.name) + 1 for segment in chosen))
    done = replace(store, segments=tuple(chosen), base_content=base_content, metadata=metadata, next=number)
    nodes = {path: nodes.get(path) or done.node(path) for path in done.sealed if file_of(path) != path}
    marker = _marker(done, nodes)
    location.commit(marker)
    return replace(done, seal=unseal(marker)["relexio"]["seal"])


def _bind(location: Location, paths: Iterable[str], nodes: Json) -> dict[str, str]:
    """The hashes of files that were written since the last commit; ``nodes`` gets what groups and arrays have in theirs."""
    hashes = {}
    for path, hashes[path], node in read_bound(location, paths):
        if node is not None:
            nodes[path] = node
    return hashes


def sweep(store: Store) -> None:
    """Remove segments that the marker no longer lists, and files that no record names. Killed in between, the next one does."""
    location = locate(store.address)
    known = {METADATA, *(segment.name for segment in store.segments)}
    for name in location.below("segments").names():
        if name not in known:
            location.below(f"segments/{name}").remove()
    for name in location.below("files").names():
        if name != METADATA and f"files/{name}" not in store.metadata:
            location.below(f"files/{name}").remove()
