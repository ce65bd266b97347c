"""Reading the moves of a block a tile at a time, so that memory depends on neither block nor window.

theta_t - theta_0, the rows of M, are running sums of increments: M = S F^T, where F has a column for each step of the
groups concerned, and S adds up and picks the steps of a window. F is nearly empty, so it is F that a tile holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from relexio.backend import to_device, zeros
from relexio.delta import Moves, gram_of_pairs, increments, owners
from relexio.dtypes import Array
from relexio.errors import StoreError
from relexio.trajectory.schema import Block, Group, moves_room
from relexio.trajectory.store import Store

#: Bytes of a tile, small enough for the caches.
TILE = 2 << 20
#: Steps from which on it pays to tell elements that move seldom from others (measured: 115 or 93 ns an element at T = 40,
#: 1,106 or 230 at 200).
_MANY = 64


@dataclass(frozen=True)
class Rows:
    """Where the steps of a window [T] stand among those of F [R]: for each group first and last, its own, and the window's."""

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
        """S^T w: weights of the window's deltas [T, ...] made weights of increments [R, ...], so that M^T w = F S^T w."""
        found = np.zeros((self.count, *weights.shape[1:]))
        for first, last, held, places in self.parts:
            found[first + held] = weights[places]
            found[first:last] = np.cumsum(found[first:last][::-1], axis=0)[::-1]
        return found


@dataclass(frozen=True)
class Part:
    """The moves of one group in a tile: its columns of F, ``steps`` from ``row`` on, and its elements' places in the tile."""

    row: int
    steps: int
    columns: np.ndarray
    moves: Moves

    @property
    def full(self) -> bool:
        """Whether every element has a move at every step."""
        return len(self.moves.xor) == self.steps * len(self.columns)

    def between(self, first: int, last: int) -> "Part":
        """The part of the tile's elements ``first`` to ``last``."""
        begin, end = np.searchsorted(self.columns, (first, last))
        start = int(self.moves.count[:begin].sum())
        count = self.moves.count[begin:end]
        here = slice(start, start + int(count.sum()))
        moves = Moves(count, self.moves.step[here], self.moves.xor[here])
        return Part(self.row, self.steps, self.columns[begin:end] - first, moves)


@dataclass(frozen=True)
class Tile:
    """Some elements of a block that move: their places in it [n], base bits [n], and their moves in each group."""

    block: Block
    elements: np.ndarray
    base: np.ndarray
    parts: tuple[Part, ...]
    rows: int

    def pieces(self, nbytes: int) -> Iterator["Tile"]:
        """The tile in pieces whose F has about ``nbytes``."""
        width = max(64, nbytes // (8 * self.rows))
        for first in range(0, len(self.elements), width):
            some = slice(first, first + width)
            parts = tuple(part.between(first, first + width) for part in self.parts)
            yield Tile(self.block, self.elements[some], self.base[some], parts, self.rows)

    def increments(self, device: str = "cpu") -> Array:
        """F: float64 [n, R]."""
        found = zeros((len(self.elements), self.rows), device)
        for part in self.parts:
            if not len(part.columns):
                continue
            values, owner = self._values(part, device)
            if part.full and (len(part.columns), part.steps) == found.shape:
                return values.reshape(found.shape)
            step, columns = to_device(part.moves.step, device), to_device(part.columns, device)
            at = columns[part.moves.owner if owner is None else owner] * self.rows
            at += step.astype(np.intp)
            at += part.row
            found.reshape(-1)[at] = values
        return found

    def gram(self, nbytes: int = TILE, device: str = "cpu") -> Array:
        """F^T F [R, R]. On the CPU elements that move seldom are taken by pairs of their moves, else by pieces of F."""
        if device == "cpu" and self.rows >= _MANY:
            number = np.zeros(len(self.elements), np.int64)
            for part in self.parts:
                number[part.columns] += part.moves.count
            # a pair takes some 12 ns, an element's part of F^T F some R (R + 120) / 50
            few = 300 * number * (number + 1) < self.rows * (self.rows + 120)
            if few.any():
                return self._only(few)._gram_of_pairs() + self._only(~few)._gram_of_pieces(nbytes, device)
        return self._gram_of_pieces(nbytes, device)

    def _gram_of_pieces(self, nbytes: int, device: str) -> Array:
        total = zeros((self.rows, self.rows), device)
        for piece in self.pieces(nbytes):
            increments = piece.increments(device)
            total += increments.T @ increments
        return total

    def _only(self, which: np.ndarray) -> "Tile":
        """The elements of a mask [n]."""
        place, parts = np.cumsum(which) - 1, []
        for part in self.parts:
            keep, moves = which[part.columns], part.moves
            kept = np.repeat(keep, moves.count)
            moves = Moves(moves.count[keep], moves.step[kept], moves.xor[kept])
            parts.append(Part(part.row, part.steps, place[part.columns[keep]], moves))
        return Tile(self.block, self.elements[which], self.base[which], tuple(parts), self.rows)

    def _gram_of_pairs(self) -> np.ndarray:
        values = np.concatenate([self._values(part, "cpu")[0] for part in self.parts])
        owner = np.concatenate([part.columns[part.moves.owner] for part in self.parts])
        row = np.concatenate([part.moves.step + np.intp(part.row) for part in self.parts])
        if len(self.parts) > 1:  # moves of one element stand beside each other, in the order of the rows
            order = np.argsort(owner, kind="stable")
            values, owner, row = values[order], owner[order], row[order]
        return gram_of_pairs(values, owner, row, self.rows)

    def weigh(self, weights: np.ndarray, device: str = "cpu") -> Array:
        """F w for weights [R, S]: float64 [n, S]. On the CPU each move is worked on once, and F is never made."""
        if device != "cpu":
            return self.increments(device) @ to_device(weights, device)
        found = np.zeros((len(self.elements), weights.shape[1]))
        for part in self.parts:
            values, weight = self._values(part, "cpu")[0], weights[part.row :][: part.steps]
            if part.full:
                found[part.columns] += values.reshape(-1, part.steps) @ weight
            else:
                for column, w in zip(found.T, weight.T, strict=True):
                    column[part.columns] += np.add.reduceat(w[part.moves.step] * values, part.moves.first)
        return found

    def _values(self, part: Part, device: str) -> tuple[Array, Array | None]:
        """What the part's moves add [E]; from a device, their elements' places [E] too: it finds these itself, to be sent less."""
        base = self.base[part.columns]
        xor, there, first = (to_device(array, device) for array in (part.moves.xor, base, part.moves.first))
        owner = None if device == "cpu" else owners(xor, first)
        bits = xor ^ (np.repeat(base, part.moves.count) if owner is None else there[owner])
        return increments(bits, there, first, self.block.kind), owner


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
            raise StoreError(f"{self._what}: a move at a step that the group does not have; damaged")
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
    store: Store, block: Block, steps: tuple[int, ...], nbytes: int = TILE, base: np.ndarray | None = None
) -> Iterator[Tile]:
    """The moves of a block in the groups that hold any of ``steps``, so many at a time that in float64 they have ``nbytes``.

    Elements that differ from the base at none of these groups' steps are left out: their deltas are zero. ``base`` is
    the block's base bits, where they are at hand.
    """
    groups = [group for group, _, _ in store.columns(steps)]
    counts = [store.move_counts(group, block) for group in groups]
    elements, ends = _cut(counts, nbytes // 8)
    if not len(elements):
        return
    base = store.base_bits(block) if base is None else base
    cursors = [Cursor(store, group, block) for group in groups]
    starts = np.cumsum([0, *(len(group.steps) for group in groups)])
    for some in filter(len, np.split(elements, ends)):
        parts = []
        for group, count, cursor, row in zip(groups, counts, cursors, starts, strict=False):
            here = count[some]
            columns = np.flatnonzero(here != 0)
            if len(columns):
                parts.append(Part(int(row), len(group.steps), columns, cursor.take(here[columns])))
        yield Tile(block, some, base[some], tuple(parts), int(starts[-1]))


def _cut(counts: list[np.ndarray], most: int) -> tuple[np.ndarray, np.ndarray]:
    """The elements that move in any group, and where to cut them so that each piece has about ``most`` moves."""
    total = np.zeros(len(counts[0]), np.uint32)
    for count in counts:
        total += count
    elements = np.flatnonzero(total != 0)  # fast for bool only
    ends = np.cumsum(total[elements])
    return elements, np.searchsorted(ends, np.arange(most, int(ends[-1]) if len(ends) else 0, most))


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
