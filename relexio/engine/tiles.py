"""The rows of F: where the steps of a window stand in the chain; and tables of its moves, on the host or on a device.

theta_t - theta_0, the rows of M, are running sums of increments: M = S F^T, where F has a column for each step of the
chain up to the window's end, and S adds up and picks the steps of the window. F is nearly empty, so moves are worked on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from relexio.dtypes import Array
from relexio.engine.plan import portion
from relexio.loops import Moves, Walk, fold
from relexio.store.read import TILE, tile_width, tiles
from relexio.store.schema import Block, Segment
from relexio.store.seal import damage
from relexio.store.store import Store


@dataclass(frozen=True)
class Rows:
    """Where the steps of a window [T] stand among the columns of F: ``places`` of R = ``count``.

    ``segments`` have these, and perhaps some more: ``columns`` in all.
    """

    segments: tuple[Segment, ...]
    places: np.ndarray
    count: int
    columns: int

    @classmethod
    def of(cls, store: Store, steps: tuple[int, ...]) -> "Rows":
        """For any of the store's steps."""
        places = np.array([store.chain[step] for step in steps])
        segments, columns, count = [], 0, int(places.max(initial=-1)) + 1
        for segment in store.segments:
            if columns >= count:
                break
            segments.append(segment)
            columns += segment.columns
        return cls(tuple(segments), places, count, columns)

    def sum_up(self, products: np.ndarray) -> np.ndarray:
        """S x: turns values of increments [R, ...] into values of the window's deltas [T, ...]."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told where it is used
            return np.cumsum(products, axis=0)[self.places]

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """S^T w: turns weights of the window's deltas [T, ...] into weights of increments [R, ...], so that M^T w = F S^T w."""
        spread = np.zeros((self.count, *weights.shape[1:]))
        spread[self.places] = weights
        return np.ascontiguousarray(np.cumsum(spread[::-1], axis=0)[::-1])


@contextmanager
def walk(store: Store, block: Block, rows: Rows) -> Iterator[Walk]:
    """A walk through the moves of a block up to a window's end, which must end where they do."""
    with damage(f"{store.shown}: moves of {block.names}"):
        through = Walk([store.stream(segment, block) for segment in rows.segments], block.kind, rows.count)
        yield through
        through.finish()


def window_tiles(store: Store, block: Block, rows: Rows, nbytes: int = TILE) -> Iterator[tuple[int, slice, Moves]]:
    """The moves of a block up to a window's end: as ``read.tiles`` gives them."""
    behind = np.where(np.arange(rows.columns) < rows.count, np.arange(rows.columns), -1).astype(np.int32)
    for place, span, moves in tiles(store, block, tile_width(rows.columns, nbytes), store.reader(block, rows.segments)):
        yield place, span, moves if rows.count == rows.columns else fold(moves, behind, block.kind)


def window_tables(store: Store, block: Block, rows: Rows, nbytes: int) -> Iterator[tuple[int, slice, Array]]:
    """The same on a device: tables [R, n] of ``loops.cuda``, ``nbytes`` in float64."""
    from relexio.loops import cuda

    streams = [store.stream(segment, block) for segment in rows.segments]
    reader = cuda.Reader(streams, block.kind, rows.count, portion(nbytes) // len(streams))
    return tiles(store, block, max(64, nbytes // (8 * rows.count)), reader)


def compact(moves: Moves, bits: np.ndarray) -> tuple[Moves, np.ndarray]:
    """Only the elements that move: their moves, their base bits."""
    moving = np.flatnonzero(np.diff(moves.start))
    start = np.append(moves.start[moving], moves.start[-1])
    return Moves(start, moves.row, moves.by), bits[moving]


def pieces(moves: Moves, bits: np.ndarray, width: int) -> Iterator[tuple[Moves, np.ndarray]]:
    """A table in pieces of at most ``width`` elements, with the base bits of each."""
    for first in range(0, len(bits), width):
        start = moves.start[first : first + width + 1]
        some = slice(int(start[0]), int(start[-1]))
        yield Moves(start - start[0], moves.row[some], moves.by[some]), bits[first : first + len(start) - 1]
