"""Opening a trajectory store, and reading its blocks. What the commit marker does not list does not exist."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from relexio.checkpoints.record import CheckpointRecord
from relexio.dtypes import Table
from relexio.errors import MissingError, RequestError, StoreError
from relexio.store.arrays import check_layout
from relexio.store.chunks import chunk_key, read_chunk, write_chunk
from relexio.store.schema import (
    Block,
    Group,
    Layout,
    Tensor,
    block_from_json,
    check_format,
    count_blocks,
    groups_from_json,
    hashes_from_json,
    tensors_from_json,
)
from relexio.store.seal import damage, read_node, unseal
from relexio.store.storage import METADATA, LocalStorage, Location, attributes, locate
from relexio.words import describe_steps, shown

T = TypeVar("T")
#: Of the SHA-256 in the name of a stored file's array.
FILE_DIGITS = 32


@dataclass(frozen=True)
class Store:
    """A trajectory store at an address. Cheap to copy and pickle: layouts are read where they are first needed."""

    address: str
    block: int
    tensors: tuple[Tensor, ...]
    groups: tuple[Group, ...]
    base_content: str
    base_metadata: dict[str, str] = field(default_factory=dict)
    _layouts: dict[str, Layout] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __repr__(self) -> str:  # it stands in what Dask logs of a task that failed
        return f"<Store {self.shown}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "address": self.absolute, "_layouts": {}}

    @property
    def shown(self) -> str:
        """The address as it may be seen: without what is secret in it."""
        return shown(self.address)

    @property
    def absolute(self) -> str:
        """The address, independent of the working directory."""
        root = self.files("")
        return str(root[0]) if root else self.address

    def moved_to(self, address: str) -> "Store":
        """The same store at the address where it is now."""
        return replace(self, address=address)

    def files(self, *names: str) -> list[Path]:
        """Files of the store by their names in it, as absolute paths; none of a store on object storage."""
        location = locate(self.address)
        return [(location.path / name).absolute() for name in names] if isinstance(location, LocalStorage) else []

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """All committed steps, ascending."""
        return tuple(sorted(step for group in self.groups for step in group.steps))

    @cached_property
    def table(self) -> Table:
        """The dtype and shape of every tensor."""
        return {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors}

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises RequestError if there is none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise RequestError(f"{self.shown}: no tensor named {name!r}")

    def blocks(self, tensor: Tensor) -> list[Block]:
        """The blocks of a tensor."""
        return tensor.blocks(self.block)

    def fitted(self) -> list[Tensor]:
        """The tensors that a fit is about: floats with at least one element."""
        return [tensor for tensor in self.tensors if tensor.kind.is_float and tensor.size]

    def find(self, step: int) -> tuple[Group, int]:
        """The group and column that hold a step. Raises RequestError if it is not stored."""
        for group in self.groups:
            if step in group.steps:
                return group, group.steps.index(step)
        raise RequestError(f"{self.shown}: step {step} is not stored; it holds {describe_steps(self.steps)}")

    def columns(self, steps: tuple[int, ...]) -> list[tuple[Group, np.ndarray, np.ndarray]]:
        """For each group that holds any of ``steps``: the group, its columns, and their places in ``steps``."""
        concerned, wanted = [], {step: i for i, step in enumerate(steps)}
        for group in self.groups:
            columns = {wanted[step]: column for column, step in enumerate(group.steps) if step in wanted}
            if columns:
                indices = sorted(columns)
                concerned.append((group, np.array([columns[i] for i in indices]), np.array(indices)))
        return concerned

    def array(self, path: str) -> Layout:
        """How an array is laid out. Raises StoreError if it is missing, or not as large as its tensors and steps ask."""
        if path not in self._layouts:
            node = self.metadata(path)
            with damage(f"{self.shown}: {path}"):
                layout = Layout.from_json(node)
                check_layout(layout, path, self.tensors, self.block, self.groups)
            self._layouts[path] = layout
        return self._layouts[path]

    def metadata(self, path: str) -> Any:
        """The ``zarr.json`` of a group or array. Raises StoreError if it is not the one that was committed."""
        with damage(f"{self.shown}: {path}/{METADATA}"):
            return read_node(locate(self.address), path, self.sealed.get(path))

    @cached_property
    def sealed(self) -> dict[str, str]:
        """The hash of the ``zarr.json`` of every group and array that was committed, by its path."""
        hashes = dict(self.base_metadata)
        for group in self.groups:
            hashes |= group.metadata
        return hashes

    def chunk(self, path: str, *index: int) -> np.ndarray:
        """One whole chunk of an array. Raises StoreError, naming it, where it is missing or damaged."""
        layout = self.array(path)
        with damage(f"{self.shown}: chunk {chunk_key(path, layout, *index)}"):
            return read_chunk(locate(self.address), path, layout, *index)

    def write_chunk(self, path: str, values: np.ndarray, *index: int) -> None:
        """Write one whole chunk of an array."""
        write_chunk(locate(self.address), path, self.array(path), values, *index)

    def base_bits(self, block: Block) -> np.ndarray:
        """The base's element bits in a block [size]."""
        path = f"base/{block.kind.name}/bits"
        chunk = self.array(path).chunks[0]
        first = block.index * self.block // chunk
        count = -(-block.size // chunk)
        parts = [self.chunk(path, first + i) for i in range(count)]
        return (np.concatenate(parts) if count > 1 else parts[0])[: block.size]

    def move_counts(self, group: Group, block: Block) -> np.ndarray:
        """How often each element of a block moves in a group, 0 for those that never differ from the base: [size]."""
        path = f"{group.path}/{block.kind.name}/count"
        counts = self.chunk(path, block.index)[: block.size]
        if counts.max(initial=0) > len(group.steps):
            raise StoreError(
                f"{self.shown}: {path}: an element moves more often than there are steps; the store is damaged"
            )
        return counts

    def digests(self, path: str, block: Block) -> np.ndarray:
        """The digests of a block in the base [16] or in a group [K, 16], by its Zarr path."""
        return self.chunk(f"{path}/{block.kind.name}/digest", block.index)[0]

    def changed(self, group: Group) -> np.ndarray:
        """How many elements of each tensor differ from the base at each step of a group: int64 [tensors, K]."""
        return self.chunk(f"{group.path}/changed")

    def checkpoints(self, group: Group) -> dict[int, CheckpointRecord]:
        """The source checkpoints of a group, by step."""
        records = self._sources(group, lambda value: list(map(CheckpointRecord.from_json, value["steps"])))
        if tuple(record.step for record in records) != group.steps:
            raise StoreError(f"{self.shown}: sources of {group.path} do not fit its steps; the store is damaged")
        return {record.step: record for record in records if record.step is not None}

    def base(self) -> CheckpointRecord:
        """The base's source checkpoint."""
        return self._sources(self.groups[0], lambda value: CheckpointRecord.from_json(value["base"]))

    def file(self, path: str) -> bytes:
        """The bytes of a stored file (a header, an index, or a side file). Raises StoreError if their hash is wrong."""
        return b"".join(self.pieces(path))

    def pieces(self, path: str) -> Iterator[bytes]:
        """The bytes of a stored file, a chunk at a time. Raises StoreError, at their end, if their hash is wrong."""
        layout, hashed = self.array(path), hashlib.sha256()
        size, chunk = layout.shape[0], layout.chunks[0]
        for number, first in enumerate(range(0, size, chunk)):
            piece = self.chunk(path, number)[: size - first].tobytes()
            hashed.update(piece)
            yield piece
        if hashed.hexdigest()[:FILE_DIGITS] != path.rsplit("/", 1)[-1]:
            raise StoreError(f"{self.shown}: {path}: not the bytes that were hashed; the store is damaged")

    def record(self, step: int | None) -> CheckpointRecord:
        """The source checkpoint of a step, or of the base (None). Raises RequestError for a step that is not stored."""
        return self.base() if step is None else self.checkpoints(self.find(step)[0])[step]

    def _sources(self, group: Group, parse: Callable[[Any], T]) -> T:
        with damage(f"{self.shown}: attributes of {group.path}"):
            return parse(self.metadata(group.path)["attributes"]["sources"])


def file_digest(data: bytes | Path) -> str:
    """The name of the array of a stored file: the first 32 hexadecimal digits of the SHA-256 of its bytes."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()[:FILE_DIGITS]
    with open(data, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:FILE_DIGITS]


def open_store(path: str | Path) -> Store:
    """Open a trajectory store at its last commit.

    Raises MissingError if nothing exists, StoreError if it is not a finished trajectory, or of a newer format.
    """
    location = locate(path)
    address = location.shown
    if not location.exists():
        if location.staged.exists():
            raise MissingError(
                f"{address}: its convert was interrupted; run the same relexio convert again to finish it"
            )
        raise MissingError(f"{address}: no such trajectory; make one with relexio convert")
    if location.get(METADATA) is None:
        raise StoreError(f"{address}: not a relexio trajectory (it has no zarr.json)")
    store = None if has_begun(location) else _open(location)
    if store is None or not store.groups:
        raise StoreError(f"{address}: an unfinished conversion; run the same relexio convert again to finish it")
    return store


def has_begun(location: Location) -> bool:
    """Whether a conversion has begun right at a location that cannot be renamed, and has committed nothing."""
    if location.staged != location:
        return False
    marker = attributes(location).get("relexio")
    return isinstance(marker, dict) and marker.get("groups") == []


def unfinished_store(location: Location) -> Store | None:
    """The store that an interrupted ``convert`` left where it was staged; None if there is none to continue."""
    try:
        store = _open(location) if location.get(METADATA) is not None else None
    except StoreError:
        return None
    return store if store is not None and not store.groups else None


def _open(location: Location) -> Store:
    with damage(f"{location.shown}/{METADATA}"):
        record = check_format(unseal(location.get(METADATA) or b""), location.shown)
    with damage(location.shown):
        groups, hashes = groups_from_json(record["groups"]), hashes_from_json(record["metadata"])
        store = Store(
            location.address, block_from_json(record["block"]), (), groups, str(record["base_content"]), hashes
        )
        table = store.metadata("base")["attributes"]["tensors"]
        store = replace(store, tensors=tensors_from_json(table, store.block))
    for kind in count_blocks(store.tensors, store.block):  # one look here, or every block would find it out by itself
        store.array(f"base/{kind}/bits")
    return store
