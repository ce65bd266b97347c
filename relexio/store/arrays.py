"""Which arrays a store has, and how each is laid out (docs/store.md): for code that creates them, and for code that checks them."""

from dataclasses import replace

import numpy as np

from relexio.dtypes import KINDS, Kind
from relexio.store.schema import (
    BASE_CHUNK,
    DIGEST,
    FILE_CHUNK,
    MOVES_CHUNK,
    SMALL_CHUNK,
    Layout,
    Segment,
    Tensor,
    count_blocks,
    moves_chunk,
    moves_room,
)

_BYTE, _HASH, _COUNT = np.dtype("u1"), np.dtype("<u8"), np.dtype("<i8")
#: Arrays of which a chunk is bound by its hash in ``hashes``; chunks of all others are bound in the marker.
MOVES = ("when", "by")


def block_arrays(tensors: tuple[Tensor, ...], block: int, columns: int) -> dict[str, dict[str, Layout]]:
    """By kind and name, the arrays that have a part for every block: of a segment of K columns, or of the base (0)."""
    arrays = _segment_arrays if columns else _base_arrays
    return {kind: arrays(KINDS[kind], blocks, block, columns) for kind, blocks in count_blocks(tensors, block).items()}


def _base_arrays(kind: Kind, blocks: int, block: int, _columns: int) -> dict[str, Layout]:
    chunk = min(block, BASE_CHUNK)
    return {
        "bits": Layout((blocks * block,), (chunk,), np.dtype(kind.bits), ("element",)),
        "hashes": _hashes(blocks * (block // chunk)),
        "digest": _small((blocks, DIGEST), _BYTE, ("block", "byte")),
    }


def _segment_arrays(kind: Kind, blocks: int, block: int, columns: int) -> dict[str, Layout]:
    room, chunk = moves_room(block, columns), moves_chunk(block, columns)
    return {
        "when": Layout((blocks * room,), (chunk,), _BYTE, ("gap_byte",)),
        "by": Layout((blocks * room,), (chunk,), np.dtype(kind.bits), ("move",)),
        "index": _small((blocks, len(MOVES)), _COUNT, ("block", "array")),
        "hashes": _hashes(blocks * len(MOVES) * (room // chunk)),
        "digest": _small((blocks, columns, DIGEST), _BYTE, ("block", "column", "byte")),
    }


def _hashes(chunks: int) -> Layout:
    return Layout((chunks,), (min(chunks, SMALL_CHUNK // _HASH.itemsize),), _HASH, ("chunk",))


def _small(shape: tuple[int, ...], dtype: np.dtype, axes: tuple[str, ...]) -> Layout:
    """An array of something for each block, so many blocks a chunk that it has a MiB, or one."""
    each = int(np.prod(shape[1:])) * dtype.itemsize
    return Layout(shape, (min(shape[0], max(1, SMALL_CHUNK // each)), *shape[1:]), dtype, axes)


def changed_array(tensors: int, columns: int) -> Layout:
    """The array of how many elements of each tensor differ from the base in each state: one chunk."""
    return Layout((tensors, columns), (max(tensors, 1), columns), _COUNT, ("tensor", "column"))


def file_array(size: int, path: str = "") -> Layout:
    """The array of a file's bytes. Its dimension has its own name: xarray wants one length for a name in a group."""
    axis = f"byte_{path.rpartition('/')[2]}"
    return Layout((size,), (max(min(size, FILE_CHUNK), 1),), _BYTE, (axis,))


def check_layout(
    layout: Layout, path: str, tensors: tuple[Tensor, ...], block: int, segments: tuple[Segment, ...]
) -> None:
    """Raise ValueError unless an array is as large, and in chunks of such a size, as its tensors and columns ask for.

    What it says is what will be allocated, and its type what bytes are taken for. An array of a segment that is not
    among ``segments`` is being written, and passes.
    """
    top, _, name = path.rpartition("/")
    first = layout.chunks[0]
    segment = next((s for s in segments if path.startswith(f"{s.path}/")), None)
    if top == "files":
        wanted = file_array(layout.shape[0], path)
        right = first in (wanted.chunks[0], layout.shape[0])
    elif segment is not None and path == f"{segment.path}/changed":
        wanted = changed_array(len(tensors), segment.columns)
        right = first == wanted.chunks[0]
    elif segment is None and not path.startswith("base/"):
        return
    else:
        arrays = block_arrays(tensors, block, segment.columns if segment else 0)[top.rpartition("/")[2]]
        wanted, blocks = arrays[name], arrays["digest"].shape[0]
        if name == "hashes":  # as many as there are chunks, whose size was the writer's choice
            right = layout.shape[0] % blocks == 0 and first == min(layout.shape[0], SMALL_CHUNK // _HASH.itemsize)
            wanted = replace(wanted, shape=layout.shape)
        elif name in ("bits", *MOVES):
            right = (wanted.shape[0] // blocks) % first == 0 and first <= max(MOVES_CHUNK, block)
        else:
            right = first == wanted.chunks[0]
    if not right or replace(layout, chunks=layout.chunks[1:]) != replace(wanted, chunks=wanted.chunks[1:]):
        raise ValueError(f"its shape {list(layout.shape)[:4]}, chunks or data type do not fit its tensors and columns")
