"""Results kept beside the data, in ``cache/`` of the store, so that they are computed once.

What is there is whole (it got its name last) and is about the committed groups that its name counts. A store that
cannot be written keeps them in a temporary directory for the length of the run.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zarr

from relexio import atomic
from relexio.trajectory.store import Store, damage
from relexio.trajectory.zarrs import AnyArray, create, open_group


@dataclass(frozen=True)
class Kept:
    """A small Zarr group of float64 arrays, one entry along the first axis for each tensor."""

    path: Path
    owner: object = None  # a temporary directory lives as long as this
    _opened: dict[str, AnyArray] = field(default_factory=dict, compare=False, repr=False)

    def create(self, name: str, shape: tuple[int, ...]) -> AnyArray:
        """A new array, one chunk for each tensor."""
        axes = ("tensor", *(f"axis{i}" for i in range(1, len(shape))))
        return create(open_group(str(self.path), "r+"), name, shape, (1, *shape[1:]), "<f8", axes)

    def read(self, name: str, place: int) -> np.ndarray:
        """One tensor's entry. Raises StoreError where the kept file is damaged."""
        with damage(f"{self.path}: {name}, which can be removed and is then made again"):
            if name not in self._opened:
                found = open_group(str(self.path), "r")[name]
                assert isinstance(found, zarr.Array)
                self._opened[name] = found
            return np.asarray(self._opened[name][place])


def has(store: Store, name: str) -> bool:
    """Whether something is kept under a name."""
    return Path(store.address, "cache", name).is_dir()


def keep(store: Store, name: str, build: Callable[[Kept], None]) -> Kept:
    """What is kept under a name, built if it is not there yet."""
    final = Path(store.address, "cache", name)
    if final.is_dir():
        return Kept(final)
    owner = None
    try:
        final.parent.mkdir(exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f"{name}-", suffix=atomic.PARTIAL, dir=final.parent))
    except OSError:  # a read-only store is no reason to fail
        owner = tempfile.TemporaryDirectory(prefix="relexio-")
        final = Path(owner.name, name)
        building = atomic.staging(final)
        building.mkdir()
    try:
        with atomic.storage_errors(building):
            building.rmdir()
            open_group(str(building), "w-")
            build(Kept(building))
            atomic.sync_tree(building)
            if not final.is_dir():
                building.rename(final)
    finally:
        atomic.remove_tree(building)
    return Kept(final, owner)
