"""One chunk of an array, straight from its file and back: what Zarr's codecs do, without its event loop.

Blocks of a model are tens of thousands of chunks; read through Zarr, each costs about a millisecond of a core that no
other thread can use meanwhile. The bytes are the same (tests compare both ways).
"""

from typing import Final

import google_crc32c
import numpy as np
from numcodecs import blosc

CNAME: Final = "zstd"
LEVEL, BLOCKSIZE = 1, 1 << 20
_HEADER = 16  # bytes of Blosc's


def encode(values: np.ndarray) -> bytes:
    """A whole chunk as it is stored: little-endian, Blosc, crc32c."""
    shuffle = blosc.SHUFFLE if values.itemsize > 1 else blosc.NOSHUFFLE
    packed = blosc.compress(
        np.ascontiguousarray(values), CNAME.encode(), LEVEL, shuffle, BLOCKSIZE, typesize=values.itemsize
    )
    return packed + google_crc32c.value(packed).to_bytes(4, "little")


def most_bytes(dtype: np.dtype, count: int) -> int:
    """The bytes that a stored chunk of so many elements has at most."""
    return count * dtype.itemsize + _HEADER + 4


def decode(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    """The ``count`` elements of a stored chunk. Raises ValueError where its checksum is wrong or its size another."""
    packed = np.frombuffer(data, np.uint8)[:-4]
    if len(packed) < _HEADER or google_crc32c.value(packed).to_bytes(4, "little") != data[-4:]:
        raise ValueError("a checksum is wrong")
    if int.from_bytes(data[4:8], "little") != count * dtype.itemsize:
        raise ValueError("a chunk has another size than its array says")
    if int.from_bytes(data[12:16], "little") != len(packed):  # Blosc believes it, and would read on behind the end
        raise ValueError("a chunk has another length than it says")
    found = np.empty(count, dtype)
    blosc.decompress(packed, found)
    return found
