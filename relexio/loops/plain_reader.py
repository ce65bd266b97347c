"""Bytes to moves in NumPy, for ``plain``."""

from collections.abc import Sequence

import numpy as np

from relexio.dtypes import Kind
from relexio.loops.moves import BEYOND, CUT_GAP, Changes, Moves, Stream, first_rows, next_chunk

#: Bytes of ``when`` that are decoded at once: as cells they take eight times as much.
_PIECE = 1 << 14


class Reader:
    """Reads tables of moves from the segments of a chain, tile by tile; holds little more than a tile and a chunk of each.

    Raises ValueError where the streams are damaged.
    """

    def __init__(self, streams: Sequence[Stream], kind: Kind) -> None:
        *self._rows, _ = first_rows(streams)
        self._sources = [Source(stream, kind) for stream in streams]
        self._kind, self._next = kind, 0

    def take(self, last: int) -> Moves:
        """The moves of the elements from where the last table ended, 0 at first, to ``last``.

        Rows are numbered through the chain: those of a segment follow those of the segments before.
        """
        first, self._next = self._next, last
        owner, row, by = [np.empty(0, np.int64)], [np.empty(0, np.uint16)], [np.empty(0, self._kind.bits)]
        for source, shift in zip(self._sources, self._rows, strict=True):
            cells = source.cells(last)
            element, column = np.divmod(cells, source.columns)
            owner.append(element - first)
            row.append((column + shift).astype(np.uint16))
            by.append(source.changes(len(cells)))
        elements = np.concatenate(owner)
        order = np.argsort(elements, kind="stable")  # of one element, those of earlier segments stay first
        start = np.zeros(last - first + 1, np.int64)
        np.cumsum(np.bincount(elements, minlength=last - first), out=start[1:])
        return Moves(start, np.concatenate(row)[order], np.concatenate(by)[order])

    def finish(self) -> None:
        """Raise ValueError if there is more in a stream than was taken."""
        for source in self._sources:
            source.finish()


class Source:
    """What is at hand of a stream: bytes, cells, changes."""

    def __init__(self, stream: Stream, kind: Kind) -> None:
        self.columns, self._when, self._changes = stream.columns, stream.when, Changes(stream.by, kind.bits)
        self._bytes, self._cells = np.empty(0, np.uint8), np.empty(0, np.int64)
        self._last, self._gap = -1, 0

    def cells(self, last: int) -> np.ndarray:
        """The cells of elements before ``last`` that were not taken yet."""
        parts = []
        while len(self._cells) or self._decode():
            count = int(np.searchsorted(self._cells, last * self.columns))
            parts.append(self._cells[:count])
            self._cells = self._cells[count:]
            if len(self._cells):
                break
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _decode(self) -> bool:
        """Make cells of some more bytes; say whether there were any."""
        if not len(self._bytes):
            chunk = next_chunk(self._when, "u1")
            if chunk is None:
                if self._gap:
                    raise ValueError(CUT_GAP)
                return False
            self._bytes = chunk
        piece, self._bytes = self._bytes[:_PIECE], self._bytes[_PIECE:]
        way = np.cumsum(piece, dtype=np.int64) + self._gap
        ends = way[piece < 255]
        self._cells = ends + np.arange(self._last + 1, self._last + 1 + len(ends))
        self._gap = int(way[-1])
        if len(ends):
            self._last, self._gap = int(self._cells[-1]), int(way[-1] - ends[-1])
        return True

    def changes(self, count: int) -> np.ndarray:
        """The next ``count`` changes."""
        return self._changes.take(count)

    def finish(self) -> None:
        """Raise ValueError if there is more than was taken."""
        while not len(self._cells) and self._decode():
            pass
        if len(self._cells):
            raise ValueError(BEYOND)
        self._changes.finish()
