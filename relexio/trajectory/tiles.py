"""Reading the deltas of a block a tile at a time, so that memory depends on neither block nor window."""

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
    """Some changed elements of a block: their places in it [r], base bits [r], and deltas float64 [T, r]."""

    elements: np.ndarray
    base: Array
    deltas: Array


class Changes:
    """XOR bits of one group in one block, taken element by element in order, holding one decoded chunk at a time."""

    def __init__(self, store: Store, group: Group, block: Block, count: int) -> None:
        self._store = store
        self._path = f"{group.path}/{block.kind.name}/xor"
        self._next = block.index * store.block
        self._end = self._next + count
        self.chunk = store.array(self._path).chunks[1]
        self._held = np.empty((len(group.steps), 0), block.kind.bits)

    def take(self, count: int) -> np.ndarray:
        """The XOR bits [K, count] of the next ``count`` changed elements."""
        parts = []
        while count > 0:
            if not self._held.shape[1]:
                stop = min(self._next + self.chunk, self._end)
                self._held = self._store.read(self._path, (slice(None), slice(self._next, stop)))
                self._next = stop
            parts.append(self._held[:, :count])
            self._held = self._held[:, count:]
            count -= parts[-1].shape[1]
        return parts[0] if len(parts) == 1 else np.concatenate([self._held[:, :0], *parts], axis=1)


def tiles(store: Store, block: Block, steps: tuple[int, ...], width: int, device: str = "cpu") -> Iterator[Tile]:
    """The deltas of a block at ``steps`` (any subset of the store's), at most ``width`` changed elements at a time.

    Elements that differ from the base at none of the groups concerned are left out: their deltas are zero.
    """
    parts = store.columns(steps)
    masks = [store.mask(group, block) for group, _, _ in parts]
    elements = np.flatnonzero(np.logical_or.reduce(masks))
    if not len(elements):
        return
    base = store.base_bits(block)
    streams = [
        Changes(store, group, block, int(np.count_nonzero(mask)))
        for (group, _, _), mask in zip(parts, masks, strict=True)
    ]
    for first in range(0, len(elements), width):
        some = elements[first : first + width]
        bits = to_device(base[some], device)
        if len(parts) == 1:
            found = _deltas(streams[0].take(len(some)), parts[0][1], bits, block, device)
        else:
            found = zeros((len(steps), len(some)), device)
            for (_, held, places), mask, stream in zip(parts, masks, streams, strict=True):
                present = np.flatnonzero(mask[some])
                at = to_device(present, device)
                part = _deltas(stream.take(len(present)), held, bits[at], block, device)
                found[to_device(places, device)[:, None], at] = part
        yield Tile(some, bits, found)


def _deltas(xor: np.ndarray, held: np.ndarray, base: Array, block: Block, device: str) -> Array:
    if len(held) != len(xor):
        xor = xor[held]
    return deltas(to_device(xor, device), base, block.kind)


def observed(store: Store, block: Block, step: int) -> np.ndarray:
    """The element bits [size] of a block at an observed step, exactly as its checkpoint had them."""
    group, column = store.find(step)
    bits = store.base_bits(block)
    elements = np.flatnonzero(store.mask(group, block))
    changes = Changes(store, group, block, len(elements))
    for first in range(0, len(elements), changes.chunk):
        some = elements[first : first + changes.chunk]
        bits[some] ^= changes.take(len(some))[column]
    return bits
