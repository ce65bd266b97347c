"""The loops in NumPy, for machines without the compiled ones; the tests hold both against each other, bit for bit."""

from collections.abc import Iterator, Sequence

import numpy as np

from relexio.dtypes import Kind, from_float64, nonfinite, to_float64
from relexio.loops.moves import (
    Found,
    Moves,
    Stream,
    check_names,
    check_table,
    compared_at_once,
    first_rows,
)  # fmt: skip
from relexio.loops.plain_reader import Reader, Source

#: Elements times columns of a table.
_TILE = 1 << 18

#: Pairs of moves that are multiplied at once.
_PAIRS = 1 << 18


# Bits in the order of the numbers, and differences.


def _order(bits: np.ndarray, kind: Kind) -> np.ndarray:
    """Bits as unsigned integers in the order of the numbers; those of raw bytes as they are."""
    if not kind.is_float:
        return bits
    top = _top(kind)
    return np.where((bits & top) != 0, ~bits, bits | top)


def _bits(order: np.ndarray, kind: Kind) -> np.ndarray:
    """The bits at a place in the order of the numbers."""
    if not kind.is_float:
        return order
    top = _top(kind)
    return np.where((order & top) != 0, order ^ top, ~order)


def _top(kind: Kind) -> np.unsignedinteger:
    dtype = np.dtype(kind.bits).type
    return dtype(1 << (8 * kind.itemsize - 1))


def _zigzag(change: np.ndarray, kind: Kind) -> np.ndarray:
    """Differences modulo 2^w, small ones of either sign as small numbers: 0, -1, 1, -2 become 0, 1, 2, 3."""
    dtype = np.dtype(kind.bits).type
    return (change << dtype(1)) ^ (dtype(0) - (change >> dtype(8 * kind.itemsize - 1)))


def _unzigzag(by: np.ndarray) -> np.ndarray:
    dtype = by.dtype.type
    return (by >> dtype(1)) ^ (dtype(0) - (by & dtype(1)))


# Moves to bytes.


def find(rows: np.ndarray, base: np.ndarray, kind: Kind, first: int = 0, before: int = -1) -> Found:
    """The moves between states [K + 1, n], the first of which is the one before, of a block's elements from ``first`` on.

    ``base`` [n] are the bits that all began from; ``before`` is the last cell that has moved.
    """
    n, tile, last, parts = rows.shape[1], compared_at_once(rows), before, list[Found]()
    for at in range(0, max(n, 1), tile):
        parts.append(_find(rows[:, at : at + tile], base[at : at + tile], kind, first + at, last))
        last = parts[-1].last
    when, by = np.concatenate([part.when for part in parts]), np.concatenate([part.by for part in parts])
    changed = np.sum([part.changed for part in parts], axis=0)
    return Found(when, by, last, changed, sum(part.lost for part in parts))


def _find(rows: np.ndarray, base: np.ndarray, kind: Kind, first: int, before: int) -> Found:
    columns, n = len(rows) - 1, rows.shape[1]
    places = np.flatnonzero(rows[1:] != rows[:-1])  # step by step, and within a step element by element
    column = places // max(n, 1)
    element = places - column * n
    order = np.argsort(element.astype(np.uint16), kind="stable")  # by radix; a tile has no more elements
    column, element = column[order], element[order]
    old, new = rows[column, element], rows[column + 1, element]
    differ = [np.count_nonzero(row != base) for row in rows]
    changed = np.array(differ[1:], np.int64) - differ[0]
    lost = np.count_nonzero(nonfinite(old, kind) | nonfinite(new, kind)) if kind.is_float else 0
    when, last = _gaps((element + first) * columns + column, before)
    return Found(when, _zigzag(_order(new, kind) - _order(old, kind), kind), last, changed, int(lost))


def pack(moves: Moves, columns: int, first: int = 0, before: int = -1) -> tuple[np.ndarray, int]:
    """The bytes of ``when`` (uint8) for moves at K ``columns`` of a block's elements from ``first`` on, and the last cell.

    Raises ValueError if a row is no column, or rows do not ascend.
    """
    check_table(moves, len(moves.start) - 1, columns)
    return _gaps((_owner(moves) + first) * columns + moves.row, before)


def _gaps(cells: np.ndarray, before: int) -> tuple[np.ndarray, int]:
    """Cells as the bytes of the gaps between them; and the last. Raises ValueError if they do not ascend."""
    if not len(cells):
        return np.empty(0, np.uint8), before
    gap = np.diff(cells, prepend=before) - 1
    if gap.min() < 0:
        raise ValueError("moves do not ascend, or the cell before is not before them")
    whole, rest = np.divmod(gap, 255)
    ends = np.cumsum(whole + 1) - 1
    when = np.full(ends[-1] + 1, 255, np.uint8)
    when[ends] = rest
    return when, int(cells[-1])


# Tables to tables and states.


def _owner(moves: Moves) -> np.ndarray:
    """The element of each move: int64 [E]."""
    return np.repeat(np.arange(len(moves.start) - 1), np.diff(moves.start))


def fold(moves: Moves, renamed: np.ndarray, kind: Kind) -> Moves:
    """Moves whose rows are renamed by int32 [R], which never falls where it is not -1; there the move goes away.

    Moves of an element that come to the same row are added up; those that add up to nothing go away.
    """
    check_table(moves, len(moves.start) - 1, len(renamed))
    check_names(renamed)
    row = renamed[moves.row]
    stay = row >= 0
    owner, row, change = _owner(moves)[stay], row[stay], _unzigzag(moves.by[stay])
    if len(row):
        new = np.ones(len(row), bool)
        new[1:] = (row[1:] != row[:-1]) | (owner[1:] != owner[:-1])
        change = np.add.reduceat(change, np.flatnonzero(new), dtype=change.dtype)
        owner, row = owner[new][change != 0], row[new][change != 0]
    start = np.zeros(len(moves.start), np.int64)
    np.cumsum(np.bincount(owner, minlength=len(start) - 1), out=start[1:])
    return Moves(start, row.astype(np.uint16), _zigzag(change[change != 0], kind))


def advance(stream: Stream, until: int, kind: Kind, bits: np.ndarray) -> None:
    """Take the bits [size] of a block, in place, to the state after a segment's moves at columns before ``until``.

    Raises ValueError where the stream is damaged.
    """
    source = Source(stream, kind)
    cells = source.cells(len(bits))
    by = source.changes(len(cells))
    source.finish()
    element, column = np.divmod(cells, stream.columns)
    change = np.where(column < until, _unzigzag(by), by.dtype.type(0))
    moving, first = np.unique(element, return_index=True)
    if len(moving):
        total = np.add.reduceat(change, first, dtype=change.dtype)
        bits[moving] = _bits(_order(bits[moving], kind) + total, kind)


def expand(moves: Moves, rows: int, bits: np.ndarray, kind: Kind) -> np.ndarray:
    """The bits [R, n] after the moves at each of R rows, from those before all of them [n]."""
    check_table(moves, len(bits), rows)
    states = np.zeros((rows, len(bits)), bits.dtype)
    states[moves.row, _owner(moves)] = _unzigzag(moves.by)
    states[0] += _order(bits, kind)
    np.cumsum(states, axis=0, dtype=states.dtype, out=states)
    return _bits(states, kind)


# Arithmetic.


def increments(moves: Moves, bits: np.ndarray, kind: Kind) -> np.ndarray:
    """What each move adds to its element of base bits [n]: the value after it less the one before, float64 [E].

    The difference is taken in float64, where those of bf16 and fp16 are exact and those of fp32 nearly always.
    """
    owner, change = _owner(moves), _unzigzag(moves.by)
    so_far = np.cumsum(change, dtype=np.uint32)  # modulo 2^32, so also modulo 2^16
    others = so_far - change.astype(np.uint32)
    since = (so_far - others[moves.start[owner]]).astype(change.dtype)
    order = _order(bits, kind)[owner] + since
    with np.errstate(invalid="ignore"):
        return to_float64(_bits(order, kind), kind) - to_float64(_bits(order - change, kind), kind)


def dense(moves: Moves, values: np.ndarray, rows: int) -> np.ndarray:
    """F: float64 [n, R], from increments [E]."""
    elements = len(moves.start) - 1
    f = np.zeros((elements, rows))
    f[_owner(moves), moves.row] = values
    return f


def _gram(moves: Moves, bits: np.ndarray, kind: Kind, total: np.ndarray) -> None:
    """Add F^T F of base bits [n] to a symmetric float64 [R, R]: every pair of moves of an element, element after element."""
    rows = len(total)
    check_table(moves, len(bits), rows)
    row, flat, values = moves.row.astype(np.int64), total.reshape(-1), increments(moves, bits, kind)
    with np.errstate(over="ignore", invalid="ignore"):
        for left, right in _pairs(moves):  # np.add.at adds pair by pair, as the compiled loop does
            np.add.at(flat, row[right] * rows + row[left], values[left] * values[right])
    total[:] = np.tril(total) + np.tril(total, -1).T


def _pairs(moves: Moves) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each move beside each up to it of its element, as two arrays of places, some moves at a time."""
    back = np.arange(len(moves.row)) - moves.start[_owner(moves)] + 1
    ends = np.cumsum(back)
    cuts = np.searchsorted(ends, np.arange(_PAIRS, int(ends[-1]) if len(ends) else 0, _PAIRS))
    for places in np.split(np.arange(len(back)), np.unique(cuts)):
        right = np.repeat(places, back[places])
        yield right + np.arange(1, len(right) + 1) - np.repeat(np.cumsum(back[places]), back[places]), right


def _predict(moves: Moves, bits: np.ndarray, weights: np.ndarray, kind: Kind) -> tuple[np.ndarray, int]:
    """Bits [S, n] of base + F w for base bits [n] and weights [R, S], and how many are not finite where the base is.

    An element's increments are weighed and added up in float64 in the order of its moves, the base is added to that,
    and the result is rounded once. Elements without moves keep their bits. A result that is no number is the same NaN
    on all machines.
    """
    check_table(moves, len(bits), len(weights))
    moving = np.flatnonzero(moves.start[1:] > moves.start[:-1])
    result = np.tile(bits, (weights.shape[1], 1))
    base, values, owner = to_float64(bits[moving], kind), increments(moves, bits, kind), _owner(moves)
    with np.errstate(over="ignore", invalid="ignore"):
        for line, weight in zip(result, weights.T, strict=True):
            total = base + np.bincount(owner, values * weight[moves.row], len(bits))[moving]
            line[moving] = from_float64(np.where(np.isnan(total), np.nan, total), kind)
    return result, int(np.count_nonzero(nonfinite(result, kind) & ~nonfinite(bits, kind)))


class Walk:
    """As the compiled one, by way of tables."""

    def __init__(self, streams: Sequence[Stream], kind: Kind, rows: int) -> None:
        columns = first_rows(streams)[-1]
        self._reader, self._kind, self._rows, self._to = Reader(streams, kind), kind, rows, 0
        self._kept = np.where(np.arange(columns) < rows, np.arange(columns), -1).astype(np.int32)
        self._width = max(64, _TILE // max(columns, 1))

    def _tables(self, last: int) -> Iterator[tuple[slice, Moves]]:
        while self._to < last:
            span = slice(self._to, min(self._to + self._width, last))
            self._to = span.stop
            yield span, fold(self._reader.take(span.stop), self._kept, self._kind)

    def gram(self, bits: np.ndarray, last: int, total: np.ndarray) -> None:
        """Add F^T F of the elements up to ``last`` to a symmetric float64 [R, R]."""
        for span, moves in self._tables(last):
            _gram(moves, bits[span], self._kind, total)

    def predict(self, bits: np.ndarray, last: int, weights: np.ndarray, results: np.ndarray) -> int:
        """Put base + F w for weights [R, S] into results [S, size], and say how many are not finite where the base is."""
        lost = 0
        for span, moves in self._tables(last):
            results[:, span], some = _predict(moves, bits[span], weights, self._kind)
            lost += some
        return lost

    def finish(self) -> None:
        """Raise ValueError if there is more in a stream than was gone through."""
        self._reader.finish()


# Adapters.


def product(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The product [n, m] of factors [rank, n] and [rank, m] of float32 values as float64.

    The terms of each element are added in the order of ranks; each sum is rounded to float32, as by fused multiply-add.
    """
    shape = rows.shape[1], columns.shape[1]
    total, wide, term = np.zeros(shape, np.float32), np.zeros(shape), np.empty(shape)
    with np.errstate(over="ignore", invalid="ignore"):
        for row, column in zip(rows, columns, strict=True):
            np.multiply(row[:, None], column, out=term)  # exact
            term += wide
            total[:] = term
            wide[:] = total
    return total
