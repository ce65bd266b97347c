"""Reading the deltas of a block a few rows at a time, so that memory depends on neither block nor window."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from relexio.backend import to_device, zeros
from relexio.delta import deltas
from relexio.dtypes import Array
from relexio.trajectory.schema import Block, Group
from relexio.trajectory.store import Store


@dataclass(frozen=True)
class Tile:
    """Some changed elements of a block: their places in it [r], base bits [r], and deltas float64 [r, T]."""

    elements: np.ndarray
    base: Array
    deltas: Array


class Rows:
    """XOR rows of one group in one block, taken in order, holding one decoded chunk at a time."""

    def __init__(self, store: Store, group: Group, block: Block, count: int) -> None:
        self._store = store
        self._path = f"{group.path}/{block.kind.name}/xor"
        self._next = block.index * store.block
        self._end = self._next + count
        self.chunk = store.array(self._path).chunks[0]
        self._held = np.empty((0, len(group.steps)), block.kind.bits)

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` rows [count, K]."""
        parts = []
        while count > 0:
            if not len(self._held):
                stop = min(self._next + self.chunk, self._end)
                self._held = self._store.read(self._path, slice(self._next, stop))
                self._next = stop
            parts.append(self._held[:count])
            self._held = self._held[count:]
            count -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate([self._held[:0], *parts])


def tiles(store: Store, block: Block, steps: tuple[int, ...], rows: int, device: str = "cpu") -> Iterator[Tile]:
    """The deltas of a block at ``steps`` (any subset of the store's), at most ``rows`` changed elements at a time.

    Elements that differ from the base at none of the groups concerned are left out: their deltas are zero.
    """
    parts = store.columns(steps)
    masks = [store.mask(group, block) for group, _, _ in parts]
    union = np.logical_or.reduce(masks)
    elements = np.flatnonzero(union)
    if not len(elements):
        return
    base = store.base_bits(block)
    streams = [
        Rows(store, group, block, int(np.count_nonzero(mask))) for (group, _, _), mask in zip(parts, masks, strict=True)
    ]
    for first in range(0, len(elements), rows):
        some = elements[first : first + rows]
        bits = to_device(base[some], device)
        if len(parts) == 1:
            found = _deltas(streams[0].take(len(some)), parts[0][1], bits, block, device)
        else:
            found = zeros((len(some), len(steps)), device)
            for (_, held, places), mask, stream in zip(parts, masks, streams, strict=True):
                present = np.flatnonzero(mask[some])
                at = to_device(present, device)
                part = _deltas(stream.take(len(present)), held, bits[at], block, device)
                found[at[:, None], to_device(places, device)] = part
        yield Tile(some, bits, found)


def _deltas(rows: np.ndarray, held: np.ndarray, base: Array, block: Block, device: str) -> Array:
    if len(held) != rows.shape[1]:
        rows = rows[:, held]
    return deltas(to_device(rows, device), base, block.kind)


def observed(store: Store, block: Block, step: int) -> np.ndarray:
    """The element bits [size] of a block at an observed step, exactly as its checkpoint had them."""
    group, column = store.find(step)
    bits = store.base_bits(block)
    elements = np.flatnonzero(store.mask(group, block))
    if len(elements):
        rows = Rows(store, group, block, len(elements))
        for first in range(0, len(elements), rows.chunk):
            some = elements[first : first + rows.chunk]
            bits[some] ^= rows.take(len(some))[:, column]
    return bits
