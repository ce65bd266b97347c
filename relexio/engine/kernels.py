"""Arithmetic on one block, a tile at a time, on NumPy or CuPy arrays; and the block's Gram matrix, operator and prediction."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from relexio.dtypes import Array, Kind, from_float64, nonfinite, to_float64
from relexio.engine.device import out_of_memory, to_device, to_host, zeros
from relexio.errors import BudgetError, RelexioWarning, RequestError
from relexio.store.moves import Moves
from relexio.store.read import TILE, Cursor
from relexio.store.schema import Block
from relexio.store.store import Store


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


_SMALLEST_TILE = 1 << 12


_WAIT, _WAITS = 0.1, 20  # seconds, times


#: One text for all, so that Python says it once for however many blocks and threads.
_SHRUNK = (
    "the device ran out of memory: going on with smaller tiles, slower; give more --device-memory or fewer --workers"
)


def _shrinking(work: Callable[[int], Any], tile_bytes: int) -> Any:
    """Run ``work(tile_bytes)``; where the device has no room for a tile so large, again with half of it.

    Raises BudgetError where there is no room for the smallest either, though others were given time to end theirs.
    """
    waits = iter(range(_WAITS))
    while True:
        try:
            return work(tile_bytes)
        except out_of_memory() as error:
            if tile_bytes <= _SMALLEST_TILE and next(waits, None) is None:
                raise BudgetError("--device-memory is too small for the smallest tile; give more") from error
        warnings.warn(_SHRUNK, RelexioWarning, stacklevel=1)  # out here, since the error holds what did fit
        if tile_bytes <= _SMALLEST_TILE:
            time.sleep(_WAIT)
        tile_bytes = max(tile_bytes // 2, _SMALLEST_TILE)


def gram_block(store: Store, block: Block, steps: tuple[int, ...], tile_bytes: int, device: str) -> np.ndarray:
    """M M^T over one block: float64 [T, T]."""

    def work(size: int) -> np.ndarray:
        rows = Rows.of(store, steps)
        total = zeros((rows.count, rows.count), device)
        for tile in tiles(store, block, steps, size):
            total += tile.gram(size, device)
        return rows.sum_up(rows.sum_up(to_host(total)).T)

    return _shrinking(work, tile_bytes)


def operator_block(
    store: Store, block: Block, steps: tuple[int, ...], x: np.ndarray, tile_bytes: int, device: str
) -> np.ndarray:
    """M (M^T x) over one block, x [T, k]: float64 [T, k], without ever holding T x T."""

    def work(size: int) -> np.ndarray:
        rows = Rows.of(store, steps)
        there = to_device(rows.spread(x), device)
        total = zeros(there.shape, device)
        for tile in tiles(store, block, steps, size):
            for piece in tile.pieces(size):
                increments = piece.increments(device)
                total += increments.T @ (increments @ there)
        return rows.sum_up(to_host(total))

    return _shrinking(work, tile_bytes)


def combine_block(
    store: Store, block: Block, steps: tuple[int, ...], weights: np.ndarray, tile_bytes: int, device: str
) -> list[np.ndarray]:
    """theta_0 + M^T w over one block for weights [T, S]: element bits [size] for each of the S targets.

    Raises RequestError where a prediction is not finite though the base is.
    """
    base = store.base_bits(block)

    def work(size: int) -> list[np.ndarray]:
        results = [base.copy() for _ in range(weights.shape[1])]
        if not weights.any():
            return results
        spread = Rows.of(store, steps).spread(weights)
        for tile in tiles(store, block, steps, size, base):
            for piece in (tile,) if device == "cpu" else tile.pieces(size):
                here = to_device(piece.base.reshape(-1, 1), device)
                with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
                    values = piece.weigh(spread, device)
                values += to_float64(here, block.kind)
                bits = from_float64(values, block.kind)
                _check_finite(bits, here, block)
                found = to_host(bits)
                for target, result in enumerate(results):
                    result[piece.elements] = found[:, target]
        return results

    return _shrinking(work, tile_bytes)


def _check_finite(bits: Array, base: Array, block: Block) -> None:
    bad = nonfinite(bits, block.kind) & ~nonfinite(base, block.kind)
    if bool(bad.any()):
        raise RequestError(
            f"tensor {block.tensor.name}: the prediction overflows {block.tensor.dtype} in {int(bad.sum())} elements; "
            f"predict a nearer step or give a smaller --strength"
        )
