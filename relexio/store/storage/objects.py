"""A trajectory as objects under a URL that fsspec knows."""

import getpass
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relexio import atomic
from relexio.errors import BusyError, RequestError, StorageError
from relexio.store.storage.network import storage_errors_of
from relexio.store.storage.protocol import METADATA, METADATA_BYTES, Location, attributes, parse_record
from relexio.words import shown, without_secrets

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

#: The object that one writer of a remote store holds.
LOCK = ".relexio-lock"


@dataclass(frozen=True)
class ObjectStorage:
    """Objects under a URL. Every method raises StorageError where the storage does not answer, or says no."""

    address: str

    def __repr__(self) -> str:
        return f"Remote({self.shown!r})"

    @property
    def shown(self) -> str:
        return shown(self.address)

    @property
    def staged(self) -> "ObjectStorage":
        """Itself: objects cannot be renamed."""
        return self

    def below(self, key: str) -> "ObjectStorage":
        return ObjectStorage(f"{self.address}/{key}")

    def exists(self) -> bool:
        return any(name != LOCK for name in self.names())

    def names(self) -> list[str]:
        files, path = self._files()
        with storage_errors_of(self.address), suppress(FileNotFoundError):
            files.invalidate_cache()  # another process may have written since
            entries = [entry.rstrip("/") for entry in files.ls(path, detail=False)]
            return [entry.rsplit("/", 1)[-1] for entry in entries if entry != path]
        return []

    def nbytes(self) -> int:
        files, path = self._files()
        with storage_errors_of(self.address), suppress(FileNotFoundError):
            files.invalidate_cache()
            found = {name: entry["size"] for name, entry in files.find(path, detail=True).items()}
            untold = [name for name, size in found.items() if size is None]  # a listing over http:// has names alone
            more = files.sizes(untold) if untold else []
            return sum(size or 0 for size in (*found.values(), *more))
        return 0

    def free_bytes(self) -> None:
        return

    def get(self, key: str, most: int = METADATA_BYTES) -> bytes | None:
        files, path = self._files(key)
        with storage_errors_of(self.address), suppress(FileNotFoundError):
            return bytes(files.cat_file(path, start=0))  # s3fs asks for the size first where it is not told a range
        return None

    def put(self, key: str, data: bytes) -> None:
        files, path = self._files(key)
        with storage_errors_of(self.address):
            files.pipe_file(path, data)

    def discard(self, key: str) -> None:
        files, path = self._files(key)
        with storage_errors_of(self.address), suppress(FileNotFoundError):
            files.rm_file(path)

    def make(self) -> None:
        """Nothing: there are no directories."""

    def empty(self) -> None:
        files, path = self._files()
        with storage_errors_of(self.address), suppress(FileNotFoundError):
            files.invalidate_cache()
            entries, last = files.find(path), f"{path}/{METADATA}"
            first = [e for e in entries if e.startswith(f"{path}/") and e not in (last, f"{path}/{LOCK}")]
            if first:
                files.rm(first)
            if last in entries:  # it says what the rest is: should this be cut short, the next run can tell
                files.rm_file(last)

    def remove(self) -> None:
        """Remove all objects but the lock, which goes when it is given back."""
        self.empty()

    def zarr_store(self) -> "ZarrStore":
        from relexio.store.storage.zarr_objects import Objects

        files, path = _asynchronous(self.address)
        return Objects(files, path=path)

    @contextmanager
    def locked(self, make: bool = False) -> Iterator[None]:
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
        return nullcontext()  # every method tells its own

    def settle(self) -> None:
        """Nothing: an object that was written is durable."""

    def commit(self, marker: bytes) -> None:
        self.put(METADATA, marker)

    def publish(self, final: Location) -> None:
        """Nothing: the commit marker is what makes it exist."""

    def whole(self) -> bool:
        return attributes(self).get("whole") is True  # it is marked at the end

    def readable(self) -> bool:
        return True  # who may read one object of a result may read them all

    @contextmanager
    def building(self) -> Iterator[Location]:
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
            with storage_errors_of(self.address):
                try:
                    files.pipe_file(path, mine, mode="create")
                except OSError:  # servers say in different words that it is there already
                    held = self.get(LOCK)
                    if held is None:
                        raise
        if held is not None and held != mine:  # our own comes back where a request was sent twice
            raise BusyError(
                f"{self.shown}: {_describe(held)} is writing it; wait for it to end, or if it has already ended, remove the "
                f"object {self.shown}/{LOCK}"
            )

    def _held(self) -> bytes | None:
        """The lock's owner, if there is one that may still be running; a lock left by one that is not is removed."""
        held = self.get(LOCK)
        if held is None or not _owner_has_ended(held):
            return held
        with atomic.locked(Path(tempfile.gettempdir())):  # of all on this host that find it stale, one at a time
            self._give_back(held)
        return self.get(LOCK)

    def _give_back(self, owner: bytes) -> None:
        """Remove the lock, if it is that owner's."""
        files, path = self._files(LOCK)
        if self.get(LOCK) == owner:
            with storage_errors_of(self.address), suppress(FileNotFoundError):
                files.rm_file(path)


@lru_cache(maxsize=64)
def _asynchronous(address: str) -> tuple[Any, str]:
    """The asynchronous file system of an address, and its path there: one for all threads, as fsspec keeps one for each."""
    from zarr.storage import FsspecStore

    with _installed(address):
        store = FsspecStore.from_url(address)
    return store.fs, store.path


@contextmanager
def _installed(address: str) -> Iterator[None]:
    """Tell, in one RequestError, that the package for an address is not installed, or that nobody knows such addresses."""
    try:
        yield
    except (ImportError, ValueError) as error:
        advice = "; for s3:// that is pip install 'relexio[s3]'" if isinstance(error, ImportError) else ""
        raise RequestError(without_secrets(f"{address}: {error}", address) + advice) from error


def _owner() -> bytes:
    """Who holds a lock: this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as containers have them
        user = str(os.getuid())
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "user": user, "time": now}).encode()


def _owner_has_ended(held: bytes) -> bool:
    """Whether a lock's owner was a process of this host that has ended."""
    owner = parse_record(held)
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError, OverflowError) as error:
        return isinstance(error, ProcessLookupError)
    return False


def _describe(lock: bytes) -> str:
    owner = parse_record(lock)
    if not owner:
        return "another process"
    values = {key: owner.get(key, "?") for key in ("pid", "user", "host", "time")}
    return "process {pid} of {user} on {host}, since {time},".format_map(values)
