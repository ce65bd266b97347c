"""Zarr as this project uses it: standard codecs, checksums, and a missing chunk is damage, never zeros."""

from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from relexio.dtypes import Kind
from relexio.errors import StoreError
from relexio.store.chunks import BLOCKSIZE, CNAME, LEVEL
from relexio.store.schema import BASE_CHUNK, DIGEST, count_type, moves_chunk, moves_room
from relexio.store.storage import place
from relexio.words import shown

#: A Zarr array of any metadata version.
AnyArray = zarr.Array[Any]


#: What Zarr looks for and may miss: metadata of nodes, and of the older format.
_OPTIONAL = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")


class StrictStore(WrapperStore[Any]):
    """A Zarr store in which reading a chunk that is not there is an error."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The value of a key; raises StoreError for a missing chunk."""
        value = await super().get(key, prototype, byte_range)
        if value is None and not key.endswith(_OPTIONAL):
            raise StoreError(f"{shown(str(self._store.root))}: chunk {key} is missing; the store is damaged")
        return value


def open_group(address: str, mode: str, attributes: dict[str, Any] | None = None) -> zarr.Group:
    """The root group at ``address``: mode ``r``, ``r+``, ``a``, or ``w-``, which makes it with those attributes."""
    store = StrictStore(place(address).zarr_store(read_only=mode == "r"))
    if mode == "w-":
        return zarr.create_group(store, zarr_format=3, attributes=attributes)
    return zarr.open_group(store, mode=mode, zarr_format=3, use_consolidated=False)  # type: ignore[arg-type]


def create(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, names: tuple[str, ...]
) -> AnyArray:
    """A new array: little-endian, Blosc (zstd 1, byte shuffle), crc32c, every written chunk kept."""
    item = np.dtype(dtype).itemsize
    return group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(1, c) for c in chunks),
        dtype=dtype,
        fill_value=0,
        dimension_names=names,
        compressors=[
            BloscCodec(
                cname=CNAME,
                clevel=LEVEL,
                shuffle="shuffle" if item > 1 else "noshuffle",
                typesize=item,
                blocksize=BLOCKSIZE,
            ),
            Crc32cCodec(),
        ],
        config={"write_empty_chunks": True},
    )


def create_base(base: zarr.Group, kind: Kind, blocks: int, block: int) -> None:
    """The arrays of the base for one kind: ``bits`` [blocks * block] and ``digest`` [blocks, 16]."""
    group = base.create_group(kind.name)
    create(group, "bits", (blocks * block,), (min(block, BASE_CHUNK),), kind.bits, ("element",))
    create(group, "digest", (blocks, DIGEST), (1, DIGEST), "|u1", ("block", "byte"))


def create_steps(steps: zarr.Group, kind: Kind, blocks: int, block: int, count: int) -> None:
    """The arrays of a group of ``count`` steps for one kind (docs/store.md)."""
    group, number = steps.create_group(kind.name), count_type(count)
    room, chunk = blocks * moves_room(block, count), moves_chunk(block, count)
    create(group, "count", (blocks * block,), (block,), number, ("element",))
    create(group, "step", (room,), (chunk,), number, ("move",))
    create(group, "xor", (room,), (chunk,), kind.bits, ("move",))
    create(group, "digest", (blocks, count, DIGEST), (1, count, DIGEST), "|u1", ("block", "step", "byte"))
