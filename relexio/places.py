"""Where a trajectory is: a local directory, or an address that fsspec knows (``s3://bucket/run.zarr``, ``gs://`` ...).

All that differs between the two is here. A directory is built beside its final name and renamed. Objects cannot be
renamed: they are written under their final names at once, and the commit marker alone says what exists.
"""

import getpass
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import EACCES
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol
from uuid import uuid4

from zarr.abc.store import ByteRequest, OffsetByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore

from relexio import atomic
from relexio.errors import BusyError, RelexioError, RequestError, StorageError, StoreError

#: Metadata of a Zarr group. That of a store's root carries the commit marker.
METADATA = "zarr.json"
#: No such file has more bytes: the tensor table of 400,000 tensors.
METADATA_BYTES = 64 << 20
#: The object that one writer of a remote store holds.
LOCK = ".relexio-lock"
_URL = re.compile(r"[A-Za-z][\w+.:-]*://")
#: What the network may raise besides OSError, by the module that has it; where that is not loaded, none can come.
_NETWORK = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}


class Place(Protocol):
    """What a store needs of where it is. Cheap to make, to compare, and to pickle."""

    @property
    def address(self) -> str:
        """A path, or a URL without a slash at its end."""

    @property
    def staged(self) -> "Place":
        """Where a new store is built: beside this place, or in it where nothing can be renamed."""

    def below(self, key: str) -> "Place":
        """The place of that name below this one."""

    def exists(self) -> bool:
        """Whether anything is here."""

    def names(self) -> list[str]:
        """The names right below; none where nothing is here."""

    def nbytes(self) -> int:
        """Bytes of all files or objects below; 0 if there are none."""

    def free_bytes(self) -> int | None:
        """Bytes that there is room for; None where nobody knows."""

    def get(self, key: str, most: int = METADATA_BYTES) -> bytes | None:
        """The bytes of one file or object below, ``most`` at most; None if it is not there."""

    def put(self, key: str, data: bytes) -> None:
        """Write one file or object below, of at least a byte: whole, or not at all. A directory must have been made."""

    def make(self) -> None:
        """Make the directory, and those above it, where there are any."""

    def empty(self) -> None:
        """Remove all that is below, and keep what holds the lock."""

    def remove(self) -> None:
        """Remove all that is here, if anything is."""

    def zarr_store(self, read_only: bool) -> ZarrStore:
        """A Zarr store over what is below."""

    def locked(self) -> AbstractContextManager[None]:
        """Hold the one writer's lock. Raises BusyError if another process holds it."""

    def storage_errors(self) -> AbstractContextManager[None]:
        """Turn what the operating system says into StorageErrors, where the place's own methods do not."""

    def settle(self) -> None:
        """Make all below durable, without what a killed writer left half-written."""

    def commit(self, marker: bytes) -> None:
        """Replace the commit marker: durable when this returns, and the old one or the new one at any moment."""

    def publish(self, final: "Place") -> None:
        """Give what was built here its final name. Raises ExistsError if that is taken."""

    def whole(self) -> bool:
        """Whether a result that was built here was finished."""

    def building(self) -> "AbstractContextManager[Place]":
        """Build a result for this place in the place given; it is whole when the context ends without an error."""


def place(address: str | Path) -> Place:
    """The place of an address: a URL for fsspec, else a path. Raises RequestError for a URL that cannot be one."""
    text = str(address)
    if not _URL.match(text):
        return Directory(str(Path(text)))
    if text.startswith("file://"):
        return Directory(str(Path(text.removeprefix("file://"))))
    if set("*?[") & set(text):
        raise RequestError(f"{text}: fsspec takes *, ? and [ for patterns; give the trajectory another name")
    if not _URL.match(text.rstrip("/")):
        raise RequestError(f"{text}: names no trajectory")
    return Remote(text.rstrip("/"))


def local(path: str | Path) -> Path:
    """The path of a checkpoint. Raises RequestError for a URL: those are on local disk."""
    if _URL.match(str(path)):
        raise RequestError(
            f"{path}: only trajectories can be on object storage; give a local directory for checkpoints"
        )
    return Path(path)


def attributes(where: Place) -> dict[str, Any]:
    """The attributes of the Zarr group at a place; none if there is no group."""
    found = _record(where.get(METADATA)).get("attributes")
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Directory:
    """A directory of this machine."""

    address: str

    @property
    def path(self) -> Path:
        """The address as a path."""
        return Path(self.address)

    @property
    def staged(self) -> "Directory":
        """The directory beside it with PARTIAL behind its name."""
        return Directory(str(atomic.staging(self.path)))

    def below(self, key: str) -> "Directory":
        """A directory below."""
        return Directory(str(self.path / key))

    def exists(self) -> bool:
        """Whether there is a file or directory."""
        return self.path.exists()

    def names(self) -> list[str]:
        """The names in it; none if it is not there."""
        return [path.name for path in self.path.iterdir()] if self.path.exists() else []

    def nbytes(self) -> int:
        """Bytes of all files below."""
        return atomic.tree_bytes(self.path)

    def free_bytes(self) -> int:
        """Bytes free on its file system."""
        return atomic.free_bytes(self.path)

    def get(self, key: str, most: int = METADATA_BYTES) -> bytes | None:
        """The bytes of a file below; None if it is not there. Raises StoreError where it has more than ``most``."""
        try:
            with open(os.open(self.path / key, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # no waiting for a pipe
                stat = os.fstat(file.fileno())
                if not S_ISREG(stat.st_mode):
                    return None
                if stat.st_size > most:
                    raise StoreError(
                        f"{self.path / key}: {stat.st_size:,} bytes, which is too many; the store is damaged"
                    )
                return file.read(most)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    def put(self, key: str, data: bytes) -> None:
        """Write a file below, beside its name first."""
        self._put(self.path / key, data, durable=False)

    def _put(self, final: Path, data: bytes, durable: bool) -> None:
        partial = final.with_name(f"{final.name}.{uuid4().hex}.partial")
        try:
            try:
                partial.write_bytes(data)
            except FileNotFoundError:
                self._make_below(final.parent)
                partial.write_bytes(data)
            if durable:
                atomic.sync(partial)
            partial.replace(final)
        except OSError:
            with suppress(OSError):  # what went wrong first is what matters
                partial.unlink(missing_ok=True)
            raise

    def _make_below(self, folder: Path) -> None:
        """Make a directory below; not this one itself: where it is gone meanwhile, nothing takes its name."""
        self.path.stat()
        folder.mkdir(parents=True, exist_ok=True)

    def make(self) -> None:
        """Make it, and the directories above it."""
        self.path.mkdir(parents=True, exist_ok=True)

    def empty(self) -> None:
        """Remove what is in it."""
        atomic.empty_tree(self.path)

    def remove(self) -> None:
        """Remove it."""
        atomic.remove_tree(self.path)

    def zarr_store(self, read_only: bool) -> ZarrStore:
        """Zarr's own store of files; of a directory that is there, since Zarr would make one that has gone."""
        if not read_only:
            self.path.stat()
        return LocalStore(self.address, read_only=read_only)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the kernel's lock on it. Raises BusyError if another process does."""
        return atomic.locked(self.path)

    def storage_errors(self) -> AbstractContextManager[None]:
        """Turn what the operating system says of it into StorageErrors."""
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
        self._put(self.path / METADATA, marker, durable=True)
        atomic.sync(self.path)

    def publish(self, final: Place) -> None:
        """Sync it and rename it. Raises ExistsError if the name is taken."""
        atomic.publish(self.path, Path(final.address))

    def whole(self) -> bool:
        """Whether it is there: it got its name last."""
        return self.path.is_dir()

    @contextmanager
    def building(self) -> Iterator[Place]:
        """Build in a directory beside it that gets its name at the end, unless another was faster."""
        self.path.parent.mkdir(exist_ok=True)
        made = tempfile.mkdtemp(prefix=f"{self.path.name}-", suffix=atomic.PARTIAL, dir=self.path.parent)
        staged = Path(made)
        try:
            with atomic.locked(staged):
                yield Directory(made)
                atomic.sync_tree(staged)
                if not self.path.is_dir():
                    staged.rename(self.path)
        finally:
            atomic.remove_tree(staged)


@dataclass(frozen=True)
class Remote:
    """Objects under a URL. Every method raises StorageError where the storage does not answer, or says no."""

    address: str

    @property
    def staged(self) -> "Remote":
        """Itself: objects cannot be renamed."""
        return self

    def below(self, key: str) -> "Remote":
        """A prefix below."""
        return Remote(f"{self.address}/{key}")

    def exists(self) -> bool:
        """Whether there is an object below, the lock apart."""
        return any(name != LOCK for name in self.names())

    def names(self) -> list[str]:
        """The names right below."""
        files, path = self._files()
        with _told(self.address), suppress(FileNotFoundError):
            files.invalidate_cache()  # another process may have written since
            found = [entry.rstrip("/") for entry in files.ls(path, detail=False)]
            return [entry.rsplit("/", 1)[-1] for entry in found if entry != path]
        return []

    def nbytes(self) -> int:
        """Bytes of all objects below."""
        files, path = self._files()
        with _told(self.address), suppress(FileNotFoundError):
            files.invalidate_cache()
            return sum(entry["size"] for entry in files.find(path, detail=True).values())
        return 0

    def free_bytes(self) -> None:
        """Nobody knows."""
        return

    def get(self, key: str, most: int = METADATA_BYTES) -> bytes | None:
        """The bytes of an object; None if it is not there. (``most`` is not asked for: that would be one more request.)"""
        files, path = self._files(key)
        with _told(self.address), suppress(FileNotFoundError):
            return bytes(files.cat_file(path, start=0))  # s3fs asks for the size first where it is not told a range
        return None

    def put(self, key: str, data: bytes) -> None:
        """Write an object; storage keeps it whole or not at all."""
        files, path = self._files(key)
        with _told(self.address):
            files.pipe_file(path, data)

    def make(self) -> None:
        """Nothing: there are no directories."""

    def empty(self) -> None:
        """Remove all objects but the lock."""
        files, path = self._files()
        with _told(self.address), suppress(FileNotFoundError):
            files.invalidate_cache()
            found, last = files.find(path), f"{path}/{METADATA}"
            first = [e for e in found if e.startswith(f"{path}/") and e not in (last, f"{path}/{LOCK}")]
            if first:
                files.rm(first)
            if last in found:  # it says what the rest is: should this be cut short, the next run can tell
                files.rm_file(last)

    def remove(self) -> None:
        """Remove all objects but the lock, which goes when it is given back."""
        self.empty()

    def zarr_store(self, read_only: bool) -> ZarrStore:
        """Zarr's store of objects."""
        files, path = _asynchronous(self.address)
        return Objects(files, read_only, path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the object LOCK. Raises BusyError, naming the owner, if another process does."""
        mine = _owner()
        self._take(mine)
        try:
            yield
        except BaseException:
            with suppress(StorageError):  # what went wrong first is what matters
                self._give_back(mine)
            raise
        self._give_back(mine)

    def storage_errors(self) -> AbstractContextManager[None]:
        """Nothing more to do: every method tells its own."""
        return nullcontext()

    def settle(self) -> None:
        """Nothing: an object that was written is durable."""

    def commit(self, marker: bytes) -> None:
        """Replace one object, whole."""
        self.put(METADATA, marker)

    def publish(self, final: Place) -> None:
        """Nothing: the commit marker is what makes it exist."""

    def whole(self) -> bool:
        """Whether the group here was marked at the end."""
        return attributes(self).get("whole") is True

    @contextmanager
    def building(self) -> Iterator[Place]:
        """Build in place; the group's metadata with the mark must be written last.

        Nothing is removed first: another process may be building the same from the same data, and what each writes is
        as good as the other's.
        """
        yield self

    def _files(self, key: str = "") -> tuple[Any, str]:
        """The file system that fsspec has for the address, and the path of a key below."""
        with _installed(self.address):
            from fsspec.core import url_to_fs

            files, path = url_to_fs(self.address)
        return files, f"{path}/{key}" if key else path

    def _take(self, mine: bytes) -> None:
        """Create the lock, or raise BusyError."""
        files, path = self._files(LOCK)
        held = self._held()
        if held is None:
            with _told(self.address):
                try:
                    files.pipe_file(path, mine, mode="create")
                except OSError:  # servers say in different words that it is there already
                    held = self.get(LOCK)
                    if held is None:
                        raise
        if held is not None and held != mine:  # our own comes back where a request was sent twice
            raise BusyError(
                f"{self.address}: {_said(held)} is writing it; wait for it to end, or if it has ended already remove the "
                f"object {self.address}/{LOCK}"
            )

    def _held(self) -> bytes | None:
        """The lock's owner, if there is one that may still be running; a lock left by one that is not is removed."""
        held = self.get(LOCK)
        if held is None or not _gone(held):
            return held
        with atomic.locked(Path(tempfile.gettempdir())):  # of all on this host that find it stale, one at a time
            self._give_back(held)
        return self.get(LOCK)

    def _give_back(self, owner: bytes) -> None:
        """Remove the lock, if it is that owner's."""
        files, path = self._files(LOCK)
        if self.get(LOCK) == owner:
            with _told(self.address), suppress(FileNotFoundError):
                files.rm_file(path)


class Objects(FsspecStore):
    """Zarr's store over fsspec, with errors of the network told as StorageErrors."""

    @property
    def root(self) -> str:
        """The address."""
        return str(self.fs.unstrip_protocol(self.path))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value of a key; None if it is not there."""
        with _told(self.root):
            return await super().get(key, prototype, byte_range or OffsetByteRequest(0))  # as in Remote.get

    async def set(self, key: str, value: Buffer, byte_range: tuple[int, int] | None = None) -> None:
        """Write a value."""
        with _told(self.root):
            await super().set(key, value, byte_range)

    async def exists(self, key: str) -> bool:
        """Whether there is such a key."""
        with _told(self.root):
            return await super().exists(key)


@lru_cache(maxsize=64)
def _asynchronous(address: str) -> tuple[Any, str]:
    """The asynchronous file system of an address, and its path there: one for all threads, as fsspec keeps one for each."""
    with _installed(address):
        store = FsspecStore.from_url(address)
    return store.fs, store.path


@contextmanager
def _installed(address: str) -> Iterator[None]:
    """Tell, in one RequestError, that the package for an address is not installed, or that nobody knows such addresses."""
    try:
        yield
    except ImportError as error:
        raise RequestError(f"{address}: {error}; for s3:// that is pip install 'relexio[s3]'") from error
    except ValueError as error:
        raise RequestError(f"{address}: {error}") from error


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Turn what the network and the storage say into one StorageError. A missing object is for the caller to judge."""
    try:
        yield
    except RelexioError:
        raise
    except _network() as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        failure = StorageError(
            f"{address}: {said}; check the address, the credentials and the network, and run it again"
        )
        failure.errno = EACCES if isinstance(error, PermissionError) else getattr(error, "errno", None)
        raise failure from error


def _network() -> tuple[type[Exception], ...]:
    loaded = {sys.modules[module]: names for module, names in _NETWORK.items() if module in sys.modules}
    return (OSError, *(getattr(module, name) for module, names in loaded.items() for name in names))


def _owner() -> bytes:
    """Who holds a lock: this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as containers have them
        user = str(os.getuid())
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "user": user, "time": now}).encode()


def _gone(held: bytes) -> bool:
    """Whether a lock's owner was a process of this host that has ended."""
    owner = _record(held)
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _said(held: bytes) -> str:
    owner = _record(held)
    if not owner:
        return "another process"
    return "process {pid} of {user} on {host}, since {time},".format_map({k: owner.get(k, "?") for k in _FIELDS})


_FIELDS = ("pid", "user", "host", "time")


def _record(held: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(held or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
