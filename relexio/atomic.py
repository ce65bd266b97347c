"""Stage, fsync, rename: nothing has its final name before it is complete."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from relexio.errors import BusyError, ExistsError, StorageError

#: What the name of anything unfinished ends with. Nobody else uses it, so the next run may remove it.
PARTIAL = ".relexio-partial"
#: Part of the error where a disk lacks inodes, not bytes.
NO_INODES = "no inode"
_TRIES = 100


def staging(path: Path) -> Path:
    """Where ``path`` is built: the same name with PARTIAL at its end."""
    return path.with_name(path.name + PARTIAL)


def publish(staged: Path, final: Path) -> None:
    """Make a finished staging directory durable and give it its name. Raises ExistsError if that is taken."""
    sync_tree(staged)
    taken = ExistsError(f"{final} was created by something else meanwhile; the finished output is in {staged}")
    if final.exists():
        raise taken
    try:
        staged.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise taken from error
        raise
    sync(final.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write one file, durably; nobody sees it before it is complete. Raises ExistsError if its name is taken."""
    write_file(staging(path), path, data, new=True)


def write_file(staged: Path, final: Path, data: bytes, durable: bool = True, new: bool = False) -> None:
    """Write a file under another name and rename it; ``durable`` syncs first its data, then its name. After an error it is removed.

    Raises ExistsError if it is to be ``new`` and its name is taken.
    """
    try:
        staged.write_bytes(data)
        if durable:
            sync(staged)
        if new and final.exists():
            raise ExistsError(f"{final} was created by something else meanwhile; remove it, or give another name")
        staged.replace(final)
        if durable:
            sync(final.parent)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what matters
            staged.unlink(missing_ok=True)
        raise


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """fsync one file or directory."""
    with _opened(path) as fd:
        os.fsync(fd)


def sync_tree(top: Path) -> None:
    """Make a directory and everything below it durable: the whole file system at once where the C library can.

    A store has thousands of small files, and an fsync of each took most of the time of a small conversion.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "syncfs"):
        with _opened(top) as fd:
            if libc.syncfs(fd) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(top))
        return
    for folder, _, files in os.walk(top, topdown=False):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def remove_tree(path: Path) -> None:
    """Remove a directory that this program made, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def empty_tree(directory: Path) -> None:
    """Remove everything in a directory of this program, but keep the directory itself (and a lock on it)."""
    for path in directory.iterdir():
        remove_tree(path)
        path.unlink(missing_ok=True)  # what is no directory


@contextmanager
def locked(directory: Path, make: bool = False) -> Iterator[None]:
    """Hold the one writer's lock of a directory; the kernel drops it when the process ends, however it ends.

    While it is held, no other process that asks for it gives the directory another name, removes it, or makes it anew.
    ``make`` creates it if it does not exist, but none above it. Raises BusyError if another process holds the lock,
    FileNotFoundError if there is no such directory.
    """
    fd = _lock(directory, make)
    try:
        yield
    finally:
        os.close(fd)


def _lock(directory: Path, make: bool) -> int:
    for _ in range(_TRIES):
        if make:
            directory.mkdir(exist_ok=True)
        try:
            fd = _lock_once(directory)
        except FileNotFoundError:
            if not make:
                raise
            continue
        if fd is not None:
            return fd
    raise BusyError(f"{directory}: other processes keep creating and removing it; wait for them to end")


def _lock_once(directory: Path) -> int | None:
    """The locked directory, open; None if what was locked does not have that name any more.

    Its owner may have given it its final name, or removed it, between our opening and our locking it. That lock would
    be worth nothing: the next process makes and locks a new directory of this name.
    """
    fd, held = os.open(directory, os.O_RDONLY), False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            held = os.path.samestat(os.fstat(fd), directory.stat())
        return fd if held else None
    except BlockingIOError as error:
        raise BusyError(f"{directory}: {_holder(fd)} is writing it; wait for it to end") from error
    finally:
        if not held:
            os.close(fd)


def _holder(fd: int) -> str:
    """Who holds the lock on an open file, as far as the system tells."""
    stat = os.fstat(fd)
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    locks = Path("/proc/locks")
    for line in locks.read_text().splitlines() if locks.exists() else ():
        fields = line.split()
        if device in fields and "FLOCK" in fields and int(fields[4]) > 0:
            return f"process {fields[4]}"
    return "another process"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system about ``path`` into one clear StorageError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or not error.errno or type(error).__module__ != "builtins":
            raise
        advice = {
            errno.ENOSPC: _full(path),
            errno.EDQUOT: "the quota is used up: free space and run the same command again",
            errno.EROFS: "the file system is read-only: write elsewhere",
            errno.EACCES: "no permission: check owner and mode",
            errno.EPERM: "no permission: check owner and mode",
        }.get(error.errno, "run the same command again when it is available")
        failure = StorageError(f"{error.filename or path}: {error.strerror}; {advice}")
        failure.errno = error.errno
        raise failure from error


def _full(path: Path) -> str:
    """What to do where a disk is full: it may lack bytes, or inodes, of which every file needs one."""
    disk = os.statvfs(existing_parent(path))
    if disk.f_files and not disk.f_favail:
        return f"{NO_INODES} is left on its disk, and every file needs one: remove files and run the same command again"
    return f"free space on its disk ({free_bytes(path):,} bytes are left) and run the same command again"


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that holds ``path`` or its nearest existing parent."""
    return shutil.disk_usage(existing_parent(path)).free


def tree_bytes(top: Path) -> int:
    """Bytes of all files below a directory that may be read; 0 if it does not exist."""
    total = 0
    for folder, _, names in os.walk(top):
        for name in names:
            with suppress(FileNotFoundError, PermissionError):  # a dead link, a file that has gone meanwhile
                total += Path(folder, name).stat().st_size
    return total


def existing_parent(path: Path) -> Path:
    """The path itself if it exists, else the nearest directory above it that does."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
