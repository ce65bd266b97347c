"""Which arrays a store has, and how each is laid out (docs/store.md): for code that creates them, and for code that checks them."""

from dataclasses import replace

import numpy as np

from relexio.dtypes import KINDS, Kind
from relexio.store.schema import (
    BASE_CHUNK,
    DIGEST,
    FILE_CHUNK,
    MOVES_CHUNK,
    Group,
    Layout,
    Tensor,
    count_blocks,
    count_type,
    moves_chunk,
    moves_room,
)

_BYTE = np.dtype("u1")


def block_arrays(tensors: tuple[Tensor, ...], block: int, steps: int) -> dict[str, dict[str, Layout]]:
    """By kind and name, the arrays that have a part for every block: of a group of this many steps, or of the base (0 steps)."""
    arrays = _group_arrays if steps else _base_arrays
    return {kind: arrays(KINDS[kind], blocks, block, steps) for kind, blocks in count_blocks(tensors, block).items()}


def _base_arrays(kind: Kind, blocks: int, block: int, _steps: int) -> dict[str, Layout]:
    return {
        "bits": Layout((blocks * block,), (min(block, BASE_CHUNK),), np.dtype(kind.bits), ("element",)),
        "digest": Layout((blocks, DIGEST), (1, DIGEST), _BYTE, ("block", "byte")),
    }


def _group_arrays(kind: Kind, blocks: int, block: int, steps: int) -> dict[str, Layout]:
    number, room, chunk = np.dtype(count_type(steps)), blocks * moves_room(block, steps), moves_chunk(block, steps)
    return {
        "count": Layout((blocks * block,), (block,), number, ("element",)),
        "step": Layout((room,), (chunk,), number, ("move",)),
        "xor": Layout((room,), (chunk,), np.dtype(kind.bits), ("move",)),
        "digest": Layout((blocks, steps, DIGEST), (1, steps, DIGEST), _BYTE, ("block", "step", "byte")),
    }


def changed_array(tensors: int, steps: int) -> Layout:
    """The array of how many elements of each tensor changed at each step: one chunk."""
    return Layout((tensors, steps), (max(tensors, 1), steps), np.dtype("<i8"), ("tensor", "step"))


def file_array(size: int) -> Layout:
    """The array of a file's bytes."""
    return Layout((size,), (max(min(size, FILE_CHUNK), 1),), _BYTE, ("byte",))


def check_layout(layout: Layout, path: str, tensors: tuple[Tensor, ...], block: int, groups: tuple[Group, ...]) -> None:
    """Raise ValueError unless an array is as large, and in chunks of such a size, as its tensors and steps ask for.

    What it says is what will be allocated, and its type what bytes are taken for. An array of a group that is not
    among ``groups`` is being written, and passes.
    """
    top, _, name = path.rpartition("/")
    first = layout.chunks[0]
    group = next((g for g in groups if path.startswith(f"{g.path}/")), None)
    if top.endswith("/files"):
        wanted = file_array(layout.shape[0])
        right = first in (wanted.chunks[0], layout.shape[0])
    elif group is not None and path == f"{group.path}/changed":
        wanted = changed_array(len(tensors), len(group.steps))
        right = first == wanted.chunks[0]
    elif group is None and not path.startswith("base/"):
        return
    else:
        arrays = block_arrays(tensors, block, len(group.steps) if group else 0)[top.rpartition("/")[2]]
        wanted, blocks = arrays[name], arrays["digest"].shape[0]
        room = wanted.shape[0] // blocks  # whoever wrote it chose the chunks of bits and moves
        chosen = name not in ("count", "digest") and room % first == 0 and first <= max(MOVES_CHUNK, block)
        right = chosen or first == wanted.chunks[0]
    if not right or replace(layout, chunks=layout.chunks[1:]) != replace(wanted, chunks=wanted.chunks[1:]):
        raise ValueError(f"its shape {list(layout.shape)[:4]}, chunks or data type do not fit its tensors and steps")
