"""Making groups and arrays with Zarr: standard codecs, checksums. (``chunks`` reads and writes what is in them.)

Zarr is imported where it is needed: it takes a while, and what only reads does without it.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from relexio.store.chunks import BLOCKSIZE, CNAME, LEVEL
from relexio.store.schema import Layout
from relexio.store.storage import locate

if TYPE_CHECKING:
    import zarr


def open_group(address: str, mode: str) -> "zarr.Group":
    """The root group at ``address``, to be written to: ``r+`` for an existing one, ``a`` to create it if needed."""
    zarr = _zarr()
    store = locate(address).zarr_store()
    return zarr.open_group(store, mode=mode, zarr_format=3, use_consolidated=False)


def _zarr() -> Any:
    """Zarr, which imports CuPy where that is installed: with CUDA's libraries some 150 MB that a job on the CPU has no use for."""
    if "zarr" in sys.modules or "cupy" in sys.modules:
        return import_module("zarr")
    sys.modules["cupy"] = None  # type: ignore[assignment]  # hides it from the import below
    try:
        return import_module("zarr")
    finally:
        del sys.modules["cupy"]


def create(group: "zarr.Group", name: str, layout: Layout, overwrite: bool = False) -> None:
    """A new array without chunks: little-endian, Blosc (zstd 1, byte shuffle), crc32c."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    item = layout.dtype.itemsize
    group.create_array(
        name,
        shape=layout.shape,
        chunks=layout.chunks,
        dtype=layout.dtype,
        fill_value=0,
        dimension_names=layout.axes,
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
        overwrite=overwrite,
    )


def has_array(group: "zarr.Group", name: str, layout: Layout) -> bool:
    """Whether a group has an array of that name and layout."""
    found = group.get(name)
    return found is not None and (getattr(found, "shape", None), getattr(found, "chunks", None)) == (
        layout.shape,
        layout.chunks,
    )
