"""A disk that is far away: a directory seen through a FUSE file system that answers each read late, at a limited bandwidth.

usage: with slow_disk(source, mountpoint, delay=0.02, bandwidth=200e6): ...

Read-only. Needs Linux, root and /dev/fuse, and no library: it speaks the kernel's own protocol (include/uapi/linux/fuse.h). A read
is answered ``delay`` seconds after it was asked, and the answers share the bandwidth; any number may be in flight, and other calls
are answered at once. Page cache and read-ahead (128 kB unless the system was told otherwise) are the kernel's, as on any disk.
"""

import ctypes
import errno
import os
import queue
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORGET, READLINK, INTERRUPT, DESTROY, BATCH_FORGET = 2, 5, 36, 38, 42
LOOKUP, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = (
    *(1, 3, 14, 15, 17, 18, 25, 26, 27, 28, 29),
)
_ASYNC_READ, _PARALLEL_DIROPS, _MAX_PAGES = 1 << 0, 1 << 18, 1 << 22  # flags of INIT
_KEEP_CACHE = 2  # flag of OPEN
_VALID = 3600  # seconds for which the kernel need not ask again
_READ_ONLY, _NO_DEVICES, _NO_SUID, _DETACH = 1, 4, 2, 2  # flags of mount(2), umount2(2)
_IN_FLIGHT = 256


@contextmanager
def slow_disk(source: Path, mountpoint: Path, delay: float, bandwidth: float) -> Iterator[None]:
    """Show a directory at another place, slowly (seconds, bytes a second), with nothing of it in the page cache; then remove it."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        flags = _READ_ONLY | _NO_DEVICES | _NO_SUID
        if libc.mount(b"slow", os.fsencode(mountpoint), b"fuse.slow", ctypes.c_ulong(flags), options):
            raise OSError(ctypes.get_errno(), "cannot mount a FUSE file system (it needs root)", str(mountpoint))
        serve = [sys.executable, __file__, str(device), str(source), str(delay), str(bandwidth)]
        server = subprocess.Popen(serve, pass_fds=[device])
    finally:
        os.close(device)
    try:
        yield
    finally:
        libc.umount2(os.fsencode(mountpoint), _DETACH)
        server.wait()


class Server:
    """Answers what the kernel asks about a directory."""

    def __init__(self, device: int, source: Path, delay: float, bandwidth: float) -> None:
        self.device, self.delay, self.bandwidth = device, delay, bandwidth
        self.paths = [Path(), source]  # by the kernel's number of a node; 1 is the root
        self.numbers = {source: 1}
        self.reads: queue.SimpleQueue[tuple[float, int, int, int, int]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def run(self) -> None:
        """Until the file system is unmounted."""
        while True:
            try:
                request = os.read(self.device, 1 << 18)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            _, code, unique, node = struct.unpack_from("<IIQQ", request)
            if code not in (FORGET, BATCH_FORGET, INTERRUPT):
                self._handle(code, unique, node, request[40:])

    def _handle(self, code: int, unique: int, node: int, body: bytes) -> None:
        if code == READ:
            handle, offset, size = struct.unpack_from("<QQI", body)
            self.reads.put((time.monotonic(), unique, handle, offset, size))
            return
        try:
            self._reply(unique, self._answer(code, self.paths[node] if code != INIT else Path(), body))
        except OSError as error:
            self._reply(unique, b"", error.errno or errno.EIO)

    def _answer(self, code: int, path: Path, body: bytes) -> bytes:
        if code == INIT:
            flags = _ASYNC_READ | _PARALLEL_DIROPS | _MAX_PAGES
            answer = 7, 31, 1 << 20, flags, _IN_FLIGHT, _IN_FLIGHT, 1 << 12, 1, 256
            return struct.pack("<IIIIHHIIH", *answer).ljust(64, b"\0")
        if code == LOOKUP:
            path /= os.fsdecode(body[:-1])
            attributes = _attributes(path)
            if path not in self.numbers:
                self.numbers[path] = len(self.paths)
                self.paths.append(path)
            return struct.pack("<QQQQII", self.numbers[path], 0, _VALID, _VALID, 0, 0) + attributes
        if code == GETATTR:
            return struct.pack("<QII", _VALID, 0, 0) + _attributes(path)
        if code in (OPEN, OPENDIR):
            return struct.pack("<QII", os.open(path, os.O_RDONLY), _KEEP_CACHE, 0)
        if code in (RELEASE, RELEASEDIR):
            os.close(struct.unpack_from("<Q", body)[0])
            return b""
        if code == READDIR:
            return _entries(path, *struct.unpack_from("<QI", body, 8))
        if code == STATFS:
            found = os.statvfs(path)
            counts = found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree
            return struct.pack("<QQQQQIII", *counts, found.f_bsize, found.f_namemax, found.f_frsize).ljust(80, b"\0")
        if code in (FLUSH, DESTROY):
            return b""
        raise OSError(errno.ENOSYS, "not answered")

    def _read(self) -> None:
        """Answer reads in order, each when its time has come."""
        free = 0.0  # when the line has carried all that was asked before
        while True:
            asked, unique, handle, offset, size = self.reads.get()
            data = os.pread(handle, size, offset)
            free = max(asked + self.delay, free) + len(data) / self.bandwidth
            time.sleep(max(free - time.monotonic(), 0))
            self._reply(unique, data)

    def _reply(self, unique: int, data: bytes, error: int = 0) -> None:
        try:
            os.writev(self.device, [struct.pack("<IiQ", 16 + len(data), -error, unique), data])
        except OSError as problem:  # whoever asked was killed
            if problem.errno not in (errno.ENOENT, errno.ENODEV):
                raise


def _attributes(path: Path) -> bytes:
    found = path.lstat()
    times = [int(t // 10**9) for t in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
    parts = [int(t % 10**9) for t in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
    numbers = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, found.st_blksize, 0)
    return struct.pack("<6Q10I", found.st_ino, found.st_size, found.st_blocks, *times, *parts, *numbers)


def _entries(path: Path, offset: int, size: int) -> bytes:
    out = b""
    for place, entry in enumerate(sorted(os.scandir(path), key=lambda entry: entry.name)):
        name = os.fsencode(entry.name)
        kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
        one = struct.pack("<QQII", entry.inode(), place + 1, len(name), kind) + name
        one += b"\0" * (-len(one) % 8)
        if place >= offset:
            if len(out) + len(one) > size:
                break
            out += one
    return out


if __name__ == "__main__":
    device, source, delay, bandwidth = sys.argv[1:]
    Server(int(device), Path(source), float(delay), float(bandwidth)).run()
