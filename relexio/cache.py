"""Results kept beside the data, in ``cache/`` of the store, so that they are computed once.

What is there is whole (it got its name last) and is about the committed groups that its name counts. A store that
cannot be written keeps them in a temporary directory for the length of the run.
"""

import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import zarr

from relexio import atomic
from relexio.errors import BusyError
from relexio.trajectory.store import Store, damage
from relexio.trajectory.zarrs import AnyArray, create, open_group

#: Bytes up to which an array is kept as one chunk and held in memory.
SMALL = 16 << 20
#: A store that cannot be written, or a disk that is full, is no reason to fail: the result is kept for this run only.
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR}


@dataclass(frozen=True)
class Kept:
    """A small Zarr group of float64 arrays, one entry along the first axis for each tensor."""

    path: Path
    owner: object = None  # a temporary directory lives as long as this
    _opened: dict[str, AnyArray | np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @contextmanager
    def create(self, name: str, shape: tuple[int, ...]) -> Iterator[AnyArray | np.ndarray]:
        """A new array to be filled: in memory and stored as one chunk if it is small, else a chunk for each tensor."""
        small = 8 * prod(shape) <= SMALL
        axes = ("tensor", *(f"axis{i}" for i in range(1, len(shape))))
        chunks = shape if small else (1, *shape[1:])
        stored = create(open_group(str(self.path), "r+"), name, shape, chunks, "<f8", axes)
        if not small:
            yield stored
            return
        filled = np.zeros(shape)
        yield filled
        stored[:] = filled

    def read(self, name: str, place: int) -> np.ndarray:
        """One tensor's entry. Raises StoreError where the kept file is damaged."""
        with damage(f"{self.path}: {name}", "remove this directory, and it is made again"):
            if name not in self._opened:
                found = open_group(str(self.path), "r")[name]
                assert isinstance(found, zarr.Array)
                whole = found.chunks[0] > 1 or found.shape[0] == 1
                self._opened[name] = np.asarray(found[:]) if whole else found
            return np.asarray(self._opened[name][place])


def has(store: Store, name: str) -> bool:
    """Whether something is kept under a name."""
    return Path(store.address, "cache", name).is_dir()


def keep(store: Store, name: str, build: Callable[[Kept], None]) -> Kept:
    """What is kept under a name, built if it is not there yet."""
    final = Path(store.address, "cache", name)
    if final.is_dir():
        return Kept(final)
    try:
        final.parent.mkdir(exist_ok=True)
        _clear_away(final)
        _build(final, build)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        owner = tempfile.TemporaryDirectory(prefix="relexio-")
        final = Path(owner.name, name)
        with atomic.storage_errors(final):
            _build(final, build)
        return Kept(final, owner)
    return Kept(final)


def _build(final: Path, build: Callable[[Kept], None]) -> None:
    building = Path(tempfile.mkdtemp(prefix=f"{final.name}-", suffix=atomic.PARTIAL, dir=final.parent))
    try:
        with atomic.locked(building):
            open_group(str(building), "w-")
            build(Kept(building))
            atomic.sync_tree(building)
            if not final.is_dir():
                building.rename(final)
    finally:
        atomic.remove_tree(building)


def _clear_away(final: Path) -> None:
    """Remove what nobody will ask for again: results on fewer groups, and what a killed process left unfinished."""
    solver, groups = final.name.split("-")[:2]
    for other in final.parent.iterdir():
        if other.name.endswith(atomic.PARTIAL):
            with suppress(BusyError), atomic.locked(other):
                atomic.remove_tree(other)
        elif other.name.startswith(solver) and other.name.split("-")[1] < groups:
            atomic.remove_tree(other)
