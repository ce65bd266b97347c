"""A trajectory in a directory of this machine."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING
from uuid import uuid4

from relexio import atomic
from relexio.errors import BusyError, StoreError
from relexio.store.storage.protocol import METADATA, METADATA_BYTES, Location
from relexio.words import shown

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

_TRIES, _WAIT = 20, 0.05  # times, seconds


@dataclass(frozen=True)
class LocalStorage:
    """A directory of this machine."""

    address: str

    @property
    def shown(self) -> str:
        return shown(self.address)

    @property
    def path(self) -> Path:
        """The address as a path."""
        return Path(self.address)

    @property
    def staged(self) -> "LocalStorage":
        """The directory beside it with PARTIAL behind its name."""
        return LocalStorage(str(atomic.staging(self.path)))

    def below(self, key: str) -> "LocalStorage":
        return LocalStorage(str(self.path / key))

    def exists(self) -> bool:
        return self.path.exists()

    def names(self) -> list[str]:
        return [path.name for path in self.path.iterdir()] if self.path.exists() else []

    def nbytes(self) -> int:
        return atomic.tree_bytes(self.path)

    def free_bytes(self) -> int:
        return atomic.free_bytes(self.path)

    def get(self, key: str, most: int = METADATA_BYTES) -> bytes | None:
        try:
            name = f"{self.address}/{key}"  # a Path takes longer to make than a small file to read
            with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # no waiting for a pipe
                stat = os.fstat(file.fileno())
                if not S_ISREG(stat.st_mode):
                    return None
                if stat.st_size > most:
                    raise StoreError(f"{name}: {stat.st_size:,} bytes, which is too many; the store is damaged")
                return file.read(most)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def put(self, key: str, data: bytes) -> None:
        self._put(key, data, durable=False)

    def _put(self, key: str, data: bytes, durable: bool) -> None:
        staged, final = Path(f"{self.address}/{key}.{uuid4().hex}.partial"), Path(f"{self.address}/{key}")
        try:
            atomic.write_file(staged, final, data, durable)
        except FileNotFoundError:
            self._make_below(final.parent)
            atomic.write_file(staged, final, data, durable)

    def _make_below(self, folder: Path) -> None:
        """Make a directory below, name by name; never this one itself: where it is gone, nothing takes its name."""
        made = self.path
        for name in folder.relative_to(self.path).parts:
            made = made / name
            made.mkdir(exist_ok=True)

    def discard(self, key: str) -> None:
        (self.path / key).unlink(missing_ok=True)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def empty(self) -> None:
        atomic.empty_tree(self.path)

    def remove(self) -> None:
        atomic.remove_tree(self.path)

    def zarr_store(self) -> "ZarrStore":
        from zarr.storage import LocalStore  # Zarr takes a while to import, and only what writes metadata needs it

        self.path.stat()  # Zarr would make a directory that has gone
        return LocalStore(self.address)

    def locked(self, make: bool = False) -> AbstractContextManager[None]:
        return atomic.locked(self.path, make)  # the kernel's lock on the directory

    def storage_errors(self) -> AbstractContextManager[None]:
        return atomic.storage_errors(self.path)

    def settle(self) -> None:
        """Remove what a killed writer left (Zarr writes beside, then renames), and sync the rest."""
        for leftover in self.path.rglob("*.partial"):
            leftover.unlink()
        atomic.sync_tree(self.path)

    def commit(self, marker: bytes) -> None:
        """Sync the new marker before it takes the old one's name: a power loss in between could leave an empty file."""
        for leftover in self.path.glob("*.partial"):
            leftover.unlink()
        self._put(METADATA, marker, durable=True)

    def publish(self, final: Location) -> None:
        atomic.publish(self.path, Path(final.address))

    def whole(self) -> bool:
        return self.path.is_dir()  # it got its name last

    def readable(self) -> bool:
        """Whether all files below may be read: by opening them, as modes are not all that decides."""
        try:
            for folder, _, names in os.walk(self.path, onerror=_raise):
                for name in names:
                    os.close(os.open(Path(folder, name), os.O_RDONLY | os.O_NONBLOCK))
        except PermissionError:
            return False
        except OSError:  # something else is wrong with it: who reads it says what
            return True
        return True

    @contextmanager
    def building(self) -> Iterator[Location]:
        """Build in a directory beside it that gets its name at the end, unless another was faster."""
        self.path.parent.mkdir(exist_ok=True)
        with ExitStack() as lock:
            staged = self._begun(lock)
            try:
                yield LocalStorage(str(staged))
                atomic.sync_tree(staged)
                if not self.path.is_dir():
                    staged.rename(self.path)
            except BaseException:
                _remove_for_good(staged)
                raise
        atomic.remove_tree(staged)

    def _begun(self, lock: ExitStack) -> Path:
        """A new directory beside it, of a name of its own, locked; its mode is what the umask says, as that of all else."""
        for _ in range(_TRIES):
            staged = self.path.with_name(f"{self.path.name}-{uuid4().hex}{atomic.PARTIAL}")
            with suppress(BusyError):  # who clears away took it for one that was left: it was not locked yet
                lock.enter_context(atomic.locked(staged, make=True))
                return staged
        raise BusyError(f"{self.path.parent}: other processes keep removing it; wait for them to end")


def _raise(error: OSError) -> None:
    raise error


def _remove_for_good(directory: Path) -> None:
    """Remove what an error cut off. Zarr may still have a write under way then, which makes the directory once more."""
    for _ in range(_TRIES):
        with suppress(OSError):  # a file that comes while others go
            atomic.remove_tree(directory)
        time.sleep(_WAIT)
        if not directory.exists():
            return
