"""The compiled loops (``loops.c``), called by ctypes. Arrays are made here, and checked as far as memory is at stake.

Tables come from ``Reader`` and ``fold``, whose starts ascend; that is not checked again.
"""

from collections.abc import Sequence

import numpy as np

from relexio.dtypes import Kind
from relexio.loops.library import FLOAT, KIND, SOURCE, address, addresses, library
from relexio.loops.moves import (
    BEYOND,
    CUT_GAP,
    FEW,
    MANY,
    Found,
    Moves,
    Stream,
    check_names,
    check_table,
    compared_at_once,
    first_rows,
    next_chunk,
)  # fmt: skip
from relexio.loops.walk import Walk

__all__ = ["Reader", "Walk", "advance", "dense", "find", "fold", "increments", "pack", "product"]
_NEVER = 0xFFFFFFFF  # bits that no raw byte has
_BEHIND = 9  # a byte for the last gap, and eight that may be written behind it


# Moves to bytes.


def find(rows: np.ndarray, base: np.ndarray, kind: Kind, first: int = 0, before: int = -1) -> Found:
    """The moves between states [K + 1, n], the first of which is the one before, of a block's elements from ``first`` on.

    ``base`` [n] are the bits that all began from; ``before`` is the last cell that has moved. Memory is taken for a move in every
    cell, and touched as far as there are any.
    """
    columns, n = len(rows) - 1, rows.shape[1]
    if rows.dtype != kind.bits or (n > 1 and rows.strides[1] != rows.itemsize) or before >= first * columns:
        raise ValueError("states cannot be compared: their type, their layout, or the cell before")
    if len(base) != n:
        raise ValueError(f"{len(base)} elements of a base do not fit {n}")
    tile = compared_at_once(rows)
    mask = np.empty(tile // 64 if columns == 1 else tile * -(-columns // 64), np.uint64)
    when = np.empty(n * columns + ((first + n) * columns - before) // 255 + _BEHIND, np.uint8)
    by, changed, sizes = np.empty(n * columns, kind.bits), np.zeros(columns, np.int64), np.array([0, 0, before, 0])
    library.find(
        rows.ctypes.data, rows.strides[0], columns, n, tile, first, address(base, kind.bits), kind.exponent or _NEVER,
        mask.ctypes.data, when.ctypes.data, by.ctypes.data, changed.ctypes.data, sizes.ctypes.data, KIND[kind.name],
    )  # fmt: skip
    length, moves, last, lost = sizes.tolist()
    return Found(when[:length], by[:moves], last, np.cumsum(changed), lost)


def pack(moves: Moves, columns: int, first: int = 0, before: int = -1) -> tuple[np.ndarray, int]:
    """The bytes of ``when`` (uint8) for moves at K ``columns`` of a block's elements from ``first`` on, and the last cell.

    Raises ValueError if a row is no column, or rows do not ascend.
    """
    n = len(moves.start) - 1
    check_table(moves, n)
    when = np.empty(len(moves.row) + max(0, (first + n) * columns - before) // 255 + _BEHIND, np.uint8)
    sizes = np.array([0, before])
    if library.pack(*addresses(moves), n, columns, first, when.ctypes.data, sizes.ctypes.data):
        raise ValueError("moves do not ascend, or are at no column, or the cell before is not before them")
    return when[: sizes[0]], int(sizes[1])


# Bytes to moves.


class Reader:
    """Reads tables of moves from the segments of a chain, tile by tile; holds little more than a tile and a chunk of each.

    Raises ValueError where the streams are damaged.
    """

    def __init__(self, streams: Sequence[Stream], kind: Kind) -> None:
        rows = first_rows(streams)
        self._streams, self._kind, self._next = list(streams), kind, 0
        self._sources = np.zeros(len(streams), SOURCE)
        self._sources["columns"], self._sources["row"] = np.diff(rows), rows[:-1]
        self._of = np.repeat(np.arange(len(streams), dtype=np.uint16), np.diff(rows))
        self._words = max(1, -(-rows[-1] // 64))
        self._address = self._sources.ctypes.data
        self._when: list[np.ndarray | None] = [None] * len(streams)  # what the sources point to
        self._by = [np.empty(0, kind.bits)] * len(streams)

    def take(self, last: int) -> Moves:
        """The moves of the elements from where the last table ended, 0 at first, to ``last``.

        Rows are numbered through the chain: those of a segment follow those of the segments before.
        """
        n, sources = last - self._next, self._sources
        mask = np.zeros((n, self._words), np.uint64)
        sources["marked"] = 0
        self._mark(mask)
        for source in np.flatnonzero(sources["marked"] > sources["by_left"]):
            self._feed_by(int(source))
        total = int(sources["marked"].sum())
        moves = Moves(np.empty(n + 1, np.int64), np.empty(total, np.uint16), np.empty(total, self._kind.bits))
        library.collect(
            self._address, len(sources), self._of.ctypes.data, *mask.shape, mask.ctypes.data,
            *addresses(moves), moves.by.ctypes.data, KIND[self._kind.name],
        )  # fmt: skip
        self._next = last
        return moves

    def _mark(self, mask: np.ndarray) -> None:
        """Mark the moves of a tile, with as many more chunks as that needs."""
        source, count, tile = 0, len(self._sources), (*mask.shape, mask.ctypes.data)
        while (source := library.mark(self._address, count, source, *tile)) < count:
            chunk = next_chunk(self._streams[source].when, "u1")
            if chunk is not None:
                self._when[source] = chunk
                self._sources[source]["when"], self._sources[source]["when_left"] = chunk.ctypes.data, len(chunk)
            elif self._sources[source]["open"]:
                raise ValueError(CUT_GAP)
            else:
                source += 1

    def _feed_by(self, source: int) -> None:
        """Add chunks to what is left of a stream's changes, until there are as many as are marked."""
        fields = self._sources[source]
        held = self._by[source]
        parts = [held[len(held) - fields["by_left"] :]] if fields["by_left"] else []
        while fields["marked"] > fields["by_left"]:
            chunk = next_chunk(self._streams[source].by, self._kind.bits)
            if chunk is None:
                raise ValueError(FEW)
            parts.append(chunk)
            fields["by_left"] += len(chunk)
        self._by[source] = np.concatenate(parts) if len(parts) > 1 else parts[0]
        fields["by"] = self._by[source].ctypes.data

    def finish(self) -> None:
        """Raise ValueError if there is more in a stream than was taken."""
        for stream, fields in zip(self._streams, self._sources, strict=True):
            if fields["when_left"] or next_chunk(stream.when, "u1") is not None:
                raise ValueError(BEYOND)
            if fields["by_left"] or next_chunk(stream.by, self._kind.bits) is not None:
                raise ValueError(MANY)


# Tables to tables and states.


def fold(moves: Moves, renamed: np.ndarray, kind: Kind) -> Moves:
    """Moves whose rows are renamed by int32 [R], which never falls where it is not -1; there the move goes away.

    Moves of an element that come to the same row are added up; those that add up to nothing go away.
    """
    check_table(moves, len(moves.start) - 1, len(renamed))
    check_names(renamed)
    start, row, by = np.empty_like(moves.start), np.empty_like(moves.row), np.empty_like(moves.by)
    left = library.fold(
        *addresses(moves), address(moves.by, kind.bits), len(start) - 1, address(renamed, "i4"),
        start.ctypes.data, row.ctypes.data, by.ctypes.data, KIND[kind.name],
    )  # fmt: skip
    return Moves(start, row[:left], by[:left])


def advance(stream: Stream, until: int, kind: Kind, bits: np.ndarray) -> None:
    """Take the bits [size] of a block, in place, to the state after a segment's moves at columns before ``until``.

    Raises ValueError where the stream is damaged.
    """
    if not bits.flags.writeable or stream.columns < 1:
        raise ValueError("bits are read-only, or a segment has no columns")
    source = np.zeros(1, SOURCE)
    source["columns"] = stream.columns
    held: dict[str, np.ndarray] = {}  # what the source points to
    wants = {0: ("when", stream.when, "u1"), 1: ("by", stream.by, kind.bits)}
    where = source.ctypes.data, until, len(bits), address(bits, kind.bits), KIND[kind.name]
    while (state := library.advance(*where)) >= 0:
        name, chunks, dtype = wants[state]
        chunk = next_chunk(chunks, dtype)
        if chunk is None:
            break
        held[name] = chunk
        source[name], source[f"{name}_left"] = chunk.ctypes.data, len(chunk)
    if state:
        raise ValueError(BEYOND if state < 0 else FEW)
    if source["open"][0]:
        raise ValueError(CUT_GAP)
    if source["by_left"][0] or next_chunk(stream.by, kind.bits) is not None:
        raise ValueError(MANY)


# Arithmetic.


def increments(moves: Moves, bits: np.ndarray, kind: Kind) -> np.ndarray:
    """What each move adds to its element of base bits [n]: the value after it less the one before, float64 [E].

    The difference is taken in float64, where those of bf16 and fp16 are exact and those of fp32 nearly always.
    """
    check_table(moves, len(bits))
    values = np.empty(len(moves.by))
    library.increments(
        address(moves.start, "i8"), address(moves.by, kind.bits), address(bits, kind.bits), len(bits), values.ctypes.data,
        FLOAT[kind.name],
    )  # fmt: skip
    return values


def dense(moves: Moves, values: np.ndarray, rows: int) -> np.ndarray:
    """F: float64 [n, R], from increments [E]."""
    f = np.zeros((len(moves.start) - 1, rows))
    _check_values(moves, values, rows)
    library.dense(*addresses(moves), address(values, "f8"), *f.shape, f.ctypes.data)
    return f


def _check_values(moves: Moves, values: np.ndarray, rows: int) -> None:
    check_table(moves, len(moves.start) - 1, rows)
    if len(values) != len(moves.row):
        raise ValueError(f"there are {len(values)} increments of {len(moves.row)} moves")


# Adapters.


def product(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The product [n, m] of factors [rank, n] and [rank, m] of float32 values as float64: as ``plain.product``."""
    if len(rows) != len(columns):
        raise ValueError(f"factors of rank {len(rows)} and {len(columns)}")
    out = np.zeros((rows.shape[1], columns.shape[1]), np.float32)
    library.product(address(rows, "f8"), address(columns, "f8"), len(rows), *out.shape, address(out, "f4"))
    return out
