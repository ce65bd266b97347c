"""Results kept beside the data, in ``cache/`` of the store, so that they are computed once.

What is there is whole (it got its name or its mark last) and is about the committed groups that its name counts. A
store that cannot be written keeps them in a temporary directory for the length of the run.
"""

import errno
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import zarr

from relexio.atomic import PARTIAL
from relexio.bounded import loads
from relexio.errors import BusyError, StoreError
from relexio.store.chunks import decode, most_bytes
from relexio.store.schema import check_array, hashes_from_json
from relexio.store.seal import hash_of, metadata_hashes, seal, unseal
from relexio.store.storage import METADATA, Directory, Place, place
from relexio.store.store import Store, damage
from relexio.store.zarrs import AnyArray, create, open_group
from relexio.words import shown

#: Bytes up to which an array is kept as one chunk and held in memory.
SMALL = 16 << 20
_NUMBER = np.dtype("<f8")
#: More than the squares of 2^63 of the largest float32 add up to.
_LARGE = 1e100
_REMOVE = "remove this directory, and it is made again"
#: A store that cannot be written, or a disk that is full, is no reason to fail: the result is kept for this run only.
#: (ENOENT: somebody has removed ``cache/`` meanwhile, which may be done at any time.)
_NOT_WRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR, errno.ENOENT)
}
_NOT_PERMITTED = {errno.EACCES, errno.EPERM}


class _Temporary:
    """A directory that goes with this object, or with the process (unlike tempfile's own, without a warning)."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="relexio-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class Kept:
    """A small Zarr group of float64 arrays, one entry along the first axis for each tensor."""

    address: str
    owner: object = None  # a temporary directory lives as long as this
    _opened: dict[str, tuple[int, ...] | np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:
        return f"<Kept {self.shown}>"

    @property
    def shown(self) -> str:
        """The address as it may be seen."""
        return shown(self.address)

    @contextmanager
    def create(self, name: str, shape: tuple[int, ...]) -> Iterator[AnyArray | np.ndarray]:
        """A new array to be filled: in memory and stored as one chunk if it is small, else a chunk for each tensor."""
        small = 8 * prod(shape) <= SMALL
        axes = ("tensor", *(f"axis{i}" for i in range(1, len(shape))))
        chunks = shape if small else (1, *shape[1:])
        stored = self._new(name, shape, chunks, axes)
        if not small:
            yield stored
            return
        filled = np.zeros(shape)
        yield filled
        stored[:] = filled

    def _new(self, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], axes: tuple[str, ...]) -> AnyArray:
        """The array to be filled: one that another build of the same has begun in this place, else a new one."""
        group = open_group(self.address, "r+")
        found = group.get(name)
        if isinstance(found, zarr.Array) and (found.shape, found.chunks) == (shape, chunks):
            return found.with_config({"write_empty_chunks": True})
        if found is not None:
            del group[name]
        return create(group, name, shape, chunks, "<f8", axes)

    def check(self, tensors: int, steps: int) -> None:
        """Read all of it, kept for so many tensors and steps. Raises StoreError where it is damaged."""
        with damage(self.shown, _REMOVE):
            names = sorted(self._hashes())
        for name in names:
            with damage(f"{self.shown}: {name}", _REMOVE):
                shape, chunks = self._layout(name)
                if shape[0] != tensors or any(size > steps for size in shape[1:]):
                    raise ValueError(f"its shape {list(shape)[:4]} is not of {tensors} tensors and {steps} steps")
                for first in range(0, tensors, chunks[0]):
                    self._chunk(name, chunks, first // chunks[0])

    def _hashes(self) -> dict[str, str]:
        return hashes_from_json(unseal(place(self.address).get(METADATA) or b"")["relexio"]["metadata"])

    def _layout(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and chunks: all in one, or one for each tensor. Raises ValueError for what this module does not write."""
        data = place(self.address).get(f"{name}/{METADATA}") or b""
        if hash_of(data) != self._hashes()[name]:
            raise ValueError("the checksum of its zarr.json is wrong")
        shape, chunks = check_array(loads(data), ("float64",))
        if chunks not in (shape, (1, *shape[1:])):
            raise ValueError(f"its chunks {list(chunks)[:4]} are neither all of it nor those of a tensor")
        return shape, chunks

    def _chunk(self, name: str, chunks: tuple[int, ...], number: int) -> np.ndarray:
        key = "/".join(map(str, (name, "c", number, *(0 for _ in chunks[1:]))))
        data = place(self.address).get(key, most_bytes(_NUMBER, prod(chunks)))
        if data is None:
            raise ValueError(f"chunk {key} is missing")
        return decode(data, _NUMBER, prod(chunks)).reshape(chunks)

    def read(self, name: str, entry: int, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor's entry of an array of that shape. Raises StoreError where the kept file is damaged."""
        with damage(f"{self.shown}: {name}", _REMOVE):
            if name not in self._opened:
                found, chunks = self._layout(name)
                if found != shape:
                    raise ValueError(f"its shape is {list(found)[:4]}, not {list(shape)}")
                self._opened[name] = self._chunk(name, chunks, 0) if chunks == shape else chunks
            held = self._opened[name]
            numbers = held[entry] if isinstance(held, np.ndarray) else self._chunk(name, held, entry)[0]
            if not (np.abs(numbers) < _LARGE).all():  # false for NaN too
                raise ValueError("it holds numbers that no weights make")
            return numbers


def has(store: Store, name: str) -> bool:
    """Whether something is kept under a name, and may be read."""
    with _closed([], name):
        return _found(place(store.address).below(f"cache/{name}"))
    return False


def _found(final: Place) -> bool:
    """Whether a result is there. Raises OSError (EACCES) for one that may not be read: it is another user's own."""
    if not final.whole():
        return False
    if not final.readable():
        raise PermissionError(errno.EACCES, "may not be read", final.shown)
    return True


def check(store: Store) -> tuple[list[str], list[str]]:
    """What is damaged of all that is kept, and what of it may not be read: a line each."""
    kept = place(store.address).below("cache")
    damaged: list[str] = []
    closed: list[str] = []
    with _closed(closed, "cache"):
        for name in sorted(kept.names()):
            with _closed(closed, f"cache/{name}"):
                try:
                    if not name.endswith("partial") and _found(kept.below(name)):
                        Kept(kept.below(name).address).check(len(store.fitted()), len(store.steps))
                except StoreError as error:
                    damaged.append(str(error))
    return damaged, closed


def left(store: Store) -> list[str]:
    """The names of what is unfinished in ``cache/``, as far as that may be read."""
    with _closed([], "cache"):
        return [name for name in place(store.address).below("cache").names() if name.endswith("partial")]
    return []


@contextmanager
def _closed(found: list[str], name: str) -> Iterator[None]:
    """Add a name to those found where the permission to read what it stands for is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_PERMITTED:
            raise
        found.append(name)


def keep(store: Store, name: str, build: Callable[[Kept], None]) -> Kept:
    """What is kept under a name, built if it is not there yet. What may not be read is not there."""
    kept = place(store.address).below("cache")
    final = kept.below(name)
    try:
        if _found(final):
            return Kept(final.address)
        if isinstance(kept, Directory) and kept.path.is_symlink():  # to write there is not what was asked for
            raise NotADirectoryError(errno.ENOTDIR, "a link", kept.address)
        _clear_away(kept, name)
        _build(final, build)
        _found(final)  # another process may have been faster, and keep it to itself
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        owner = _Temporary()
        final = place(Path(owner.path, name))
        with final.storage_errors():
            _build(final, build)
        return Kept(final.address, owner)
    return Kept(final.address)


def _build(final: Place, build: Callable[[Kept], None]) -> None:
    with final.building() as building:
        group = open_group(building.address, "a")
        build(Kept(building.address))
        building.put(METADATA, seal({"metadata": metadata_hashes(building, sorted(group.array_keys()))}, whole=True))


def _clear_away(kept: Place, name: str) -> None:
    """Remove what nobody will ask for again: results on fewer groups, and what a killed process left unfinished."""
    solver, groups = name.split("-")[:2]
    for other in kept.names():
        # another process may finish it, or clear it away, meanwhile; another user's may not be ours to remove
        with suppress(BusyError, FileNotFoundError, PermissionError):
            if other.endswith(PARTIAL):
                with kept.below(other).locked():
                    kept.below(other).remove()
            elif other.startswith(f"{solver}-") and other.split("-")[1] < groups:
                kept.below(other).remove()
