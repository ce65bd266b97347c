"""The records of the loops: moves as a table, as bytes, and as streams of bytes.

An element of a block moves at a step if its bits are other than before it. ``by`` says how far, in the order of the
numbers: zigzag of the difference, modulo 2^w, in the kind's unsigned type. ``when`` says which moves there are: a cell is
element * K + column, the cells of a block ascend, and each is written as the gap from the one before, in bytes: 255 for
each whole 255 in it, then one byte under 255, which ends it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

#: Rows of F that a table can have.
MOST_ROWS = 1 << 16
#: Bytes of states that are compared at once, so that they stay in the cache; and elements at most.
_CACHED, _MOST = 1 << 18, 1 << 16


@dataclass(frozen=True)
class Moves:
    """The moves of n elements, element by element, each one's in the order of time.

    ``start`` int64 [n + 1]: where each element's begin, from 0 on. ``row`` uint16 [E]: rows of F, ascending within an
    element. ``by`` [E]: how far each goes, in the kind's unsigned type.
    """

    start: np.ndarray
    row: np.ndarray
    by: np.ndarray


@dataclass(frozen=True)
class Found:
    """Moves as bytes: ``when`` uint8, ``by`` [E], and the ``last`` cell so far.

    ``changed`` int64 [K]: how many more elements differ from the base at each step than before all. ``lost``: how many moves
    come from or go to what is no finite number.
    """

    when: np.ndarray
    by: np.ndarray
    last: int
    changed: np.ndarray
    lost: int


def compared_at_once(rows: np.ndarray) -> int:
    """How many elements of states [K + 1, n] are compared at once: a multiple of 64."""
    return min(max(_CACHED // (len(rows) * rows.itemsize) // 64, 1) * 64, _MOST)


@dataclass(frozen=True)
class Stream:
    """A block's moves in a segment of K ``columns``: chunks of ``when`` (uint8) and ``by``, in order, cut to what counts."""

    columns: int
    when: Iterator[np.ndarray]
    by: Iterator[np.ndarray]


def first_rows(streams: Sequence[Stream]) -> list[int]:
    """The row of F of each stream's first column, and at the end the number of rows. Raises ValueError if that is too large."""
    rows = [0]
    for stream in streams:
        if stream.columns < 1:
            raise ValueError("a segment has no columns")
        rows.append(rows[-1] + stream.columns)
    if rows[-1] > MOST_ROWS:
        raise ValueError(f"the segments have {rows[-1]} columns, more than {MOST_ROWS}")
    return rows


def next_chunk(chunks: Iterator[np.ndarray], dtype: str) -> np.ndarray | None:
    """The next chunk that holds something, in one piece of memory; None if there is none."""
    for chunk in chunks:
        if chunk.dtype != dtype:
            raise TypeError(f"a chunk is {chunk.dtype}, not {np.dtype(dtype)}")
        if chunk.size:
            return np.ascontiguousarray(chunk)
    return None


class Changes:
    """A stream's changes, as many at a time as are asked for. Raises ValueError where there are other than those."""

    def __init__(self, chunks: Iterator[np.ndarray], dtype: str) -> None:
        self._chunks, self._dtype, self._held = chunks, dtype, np.empty(0, dtype)

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` of them."""
        parts = []
        while count > len(self._held):
            parts.append(self._held)
            count -= len(self._held)
            chunk = next_chunk(self._chunks, self._dtype)
            if chunk is None:
                raise ValueError(FEW)
            self._held = chunk
        parts.append(self._held[:count])
        self._held = self._held[count:]
        return np.concatenate(parts)

    def finish(self) -> None:
        """Nothing may be left."""
        if len(self._held) or next_chunk(self._chunks, self._dtype) is not None:
            raise ValueError(MANY)


def check_names(renamed: np.ndarray) -> None:
    """Raise ValueError if new names of rows, int32 [R], do not stand in order or are no rows."""
    names = renamed[renamed >= 0]
    if (names[1:] < names[:-1]).any() or (names[-1:] >= MOST_ROWS).any():
        raise ValueError("new names of rows fall, or are too large")


def check_table(moves: Moves, elements: int, rows: int = MOST_ROWS) -> None:
    """Raise ValueError if a table has not ``elements``, its lengths disagree, or it has moves at other than ``rows``."""
    if len(moves.start) != elements + 1 or not int(moves.start[-1]) == len(moves.row) == len(moves.by):
        raise ValueError(f"a table of moves does not fit {elements} elements")
    if rows < MOST_ROWS and len(moves.row) and int(moves.row.max()) >= rows:
        raise ValueError(f"a move is at row {int(moves.row.max())} of {rows}")


#: What is wrong with a stream that is damaged.
CUT_GAP = "the last gap between moves has no end"
FEW = "there are more moves than changes"
MANY = "there are more changes than moves"
BEYOND = "moves are beyond the last element"
