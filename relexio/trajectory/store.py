"""Opening a trajectory store, and reading its blocks. What the commit marker does not list does not exist."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr

from relexio.atomic import staging
from relexio.dtypes import KINDS
from relexio.errors import MissingError, RequestError, StoreError
from relexio.trajectory.schema import Block, Group, StoredCheckpoint, Tensor, check_format, lay_out
from relexio.trajectory.zarrs import AnyArray, open_group

T = TypeVar("T")


@dataclass(frozen=True)
class Store:
    """A trajectory store at an address. Cheap to copy and pickle: arrays are opened where they are first read."""

    address: str
    block: int
    tensors: tuple[Tensor, ...]
    groups: tuple[Group, ...]
    base_content: str
    _opened: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # absolute: where it is unpickled, the working directory may be another
        return {**self.__dict__, "address": str(Path(self.address).absolute()), "_opened": {}}

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """All committed steps, ascending."""
        return tuple(sorted(step for group in self.groups for step in group.steps))

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises RequestError if there is none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise RequestError(f"{self.address}: no tensor named {name!r}")

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
        raise RequestError(f"{self.address}: step {step} is not stored; it holds {describe_steps(self.steps)}")

    def columns(self, steps: tuple[int, ...]) -> list[tuple[Group, np.ndarray, np.ndarray]]:
        """For each group that holds any of ``steps``: the group, its columns, and their places in ``steps``."""
        found = []
        for group in self.groups:
            places = [i for i, step in enumerate(steps) if step in group.steps]
            if places:
                held = np.array([group.steps.index(steps[i]) for i in places])
                found.append((group, held, np.array(places)))
        return found

    def array(self, path: str, mode: str = "r") -> AnyArray:
        """An array of the store, opened once for reading or (``r+``) writing. Raises StoreError if it is missing."""
        key = f"{mode} {path}"
        if key not in self._opened:
            with damage(f"{self.address}: {path}"):
                found = open_group(self.address, mode)[path]
                if not isinstance(found, zarr.Array):
                    raise StoreError(f"{self.address}: {path} is not an array; the store is damaged")
                # Zarr forgets this setting of the array's creation: zeros too are written, so that none is ever missing
                self._opened[key] = found.with_config({"write_empty_chunks": True})
        return self._opened[key]

    def read(self, path: str, key: Any) -> np.ndarray:
        """Part of an array. Raises StoreError, naming it, where a chunk is missing or its checksum is wrong."""
        array = self.array(path)
        with damage(f"{self.address}: {path}"):
            return np.asarray(array[key])

    def base_bits(self, block: Block) -> np.ndarray:
        """The base's element bits in a block [size]."""
        at = block.index * self.block
        return self.read(f"base/{block.kind.name}/bits", slice(at, at + block.size))

    def mask(self, group: Group, block: Block) -> np.ndarray:
        """Which elements of a block differ from the base at any step of a group: bool [size]."""
        at = block.index * self.block // 8
        packed = self.read(f"{group.path}/{block.kind.name}/mask", slice(at, at + (block.size + 7) // 8))
        return np.unpackbits(packed, count=block.size, bitorder="little").view(bool)

    def changed(self, group: Group) -> np.ndarray:
        """How many elements of each tensor differ from the base at each step of a group: int64 [tensors, K]."""
        found = self.read(f"{group.path}/changed", slice(None))
        if found.shape != (len(self.tensors), len(group.steps)):
            raise StoreError(f"{self.address}: {group.path}/changed does not fit the tensors; the store is damaged")
        return found

    def checkpoints(self, group: Group) -> dict[int, StoredCheckpoint]:
        """The source checkpoints of a group, by step."""
        records = self._sources(group, lambda value: list(map(StoredCheckpoint.from_json, value["steps"])))
        if tuple(record.step for record in records) != group.steps:
            raise StoreError(f"{self.address}: sources of {group.path} do not fit its steps; the store is damaged")
        return {record.step: record for record in records if record.step is not None}

    def base(self) -> StoredCheckpoint:
        """The base's source checkpoint."""
        return self._sources(self.groups[0], lambda value: StoredCheckpoint.from_json(value["base"]))

    def file(self, path: str) -> bytes:
        """The bytes of a stored file (a header, an index, or a side file)."""
        return self.read(path, slice(None)).tobytes()

    def _sources(self, group: Group, parse: Callable[[Any], T]) -> T:
        with damage(f"{self.address}: attributes of {group.path}"):
            return parse(open_group(self.address, "r")[group.path].attrs["sources"])


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
    address = str(path)
    if not Path(address).exists():
        if staging(Path(address)).exists():
            raise MissingError(
                f"{address}: its convert was interrupted; run the same relexio convert again to finish it"
            )
        raise MissingError(f"{address}: no such trajectory; make one with relexio convert")
    if not (Path(address) / "zarr.json").is_file():
        raise StoreError(f"{address}: not a relexio trajectory (it has no zarr.json)")
    store = _open(address)
    if not store.groups:
        raise StoreError(f"{address}: an unfinished conversion; run the same relexio convert again to finish it")
    return store


def unfinished_store(path: Path) -> Store | None:
    """The store that an interrupted ``convert`` left in its staging directory; None if there is none to go on with."""
    try:
        store = _open(str(path)) if (path / "zarr.json").is_file() else None
    except StoreError:
        return None
    return store if store is not None and not store.groups else None


def _open(address: str) -> Store:
    with damage(address):
        root = open_group(address, "r")
        record = check_format(dict(root.attrs), address)
        groups = tuple(map(Group.from_json, record["groups"]))
        table: Any = root["base"].attrs["tensors"]
        tensors = tuple(map(Tensor.from_json, table))
        entries = [(t.name, t.dtype, t.shape) for t in tensors]
        if lay_out(entries, int(record["block"])) != tensors:
            raise StoreError(f"{address}: its tensors do not lie one after the other; the store is damaged")
        return Store(address, int(record["block"]), tensors, groups, str(record["base_content"]))


def kinds_of(tensors: tuple[Tensor, ...], block: int) -> dict[str, int]:
    """The kinds that have any block, with their number of blocks."""
    counts = {name: sum(len(t.blocks(block)) for t in tensors if t.kind.name == name) for name in KINDS}
    return {name: count for name, count in counts.items() if count}


def describe_steps(steps: tuple[int, ...]) -> str:
    """Steps in a few words: all of them if few, else the ends and the number."""
    if len(steps) <= 6:
        return ("steps " if len(steps) != 1 else "step ") + ", ".join(map(str, steps))
    return f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
