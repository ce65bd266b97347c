"""What changed in one tensor from a version to the next: a zstd frame, as slime, miles and SkyRL write it.

``xor`` holds new XOR old for every byte of the tensor. ``overwrite`` holds the number of bytes that changed (u4), their
positions (u4 each, ascending), and then their new values.
"""

import hashlib
import zlib
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import xxhash
from numcodecs import zstd

from relexio.errors import CheckpointError

XOR, OVERWRITE = "xor", "overwrite"
_MAGIC = b"\x28\xb5\x2f\xfd"
#: Bytes of a frame that hold its size.
HEAD = 18
_POSITION, _MOST = 4, 5  # bytes of a position in ``overwrite``, and of a change


class Patch(NamedTuple):
    """Where the frame of a tensor is: a file of its version (by its number), and the checksum of what it makes."""

    file: int
    start: int
    nbytes: int
    checksum: str


class Hasher(Protocol):
    """A checksum that is fed piece by piece."""

    def update(self, data: memoryview, /) -> object:
        """Go on with these bytes."""

    def hexdigest(self) -> str:
        """The checksum of all bytes so far."""


class _Adler32:
    def __init__(self) -> None:
        self._value = 1

    def update(self, data: memoryview, /) -> None:
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _blake3() -> Hasher:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise CheckpointError("its checksums are blake3: pip install blake3, and run again") from error
    return blake3()


#: The checksums of the three libraries, by the names that they give them.
CHECKSUMS: dict[str, Callable[[], Hasher]] = {
    "xxh3-128": xxhash.xxh3_128,
    "adler32": _Adler32,
    "sha256": hashlib.sha256,
    "blake3": _blake3,
}


def unpacked_bytes(head: bytes, encoding: str, nbytes: int) -> int:
    """The bytes that a patch of a tensor of ``nbytes`` says it unpacks to (the frame's header: RFC 8878, 3.1.1.1).

    Raises CheckpointError, which names no file, if it is no frame that says so, or they are more than such a tensor takes.
    """
    if head[:4] != _MAGIC or len(head) < 6:
        raise CheckpointError("is no zstd frame")
    descriptor = head[4]
    single, dictionary = bool(descriptor & 0x20), (0, 1, 2, 4)[descriptor & 3]
    length = (int(single), 2, 4, 8)[descriptor >> 6]
    first = 5 + (not single) + dictionary
    field = head[first : first + length]
    if not length or len(field) < length:
        raise CheckpointError("is a zstd frame that does not say its size")
    size = int.from_bytes(field, "little") + 256 * (length == 2)
    least, most = (nbytes, nbytes) if encoding == XOR else (_POSITION, _POSITION + _MOST * nbytes)
    if not least <= size <= most:
        raise CheckpointError(f"unpacks to {size:,} bytes, and {nbytes:,} bytes of tensor take {most:,}")
    return size


class Changes:
    """A patch that was unpacked, for a tensor of ``nbytes``. Raises CheckpointError, which names no file, if it fits none."""

    def __init__(self, frame: bytes, encoding: str, nbytes: int) -> None:
        data = np.empty(size := unpacked_bytes(frame[:HEAD], encoding, nbytes), np.uint8)
        try:
            zstd.decompress(frame, data)
        except RuntimeError as error:
            raise CheckpointError("is a damaged zstd frame") from error
        self._xor = data if encoding == XOR else None
        if encoding == OVERWRITE:
            count = int.from_bytes(data[:_POSITION].tobytes(), "little")
            if size != _POSITION + _MOST * count:
                raise CheckpointError(f"has {size:,} bytes where {count:,} changes take {_POSITION + _MOST * count:,}")
            self._positions = data[_POSITION : _POSITION * (1 + count)].view("<u4")
            self._values = data[_POSITION * (1 + count) :]
            if (self._positions[1:] <= self._positions[:-1]).any() or (count and self._positions[-1] >= nbytes):
                raise CheckpointError(f"has positions that do not ascend, or lie beyond the tensor's {nbytes:,} bytes")

    def differences(self, first: int, old: np.ndarray) -> np.ndarray:
        """New XOR old of some bytes, from the tensor's byte ``first`` on, of which ``old`` are those before: uint8 [n]."""
        if self._xor is not None:
            return self._xor[first : first + len(old)]
        low, high = (bisect_left(self._positions, at) for at in (first, first + len(old)))
        differences, places = np.zeros_like(old), self._positions[low:high].astype(np.int64) - first
        differences[places] = self._values[low:high] ^ old[places]
        return differences
