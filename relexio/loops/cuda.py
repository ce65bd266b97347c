"""The loops as kernels for a GPU (``loops.cu``), compiled and called by CuPy, in the stream of the calling thread.

Moves come to the device as they are stored, one byte and one change each, and become a table there: by how far each element
moves at each row of F, [R, n] in the kind's unsigned type, zero where it does not.
"""

import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from relexio.dtypes import Array, Kind
from relexio.loops.moves import BEYOND, CUT_GAP, Changes, Stream, first_rows, next_chunk

#: As in loops.cu.
_KIND = {"bf16": 0, "f16": 1, "f32": 2}
_THREADS, _MOST_BLOCKS = 256, 1 << 16
_compiling = threading.Lock()


@cache
def _module(cupy: Any, kind: str) -> Any:
    code = Path(__file__).with_name("loops.cu").read_text()
    return cupy.RawModule(code=code, options=(f"-DKIND={_KIND[kind]}", "-fmad=false"))


def _run(name: str, kind: Kind, count: int, *arguments: Any) -> None:
    """Run a kernel over ``count`` elements; integers among the arguments are of 64 bits."""
    import cupy

    if not count:
        return
    with _compiling:  # the first call waits for the compiler; others would do the same work beside it
        kernel = _module(cupy, kind.name).get_function(name)
    blocks = min(-(-count // _THREADS), _MOST_BLOCKS)
    kernel((blocks,), (_THREADS,), tuple(np.int64(a) if isinstance(a, int) else a for a in arguments))


class Reader:
    """Reads tables of moves from the segments of a chain, tile by tile, the first R = ``rows`` rows of F.

    Of each segment it holds up to ``portion`` bytes that say when, and a chunk more, on the device with their changes.
    Raises ValueError where the streams are damaged.
    """

    def __init__(self, streams: Sequence[Stream], kind: Kind, rows: int, portion: int = 0) -> None:
        starts = zip(streams, first_rows(streams)[:-1], strict=True)
        self._sources = [_Source(stream, kind, row, portion) for stream, row in starts]
        self._kind, self._rows, self._next = kind, rows, 0

    def take(self, last: int) -> Array:
        """The table [R, n] of the n elements from where the last one ended, 0 at first, to ``last``."""
        import cupy

        first, self._next = self._next, last
        table = cupy.zeros((self._rows, last - first), self._kind.bits)
        for source in self._sources:
            source.scatter(first, last, table)
        return table

    def finish(self) -> None:
        """Raise ValueError if there is more in a stream than was taken."""
        for source in self._sources:
            source.finish(self._next)


class _Source:
    """A stream of bytes, the last chunks of which are on the device with running sums, as they may reach into the next tile."""

    def __init__(self, stream: Stream, kind: Kind, row: int, portion: int) -> None:
        self._when, self._changes, self._portion = stream.when, Changes(stream.by, kind.bits), portion
        self._columns, self._row, self._kind = stream.columns, row, kind
        self._there: tuple[Any, ...] = ()
        self._last, self._open = -1, False  # the last cell that the bytes so far reach; whether a gap goes on

    def scatter(self, first: int, last: int, table: Array) -> None:
        """Put the moves of elements from ``first`` to ``last`` into their table."""
        self._put(first, table)
        while self._last < last * self._columns - 1 and self._load():
            self._put(first, table)

    def _put(self, first: int, table: Array) -> None:
        if self._there:
            when, sums, by, before = self._there
            rows, width = table.shape
            place = self._columns, self._row, first, width, rows
            _run("scatter", self._kind, len(when), when, sums, by, len(when), before, *place, table)

    def _load(self) -> bool:
        """Bring the next chunks to the device; say whether there were any."""
        import cupy

        self._there = ()  # their memory is free for the next
        chunks, size = [], 0
        while size <= self._portion and (chunk := next_chunk(self._when, "u1")) is not None:
            chunks.append(chunk)
            size += len(chunk)
        if not chunks:
            if self._open:
                raise ValueError(CUT_GAP)
            return False
        host = np.concatenate(chunks)
        moves, self._open = int(np.count_nonzero(host < 255)), bool(host[-1] == 255)
        when, by, addends = cupy.asarray(host), cupy.asarray(self._changes.take(moves)), cupy.empty(size, np.uint64)
        _run("addends", self._kind, size, when, size, addends)
        self._there = when, cupy.cumsum(addends), by, self._last
        self._last += int(host.sum(dtype=np.int64)) + moves
        return True

    def finish(self, size: int) -> None:
        if self._load() or self._last >= size * self._columns:
            raise ValueError(BEYOND)
        self._changes.finish()


def increments(table: Array, bits: Array, kind: Kind) -> Array:
    """F^T: what each move adds to its element of base bits [n], float64 [R, n], as ``plain.increments`` does."""
    import cupy

    f = cupy.empty(table.shape)
    _run("increments", kind, len(bits), table, bits, len(bits), len(table), f)
    return f


def predict(table: Array, bits: Array, weights: Array, kind: Kind) -> tuple[Array, Array]:
    """Bits [S, n] of base + F w for base bits [n] and weights [R, S], and how many are not finite where the base is: [1].

    The same bits as those of ``plain.predict``.
    """
    import cupy

    rows, targets = weights.shape
    result, lost = cupy.empty((targets, len(bits)), kind.bits), cupy.zeros(1, np.uint64)
    _run("predict", kind, result.size, table, bits, weights, len(bits), rows, targets, result, lost)
    return result, lost
