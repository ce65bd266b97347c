"""One chunk of an array, straight from its file and back: what Zarr's codecs do, without its event loop.

Blocks of a model are tens of thousands of chunks; read through Zarr, each costs about a millisecond of a core that no
other thread can use meanwhile. The bytes are the same (tests compare both ways).
"""

from math import prod
from typing import Final

import google_crc32c
import numpy as np
from numcodecs import blosc

from relexio.store.schema import Layout
from relexio.store.storage import Location

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


def decode(data: bytes, dtype: np.dtype, count: int) -> np.ndarray:
    """The ``count`` elements of a stored chunk. Raises ValueError where it is not as it was written."""
    packed = np.frombuffer(data, np.uint8)[:-4]
    if len(packed) < _HEADER or google_crc32c.value(packed).to_bytes(4, "little") != data[-4:]:
        raise ValueError("a checksum is wrong")
    if int.from_bytes(data[4:8], "little") != count * dtype.itemsize:
        raise ValueError("a chunk has another size than its array says")
    if int.from_bytes(data[12:16], "little") != len(packed):  # Blosc believes it, and would read on behind the end
        raise ValueError("a chunk has another length than it says")
    values = np.empty(count, dtype)
    try:
        blosc.decompress(packed, values)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return values


def chunk_key(path: str, layout: Layout, *index: int) -> str:
    """Where a chunk is stored; the last numbers of its index may be left out where they are 0."""
    return "/".join(map(str, (path, "c", *index, *[0] * (len(layout.shape) - len(index)))))


def read_chunk(location: Location, path: str, layout: Layout, *index: int) -> np.ndarray:
    """One whole chunk of an array. Raises ValueError where it is missing or damaged."""
    count = prod(layout.chunks)
    data = location.get(chunk_key(path, layout, *index), count * layout.dtype.itemsize + _HEADER + 4)
    if data is None:
        raise ValueError("it is missing")
    return decode(data, layout.dtype, count).reshape(layout.chunks)


def write_chunk(location: Location, path: str, layout: Layout, values: np.ndarray, *index: int) -> None:
    """Write one whole chunk of an array."""
    location.put(chunk_key(path, layout, *index), encode(values.astype(layout.dtype, copy=False)))
