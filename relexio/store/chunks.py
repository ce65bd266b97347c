"""One chunk of an array, straight from its file and back: what Zarr's codecs do, without its event loop.

Blocks of a model are tens of thousands of chunks; read through Zarr, each costs about a millisecond of a core that no
other thread can use meanwhile. The bytes are the same (tests compare both ways).
"""

from math import prod
from typing import Final

import google_crc32c
import numpy as np
from numcodecs import blosc
from xxhash import xxh3_64_intdigest

from relexio.store.schema import Layout
from relexio.store.seal import hash_of
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


def short_hash(data: bytes) -> int:
    """What binds a chunk of bits or moves to its place: XXH3 of its file, 64 bits."""
    return xxh3_64_intdigest(data)


def load_chunk(location: Location, path: str, layout: Layout, *index: int) -> bytes:
    """The file of one chunk. Raises ValueError where it is missing."""
    most = prod(layout.chunks) * layout.dtype.itemsize + _HEADER + 4
    data = location.get(chunk_key(path, layout, *index), most)
    if data is None:
        raise ValueError("it is missing")
    return data


def require_chunk(location: Location, path: str, layout: Layout, *index: int, known: str | int | None) -> bytes:
    """The file of one chunk. Raises ValueError where it is missing, or has not the hash that is known."""
    data = load_chunk(location, path, layout, *index)
    if known is not None and known != (hash_of(data) if isinstance(known, str) else short_hash(data)):
        raise ValueError("it is not the one that was written there")
    return data


def read_chunk(
    location: Location, path: str, layout: Layout, *index: int, known: str | int | None = None
) -> np.ndarray:
    """One whole chunk of an array. Raises ValueError where it is missing or damaged, or has not the hash that is known."""
    data = require_chunk(location, path, layout, *index, known=known)
    return decode(data, layout.dtype, prod(layout.chunks)).reshape(layout.chunks)


def write_chunk(location: Location, path: str, layout: Layout, values: np.ndarray, *index: int) -> int:
    """Write one whole chunk of an array, and give its hash."""
    data = encode(values.astype(layout.dtype, copy=False))
    location.put(chunk_key(path, layout, *index), data)
    return short_hash(data)
