"""What checkpoints in files share: files that are kept open, and reads that end only when all bytes are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

from relexio.checkpoints.protocol import Checkpoint
from relexio.errors import CheckpointError

#: Bytes that are read ahead at most, and by one advice: Linux takes no more than it does by itself, mostly 128 kB.
_AHEAD, _PORTION = 1 << 25, 1 << 17


class OnDisk(Checkpoint):
    """A checkpoint whose bytes are read from ``files``."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def descriptor(self, path: Path, start: int, nbytes: int) -> int:
        """A descriptor of one of its files, to be closed, with these bytes, or the first of them, read ahead."""
        fd = os.dup(self._open[path]) if path in self._open else os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # of hundreds of files small pieces are read in turn
            end = start + min(nbytes, _AHEAD)
            for at in range(start - start % PAGESIZE, end, _PORTION):
                os.posix_fadvise(fd, at, min(_PORTION, end - at), os.POSIX_FADV_WILLNEED)
        return fd

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Let it be read to its end, though a trainer removes its files meanwhile: in this process only."""
        try:
            for file in self.files:
                self._open[file.path] = os.open(file.path, os.O_RDONLY)
            yield
        finally:
            while self._open:
                os.close(self._open.popitem()[1])

    def _stat(self, file: Path) -> os.stat_result:
        return os.fstat(self._open[file]) if file in self._open else file.stat()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def read_exactly(fd: int, start: int, out: memoryview, path: Path) -> None:
    """Fill ``out`` with the file's bytes from ``start`` on. Raises CheckpointError if the file ends before."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], start + done)
        if count == 0:
            raise CheckpointError(f"{path}: ended while it was read: its header says more bytes; copy it again")
        done += count
