"""Opening a trajectory store, and reading its blocks. What the commit marker does not list does not exist."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr

from relexio.checkpoints.record import StoredCheckpoint
from relexio.dtypes import KINDS, Table
from relexio.errors import MissingError, RequestError, StoreError
from relexio.store.chunks import decode, encode, most_bytes
from relexio.store.schema import (
    BLOCK,
    DIGEST,
    FILE_CHUNK,
    MOST_BLOCKS,
    MOVES_CHUNK,
    Block,
    Group,
    Tensor,
    check_array,
    check_format,
    count_type,
    hashes_from_json,
    lay_out,
    moves_room,
)
from relexio.store.seal import hash_of, unseal
from relexio.store.storage import METADATA, Directory, Place, attributes, place
from relexio.store.zarrs import AnyArray, open_group
from relexio.words import describe_steps, shown

T = TypeVar("T")
#: Of the SHA-256 in the name of a stored file's array.
FILE_DIGITS = 32


@dataclass(frozen=True)
class Store:
    """A trajectory store at an address. Cheap to copy and pickle: arrays are opened where they are first read."""

    address: str
    block: int
    tensors: tuple[Tensor, ...]
    groups: tuple[Group, ...]
    base_content: str
    base_metadata: dict[str, str] = field(default_factory=dict)
    _opened: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:  # it stands in what Dask logs of a task that failed
        return f"<Store {self.shown}>"

    def __getstate__(self) -> dict[str, Any]:
        # absolute: where it is unpickled, the working directory may be another
        address = str((*self.files(""), self.address)[0])
        return {**self.__dict__, "address": address, "_opened": {}}

    @property
    def shown(self) -> str:
        """The address as it may be seen: without what is secret in it."""
        return shown(self.address)

    def files(self, *names: str) -> list[Path]:
        """Files of the store by their names in it, as absolute paths; none of a store on object storage."""
        where = place(self.address)
        return [(where.path / name).absolute() for name in names] if isinstance(where, Directory) else []

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
        found, wanted = [], {step: i for i, step in enumerate(steps)}
        for group in self.groups:
            columns = {wanted[step]: column for column, step in enumerate(group.steps) if step in wanted}
            if columns:
                places = sorted(columns)
                found.append((group, np.array([columns[i] for i in places]), np.array(places)))
        return found

    def array(self, path: str, mode: str = "r") -> AnyArray:
        """An array of the store, opened once for reading or (``r+``) writing. Raises StoreError if it is missing."""
        key = f"{mode} {path}"
        if key not in self._opened:
            known = self.metadata(path)
            with damage(f"{self.shown}: {path}"):
                self._check_layout(path, known)
                found = open_group(self.address, mode)[path]
                if not isinstance(found, zarr.Array):
                    raise StoreError(f"{self.shown}: {path} is not an array; the store is damaged")
                # Zarr forgets this setting of the array's creation: zeros too are written, so that none is ever missing
                self._opened[key] = found.with_config({"write_empty_chunks": True})
        return self._opened[key]

    def metadata(self, path: str) -> Any:
        """The ``zarr.json`` of a group or array. Raises StoreError if it is not the one that was committed."""
        data = place(self.address).get(f"{path}/{METADATA}")
        if data is None:
            raise StoreError(f"{self.shown}: {path}/{METADATA} is missing; the store is damaged")
        known = self.sealed.get(path)
        with damage(f"{self.shown}: {path}/{METADATA}"):
            if known is not None and hash_of(data) != known:
                raise ValueError("its checksum is wrong")
            return json.loads(data)

    def _check_layout(self, path: str, found: Any) -> None:
        """Raise ValueError unless an array is as large, and in chunks of such a size, as its tensors and steps ask for.

        What it says is what will be allocated, and its type what bytes are taken for.
        """
        shape, chunks = check_array(found, ("uint8", "uint16", "uint32", "int64"))
        top, _, name = path.rpartition("/")
        group = next((g for g in self.groups if path.startswith(f"{g.path}/")), None)
        if top.endswith("/files"):
            right = len(shape) == 1 and chunks in ((max(shape[0], 1),), (min(shape[0], FILE_CHUNK),))
            right = right and found["data_type"] == "uint8"
        elif group is not None and path == f"{group.path}/changed":
            right = shape == chunks == (len(self.tensors), len(group.steps)) and found["data_type"] == "int64"
        elif group is None and not path.startswith("base/"):
            return  # being written: the marker does not know it yet
        else:
            dtype, want, most = self._wanted(top.rpartition("/")[2], name, len(group.steps) if group else 0)
            right = (found["data_type"], shape) == (dtype, want) and chunks[1:] == want[1:]
            right = right and most % chunks[0] == 0 and (most > 1 or chunks[0] == 1)
            right = right and (name not in ("step", "xor") or chunks[0] <= max(MOVES_CHUNK, self.block))
            right = right and (name != "count" or chunks[0] == self.block)
        if not right:
            raise ValueError(f"its shape {list(shape)[:4]}, chunks or data type are not those of its tensors and steps")

    def _wanted(self, kind: str, name: str, steps: int) -> tuple[str, tuple[int, ...], int]:
        """Data type and shape of an array of blocks, and what the first number of its chunks must divide."""
        blocks, bits = kinds_of(self.tensors, self.block)[kind], np.dtype(KINDS[kind].bits).name
        if name == "digest":
            return "uint8", ((blocks, steps, DIGEST) if steps else (blocks, DIGEST)), 1
        room = moves_room(self.block, steps) if name in ("step", "xor") else self.block
        return np.dtype(count_type(steps)).name if name in ("step", "count") else bits, (blocks * room,), room

    @cached_property
    def sealed(self) -> dict[str, str]:
        """The hash of the ``zarr.json`` of every group and array that was committed, by its path."""
        found = dict(self.base_metadata)
        for group in self.groups:
            found |= group.metadata
        return found

    def chunk(self, path: str, *where: int) -> np.ndarray:
        """One whole chunk of an array. Raises StoreError, naming it, where it is missing or its checksum is wrong."""
        array = self.array(path)
        key = "/".join(map(str, (path, "c", *where)))
        data = place(self.address).get(key, most_bytes(array.dtype, prod(array.chunks)))
        if data is None:
            raise StoreError(f"{self.shown}: chunk {key} is missing; the store is damaged")
        with damage(f"{self.shown}: {key}"):
            return decode(data, array.dtype, prod(array.chunks)).reshape(array.chunks)

    def write_chunk(self, path: str, values: np.ndarray, *where: int) -> None:
        """Write one whole chunk of an array."""
        values = values.astype(self.array(path).dtype, copy=False)
        place(self.address).put("/".join(map(str, (path, "c", *where))), encode(values))

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
        found = self.chunk(path, block.index)[: block.size]
        if found.max(initial=0) > len(group.steps):
            raise StoreError(f"{self.shown}: {path}: an element moves more often than there are steps; damaged")
        return found

    def digests(self, path: str, block: Block) -> np.ndarray:
        """The digests of a block in the base [16] or in a group [K, 16], by its Zarr path."""
        where = (block.index, 0) if path == "base" else (block.index, 0, 0)
        return self.chunk(f"{path}/{block.kind.name}/digest", *where)[0]

    def changed(self, group: Group) -> np.ndarray:
        """How many elements of each tensor differ from the base at each step of a group: int64 [tensors, K]."""
        return self.chunk(f"{group.path}/changed", 0, 0)

    def checkpoints(self, group: Group) -> dict[int, StoredCheckpoint]:
        """The source checkpoints of a group, by step."""
        records = self._sources(group, lambda value: list(map(StoredCheckpoint.from_json, value["steps"])))
        if tuple(record.step for record in records) != group.steps:
            raise StoreError(f"{self.shown}: sources of {group.path} do not fit its steps; the store is damaged")
        return {record.step: record for record in records if record.step is not None}

    def base(self) -> StoredCheckpoint:
        """The base's source checkpoint."""
        return self._sources(self.groups[0], lambda value: StoredCheckpoint.from_json(value["base"]))

    def file(self, path: str) -> bytes:
        """The bytes of a stored file (a header, an index, or a side file). Raises StoreError if they are another file's."""
        return b"".join(self.pieces(path))

    def pieces(self, path: str) -> Iterator[bytes]:
        """The bytes of a stored file, a chunk at a time. Raises StoreError, at their end, if they are another file's."""
        array, hashed = self.array(path), hashlib.sha256()
        size, chunk = array.shape[0], array.chunks[0]
        for number, first in enumerate(range(0, size, chunk)):
            piece = self.chunk(path, number)[: size - first].tobytes()
            hashed.update(piece)
            yield piece
        if hashed.hexdigest()[:FILE_DIGITS] != path.rsplit("/", 1)[-1]:
            raise StoreError(f"{self.shown}: {path}: not the bytes that were hashed; damaged")

    def record(self, step: int | None) -> StoredCheckpoint:
        """The source checkpoint of a step, or of the base (None). Raises RequestError for a step that is not stored."""
        return self.base() if step is None else self.checkpoints(self.find(step)[0])[step]

    def _sources(self, group: Group, parse: Callable[[Any], T]) -> T:
        with damage(f"{self.shown}: attributes of {group.path}"):
            return parse(self.metadata(group.path)["attributes"]["sources"])


def file_digest(data: bytes | Path) -> str:
    """What the array of a stored file is named by: the first 32 hexadecimal digits of the SHA-256 of its bytes."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()[:FILE_DIGITS]
    with open(data, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:FILE_DIGITS]


@contextmanager
def damage(what: str, advice: str = "take it from a copy, or convert again into a new trajectory") -> Iterator[None]:
    """Turn what Zarr and its codecs raise on a damaged store into one StoreError."""
    try:
        yield
    except StoreError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        FileNotFoundError,
    ) as error:
        said = "a checksum is wrong" if "checksum" in str(error) else f"{type(error).__name__}: {error}"
        raise StoreError(f"{what}: damaged ({said}); {advice}") from error


def open_store(path: str | Path) -> Store:
    """Open a trajectory store at its last commit.

    Raises MissingError if nothing is there, StoreError if it is no finished trajectory or of a newer format.
    """
    where = place(path)
    address = where.shown
    if not where.exists():
        if where.staged.exists():
            raise MissingError(
                f"{address}: its convert was interrupted; run the same relexio convert again to finish it"
            )
        raise MissingError(f"{address}: no such trajectory; make one with relexio convert")
    if where.get(METADATA) is None:
        raise StoreError(f"{address}: not a relexio trajectory (it has no zarr.json)")
    store = None if begun(where) else _open(where.address)
    if store is None or not store.groups:
        raise StoreError(f"{address}: an unfinished conversion; run the same relexio convert again to finish it")
    return store


def begun(where: Place) -> bool:
    """Whether a conversion has begun right in a place, as it does where nothing can be renamed, and committed nothing."""
    if where.staged != where:
        return False
    marker = attributes(where).get("relexio")
    return isinstance(marker, dict) and marker.get("groups") == []


def unfinished_store(where: Place) -> Store | None:
    """The store that an interrupted ``convert`` left where it was staged; None if there is none to go on with."""
    try:
        store = _open(where.address) if where.get(METADATA) is not None else None
    except StoreError:
        return None
    return store if store is not None and not store.groups else None


def _open(address: str) -> Store:
    where = place(address)
    with damage(f"{where.shown}/{METADATA}"):
        record = check_format(unseal(where.get(METADATA) or b""), where.shown)
    with damage(where.shown):
        groups = tuple(map(Group.from_json, record["groups"]))
        hashes = hashes_from_json(record["metadata"])
        store = Store(address, _block_of(record), (), groups, str(record["base_content"]), hashes)
        if [group.name for group in groups] != [f"{i:04d}" for i in range(len(groups))]:
            raise StoreError(f"{where.shown}: its groups are not numbered one after the other; the store is damaged")
        if len({*store.steps}) != len(store.steps):
            raise StoreError(f"{where.shown}: a step is in two groups; the store is damaged")
        tensors = tuple(map(Tensor.from_json, store.metadata("base")["attributes"]["tensors"]))
        store = replace(store, tensors=tensors)
        if len(store.table) != len(tensors):
            raise StoreError(f"{where.shown}: two of its tensors have one name; the store is damaged")
        if lay_out(store.table, store.block) != tensors:
            raise StoreError(f"{where.shown}: its tensors do not lie one after the other; the store is damaged")
        if max(kinds_of(tensors, store.block).values(), default=0) > MOST_BLOCKS:
            raise StoreError(f"{where.shown}: has more blocks than any model; the store is damaged")
        for kind in kinds_of(tensors, store.block):  # one look here, or every block would find it out by itself
            store._check_layout(f"base/{kind}/bits", store.metadata(f"base/{kind}/bits"))
        return store


def _block_of(record: dict[str, Any]) -> int:
    block = record["block"]
    if type(block) is not int or not 0 < block <= BLOCK or block & (block - 1):
        raise ValueError(f"block {str(block)[:30]} is not a power of two up to {BLOCK}")
    return block


def kinds_of(tensors: tuple[Tensor, ...], block: int) -> dict[str, int]:
    """The kinds that have any block, with their number of blocks."""
    counts = {name: sum(t.count(block) for t in tensors if t.kind.name == name) for name in KINDS}
    return {name: count for name, count in counts.items() if count}
