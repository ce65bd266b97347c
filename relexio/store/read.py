"""Reading the moves of a block a tile at a time, so that memory depends on neither block nor window."""

from collections.abc import Iterator
from typing import Protocol, TypeVar

import numpy as np

from relexio.loops import advance
from relexio.store.schema import Block
from relexio.store.seal import damage
from relexio.store.store import Store

#: Bytes of a tile, small enough for the caches.
TILE = 2 << 20
_DENSE = 1 << 19
_WIDEST = 1 << 16  # elements: what says which of them move takes memory too


def dense_width(rows: int) -> int:
    """Elements of F that are worked on at once where it is full: the same in any plan, and so are the digits of their sums."""
    return max(64, _DENSE // (8 * max(rows, 1)))


def tile_width(rows: int, nbytes: int = TILE) -> int:
    """Elements of a tile of moves, a multiple of ``dense_width``: in float64, if all moved at all rows, four times ``nbytes``."""
    width = dense_width(rows)
    return width * max(1, min(4 * nbytes // _DENSE, _WIDEST // width))


T_co = TypeVar("T_co", covariant=True)


class Reader(Protocol[T_co]):
    """Gives a block's moves as tables: ``take`` those of the elements from where the last one ended to ``last``."""

    def take(self, last: int) -> T_co:
        """A table."""

    def finish(self) -> None:
        """Raise ValueError if there is more than was taken."""


def tiles(store: Store, block: Block, width: int, reader: Reader[T_co]) -> Iterator[tuple[int, slice, T_co]]:
    """The moves of a block as a reader gives them, at most ``width`` elements of one tensor at a time.

    With each tile comes the place of its piece among those of the block, and its elements in the block.
    """
    with damage(f"{store.shown}: moves of {block.names}"):
        for place, piece in enumerate(block.pieces):
            for first in range(piece.first, piece.span.stop, width):
                span = slice(first, min(first + width, piece.span.stop))
                yield place, span, reader.take(span.stop)
        reader.finish()


def observed(store: Store, block: Block, step: int) -> np.ndarray:
    """The element bits [size] of a block at an observed step, exactly as its checkpoint had them."""
    last, column = store.find(step)
    bits = store.base_bits(block)
    with damage(f"{store.shown}: moves of {block.names}"):
        for segment in store.segments[: store.segments.index(last) + 1]:
            until = column + 1 if segment is last else segment.columns
            advance(store.stream(segment, block), until, block.kind, bits)
    return bits
