"""Reading the moves of a block a tile at a time, so that memory depends on neither block nor window.

theta_t - theta_0, the rows of M, are running sums of increments: M = S F, where F has a row for each step of the groups
concerned, and S adds up and picks the rows of a window. F is nearly empty, so it is F that a tile holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from relexio.backend import to_device, zeros
from relexio.delta import Moves, increments, owners
from relexio.dtypes import Array
from relexio.trajectory.schema import Block, Group, moves_room
from relexio.trajectory.store import Store

#: Bytes of a tile, small enough for the caches.
TILE = 2 << 20


@dataclass(frozen=True)
class Rows:
    """Where the steps of a window [T] stand among the rows of F [R]: for each group first and last row, columns, places."""

    count: int
    window: int
    parts: tuple[tuple[int, int, np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, store: Store, steps: tuple[int, ...]) -> "Rows":
        """For any of the store's steps."""
        parts, first = [], 0
        for group, held, places in store.columns(steps):
            parts.append((first, first + len(group.steps), held, places))
            first += len(group.steps)
        return cls(first, len(steps), tuple(parts))

    def sum_up(self, products: np.ndarray) -> np.ndarray:
        """S x: something about increments [R, ...] made one about the window's deltas [T, ...]."""
        found = np.empty((self.window, *products.shape[1:]))
        for first, last, held, places in self.parts:
            found[places] = np.cumsum(products[first:last], axis=0)[held]
        return found

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """S^T w: weights of the window's deltas [T, ...] made weights of increments [R, ...], so that M^T w = F^T S^T w."""
        found = np.zeros((self.count, *weights.shape[1:]))
        for first, last, held, places in self.parts:
            found[first + held] = weights[places]
            found[first:last] = np.cumsum(found[first:last][::-1], axis=0)[::-1]
        return found


@dataclass(frozen=True)
class Part:
    """The moves of one group in a tile: its first row in F, and the places of its elements in the tile [n']."""

    row: int
    columns: np.ndarray
    moves: Moves


@dataclass(frozen=True)
class Tile:
    """Some elements of a block that move: their places in it [n], base bits [n], and their moves in each group."""

    block: Block
    elements: np.ndarray
    base: np.ndarray
    parts: tuple[Part, ...]
    rows: int

    def increments(self, device: str = "cpu") -> Array:
        """F: float64 [R, n]."""
        width = len(self.elements)
        found = zeros((self.rows, width), device)
        for part in self.parts:
            if not len(part.columns):
                continue
            step, columns = to_device(part.moves.step, device), to_device(part.columns, device)
            values, owner = self._values(part, device)
            at = (step.astype(np.intp) + part.row) * width
            at += columns[owner]
            found.reshape(-1)[at] = values
        return found

    def weigh(self, weights: np.ndarray, device: str = "cpu") -> Array:
        """F^T w for weights [R, S]: float64 [S, n]. On the CPU each move is worked on once, and F is never made."""
        if device != "cpu":
            return to_device(weights.T.copy(), device) @ self.increments(device)
        found = np.zeros((weights.shape[1], len(self.elements)))
        for part in self.parts:
            values, first = self._values(part, device)[0], part.moves.first
            if len(first):
                for row, weight in zip(found, weights[part.row :].T, strict=True):
                    row[part.columns] += np.add.reduceat(weight[part.moves.step] * values, first)
        return found

    def _values(self, part: Part, device: str) -> tuple[Array, Array]:
        """What the part's moves add [E], and their elements' places [E]: a device finds these itself, to be sent less."""
        arrays = (part.moves.xor, self.base[part.columns], part.moves.first)
        xor, base, first = (to_device(array, device) for array in arrays)
        owner = part.moves.owner if device == "cpu" else owners(xor, first)
        return increments(xor, base, owner, first, self.block.kind), owner


class Cursor:
    """The moves of one group in one block, taken element by element in order, holding one decoded chunk at a time."""

    def __init__(self, store: Store, group: Group, block: Block) -> None:
        self._streams = [Stream(store, group, block, name) for name in ("step", "xor")]

    def take(self, count: np.ndarray) -> Moves:
        """The moves of the next elements, which have ``count`` [n] each."""
        total = int(count.sum(dtype=np.int64))
        step, xor = (stream.take(total) for stream in self._streams)
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


def tiles(
    store: Store,
    block: Block,
    steps: tuple[int, ...],
    tile_bytes: int = TILE,
    dense: bool = True,
    base: np.ndarray | None = None,
) -> Iterator[Tile]:
    """The moves of a block in the groups that hold any of ``steps``, so many at a time that they have ``tile_bytes``.

    If ``dense``, that is the size of F; else of float64 moves. Elements that differ from the base at none of these
    groups' steps are left out: their deltas are zero. ``base`` is the block's base bits, where they are at hand.
    """
    groups = [group for group, _, _ in store.columns(steps)]
    counts = [store.move_counts(group, block) for group in groups]
    elements = np.flatnonzero(np.logical_or.reduce([count != 0 for count in counts]))  # fast for bool only
    if not len(elements):
        return
    base = store.base_bits(block) if base is None else base
    cursors = [Cursor(store, group, block) for group in groups]
    starts = np.cumsum([0, *(len(group.steps) for group in groups)])
    for some in _pieces(elements, counts, tile_bytes // 8, int(starts[-1]), dense):
        parts = []
        for count, cursor, row in zip(counts, cursors, starts, strict=False):
            here = count[some]
            columns = np.flatnonzero(here != 0)
            parts.append(Part(int(row), columns, cursor.take(here[columns])))
        yield Tile(block, some, base[some], tuple(parts), int(starts[-1]))


def _pieces(elements: np.ndarray, counts: list[np.ndarray], most: int, rows: int, dense: bool) -> Iterator[np.ndarray]:
    """Cut elements so that each piece has about ``most`` numbers in F, or (not ``dense``) moves."""
    if dense:
        width = max(64, most // rows)
        bounds = np.arange(width, len(elements), width)
    else:
        total = np.cumsum(np.sum([count[elements] for count in counts], axis=0, dtype=np.int64))
        bounds = np.searchsorted(total, np.arange(most, total[-1], most))
    yield from filter(len, np.split(elements, bounds))


def observed(store: Store, block: Block, step: int) -> np.ndarray:
    """The element bits [size] of a block at an observed step, exactly as its checkpoint had them."""
    group, column = store.find(step)
    bits = store.base_bits(block)
    for some, moves in moved(store, group, block):
        done = np.add.reduceat(moves.step <= column, moves.first, dtype=np.intp)
        has = done > 0
        bits[some[has]] ^= moves.xor[(moves.first + done - 1)[has]]
    return bits


def moved(store: Store, group: Group, block: Block, most: int = 1 << 17) -> Iterator[tuple[np.ndarray, Moves]]:
    """The elements of a block that move in a group, with their moves, some ``most`` moves at a time."""
    count = store.move_counts(group, block)
    elements = np.flatnonzero(count != 0)
    width = max(1, most // len(group.steps))
    cursor = Cursor(store, group, block)
    for first in range(0, len(elements), width):
        some = elements[first : first + width]
        yield some, cursor.take(count[some])
