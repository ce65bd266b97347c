"""Arithmetic on a tile of a block, on NumPy or CuPy arrays: what its moves add up to, as F, F^T F or F w."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from relexio.dtypes import Array, Kind, to_float64
from relexio.engine.device import to_device, zeros
from relexio.store.moves import Moves
from relexio.store.read import TILE, Cursor
from relexio.store.schema import Block
from relexio.store.store import Store

#: Steps from which on it pays to tell elements that move seldom from others (measured: 115 or 93 ns an element at T = 40,
#: 1,106 or 230 at 200).
_MANY = 64


def owners(moves: Array, first: Array) -> Array:
    """The place of each move's element [E] from where the elements' first moves are [n], on whichever device these are."""
    begins = np.zeros_like(moves, np.int32)
    begins[first] = 1
    return np.cumsum(begins, dtype=np.int32) - np.int32(1)


def increments(bits: Array, base: Array, first: Array, kind: Kind) -> Array:
    """What each move adds to its element: bits from it on [E] and base bits [n] to float64 [E].

    The difference is taken in float64, where those of bf16 and fp16 are exact and those of fp32 nearly always.
    """
    values = to_float64(bits, kind)
    added = values.copy()
    added[1:] -= values[:-1]
    added[first] = values[first] - to_float64(base, kind)
    return added


def gram_of_pairs(values: np.ndarray, owner: np.ndarray, row: np.ndarray, rows: int) -> np.ndarray:
    """F^T F [R, R] from increments [E], their elements (ascending) and rows: every pair of moves of an element, once."""
    total = np.zeros(rows * rows)
    left = np.arange(len(values))
    lag = 0
    while len(left):
        right = left + lag
        total += np.bincount(row[left] * rows + row[right], values[left] * values[right], rows * rows)
        lag += 1
        left = left[: np.searchsorted(left, len(values) - lag)]
        left = left[owner[left] == owner[left + lag]]
    upper = total.reshape(rows, rows)
    return upper + upper.T - np.diag(np.diag(upper))


@dataclass(frozen=True)
class Rows:
    """Where the steps of a window [T] stand among those of F [R].

    ``groups`` has for each its first and last row, its columns in the window, and their places there.
    """

    count: int
    window: int
    groups: tuple[tuple[int, int, np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, store: Store, steps: tuple[int, ...]) -> "Rows":
        """For any of the store's steps."""
        groups, first = [], 0
        for group, columns, places in store.columns(steps):
            groups.append((first, first + len(group.steps), columns, places))
            first += len(group.steps)
        return cls(first, len(steps), tuple(groups))

    def sum_up(self, products: np.ndarray) -> np.ndarray:
        """S x: turns values of increments [R, ...] into values of the window's deltas [T, ...]."""
        sums = np.empty((self.window, *products.shape[1:]))
        for first, last, columns, places in self.groups:
            sums[places] = np.cumsum(products[first:last], axis=0)[columns]
        return sums

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """S^T w: turns weights of the window's deltas [T, ...] into weights of increments [R, ...], so that M^T w = F S^T w."""
        spread = np.zeros((self.count, *weights.shape[1:]))
        for first, last, columns, places in self.groups:
            spread[first + columns] = weights[places]
            spread[first:last] = np.cumsum(spread[first:last][::-1], axis=0)[::-1]
        return spread


@dataclass(frozen=True)
class GroupMoves:
    """The moves of one group in a tile: rows of F, ``steps`` from ``row`` on; the elements' places in the tile; the moves."""

    row: int
    steps: int
    elements: np.ndarray
    moves: Moves

    @property
    def full(self) -> bool:
        """Whether every element has a move at every step."""
        return len(self.moves.xor) == self.steps * len(self.elements)

    def between(self, first: int, last: int) -> "GroupMoves":
        """Those of the tile's elements ``first`` to ``last``."""
        begin, end = np.searchsorted(self.elements, (first, last))
        start = int(self.moves.count[:begin].sum())
        count = self.moves.count[begin:end]
        span = slice(start, start + int(count.sum()))
        moves = Moves(count, self.moves.step[span], self.moves.xor[span])
        return GroupMoves(self.row, self.steps, self.elements[begin:end] - first, moves)

    def only(self, mask: np.ndarray, places: np.ndarray) -> "GroupMoves":
        """Those of the tile's elements in a mask [n], which are then at these ``places`` [n]."""
        chosen = mask[self.elements]
        each = np.repeat(chosen, self.moves.count)
        moves = Moves(self.moves.count[chosen], self.moves.step[each], self.moves.xor[each])
        return GroupMoves(self.row, self.steps, places[self.elements[chosen]], moves)


@dataclass(frozen=True)
class Tile:
    """Some elements of a block that move: their places in it [n], base bits [n], and their moves in each group."""

    kind: Kind
    elements: np.ndarray
    base: np.ndarray
    groups: tuple[GroupMoves, ...]
    rows: int

    def pieces(self, nbytes: int) -> Iterator["Tile"]:
        """The tile in pieces whose F has about ``nbytes``."""
        width = max(64, nbytes // (8 * self.rows))
        for first in range(0, len(self.elements), width):
            span = slice(first, first + width)
            groups = tuple(group.between(first, first + width) for group in self.groups)
            yield Tile(self.kind, self.elements[span], self.base[span], groups, self.rows)

    def increments(self, device: str = "cpu") -> Array:
        """F: float64 [n, R]."""
        f = zeros((len(self.elements), self.rows), device)
        for group in self.groups:
            if not len(group.elements):
                continue
            values, owner = self._values(group, device)
            if group.full and (len(group.elements), group.steps) == f.shape:
                return values.reshape(f.shape)
            step, elements = to_device(group.moves.step, device), to_device(group.elements, device)
            at = elements[group.moves.owner if owner is None else owner] * self.rows
            at += step.astype(np.intp)
            at += group.row
            f.reshape(-1)[at] = values
        return f

    def gram(self, nbytes: int = TILE, device: str = "cpu") -> Array:
        """F^T F [R, R]. On the CPU elements that move seldom are taken by pairs of their moves, else by pieces of F."""
        if device == "cpu" and self.rows >= _MANY:
            number = np.zeros(len(self.elements), np.int64)
            for group in self.groups:
                number[group.elements] += group.moves.count
            # a pair takes some 12 ns, an element's part of F^T F some R (R + 120) / 50
            few = 300 * number * (number + 1) < self.rows * (self.rows + 120)
            if few.any():
                return self._only(few)._gram_of_pairs() + self._only(~few)._gram_of_pieces(nbytes, device)
        return self._gram_of_pieces(nbytes, device)

    def _gram_of_pieces(self, nbytes: int, device: str) -> Array:
        total = zeros((self.rows, self.rows), device)
        for piece in self.pieces(nbytes):
            f = piece.increments(device)
            total += f.T @ f
        return total

    def _only(self, mask: np.ndarray) -> "Tile":
        """The elements of a mask [n]."""
        places = np.cumsum(mask) - 1
        groups = tuple(group.only(mask, places) for group in self.groups)
        return Tile(self.kind, self.elements[mask], self.base[mask], groups, self.rows)

    def _gram_of_pairs(self) -> np.ndarray:
        values = np.concatenate([self._values(group, "cpu")[0] for group in self.groups])
        owner = np.concatenate([group.elements[group.moves.owner] for group in self.groups])
        row = np.concatenate([group.moves.step + np.intp(group.row) for group in self.groups])
        if len(self.groups) > 1:  # moves of one element stand beside each other, in the order of the rows
            order = np.argsort(owner, kind="stable")
            values, owner, row = values[order], owner[order], row[order]
        return gram_of_pairs(values, owner, row, self.rows)

    def weigh(self, weights: np.ndarray, device: str = "cpu") -> Array:
        """F w for weights [R, S]: float64 [n, S]. On the CPU each move is processed once, and F is never built."""
        if device != "cpu":
            return self.increments(device) @ to_device(weights, device)
        product = np.zeros((len(self.elements), weights.shape[1]))
        for group in self.groups:
            values, weight = self._values(group, "cpu")[0], weights[group.row :][: group.steps]
            if group.full:
                product[group.elements] += values.reshape(-1, group.steps) @ weight
            else:
                for column, w in zip(product.T, weight.T, strict=True):
                    column[group.elements] += np.add.reduceat(w[group.moves.step] * values, group.moves.first)
        return product

    def _values(self, group: GroupMoves, device: str) -> tuple[Array, Array | None]:
        """What a group's moves add [E]; from a device, their elements' places [E] too: it finds these itself, to be sent less."""
        moves, base = group.moves, self.base[group.elements]
        xor, start, first = (to_device(array, device) for array in (moves.xor, base, moves.first))
        owner = None if device == "cpu" else owners(xor, first)
        bits = xor ^ (np.repeat(base, moves.count) if owner is None else start[owner])
        return increments(bits, start, first, self.kind), owner


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
    rows = np.cumsum([0, *(len(group.steps) for group in groups)])
    for places in filter(len, np.split(elements, ends)):
        moves = []
        for group, counts_of_block, cursor, row in zip(groups, counts, cursors, rows, strict=False):
            count = counts_of_block[places]
            moving = np.flatnonzero(count != 0)
            if len(moving):
                moves.append(GroupMoves(int(row), len(group.steps), moving, cursor.take(count[moving])))
        yield Tile(block.kind, places, base[places], tuple(moves), int(rows[-1]))


def _cut(counts: list[np.ndarray], most: int) -> tuple[np.ndarray, np.ndarray]:
    """The elements that move in any group, and where to cut them so that each run has about ``most`` moves."""
    total = np.zeros(len(counts[0]), np.uint32)
    for count in counts:
        total += count
    elements = np.flatnonzero(total != 0)  # fast for bool only
    ends = np.cumsum(total[elements])
    return elements, np.searchsorted(ends, np.arange(most, int(ends[-1]) if len(ends) else 0, most))
