"""Reading the moves of a block a tile at a time, so that memory depends on neither block nor window.

theta_t - theta_0, the rows of M, are running sums of increments: M = S F^T, where F has a column for each step of the
groups concerned, and S adds up and picks the steps of a window. F is nearly empty, so it is F that a tile holds.
"""

from collections.abc import Iterator

import numpy as np

from relexio.errors import StoreError
from relexio.store.moves import Moves
from relexio.store.schema import Block, Group, moves_room
from relexio.store.store import Store

#: Bytes of a tile, small enough for the caches.
TILE = 2 << 20


class Cursor:
    """The moves of one group in one block, taken element by element in order, holding one decoded chunk at a time."""

    def __init__(self, store: Store, group: Group, block: Block) -> None:
        self._steps, self._what = len(group.steps), f"{store.shown}: {group.path}/{block.kind.name}/step"
        self._streams = [Stream(store, group, block, name) for name in ("step", "xor")]

    def take(self, count: np.ndarray) -> Moves:
        """The moves of the next elements, which have ``count`` [n] each."""
        total = int(count.sum(dtype=np.int64))
        step, xor = (stream.take(total) for stream in self._streams)
        if step.max(initial=0) >= self._steps:  # it is what rows of F are counted by
            raise StoreError(f"{self._what}: a move at a step that the group does not have; the store is damaged")
        return Moves(count, step, xor)


class Stream:
    """The entries of one block in an array of moves, in order."""

    def __init__(self, store: Store, group: Group, block: Block, name: str) -> None:
        self._store, self._path = store, f"{group.path}/{block.kind.name}/{name}"
        array = store.array(self._path)
        self.chunk = array.chunks[0]
        self._next = block.index * moves_room(store.block, len(group.steps)) // self.chunk
        self._held = np.empty(0, array.dtype)

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` entries."""
        parts = []
        while True:
            parts.append(self._held[:count])
            self._held = self._held[count:]
            count -= len(parts[-1])
            if not count:
                return parts[0] if len(parts) == 1 else np.concatenate(parts)
            self._held = self._store.chunk(self._path, self._next)
            self._next += 1


def observed(store: Store, block: Block, step: int) -> np.ndarray:
    """The element bits [size] of a block at an observed step, exactly as its checkpoint had them."""
    group, column = store.find(step)
    bits = store.base_bits(block)
    for elements, moves in moved(store, group, block):
        until = np.add.reduceat(moves.step <= column, moves.first, dtype=np.intp)  # moves of each element
        any_yet = until > 0
        bits[elements[any_yet]] ^= moves.xor[(moves.first + until - 1)[any_yet]]
    return bits


def moved(store: Store, group: Group, block: Block, most: int = 1 << 17) -> Iterator[tuple[np.ndarray, Moves]]:
    """The elements of a block that move in a group, with their moves, some ``most`` moves at a time."""
    count = store.move_counts(group, block)
    elements = np.flatnonzero(count != 0)
    width = max(1, most // len(group.steps))
    cursor = Cursor(store, group, block)
    for first in range(0, len(elements), width):
        part = elements[first : first + width]
        yield part, cursor.take(count[part])
