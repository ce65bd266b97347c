"""The compiled walk through the moves of a block, from its bytes to sums (``loops.c``). ``plain`` has the same in NumPy."""

from collections.abc import Callable, Sequence

import numpy as np

from relexio.dtypes import Kind
from relexio.loops.library import FLOAT, SOURCE, address, library
from relexio.loops.moves import BEYOND, CUT_GAP, FEW, MANY, Stream, first_rows, next_chunk

#: As Gathered in loops.c.
_GATHERED = np.dtype(
    [*((field, np.int64) for field in ("element", "source", "count", "place")), ("before", np.float64)]
)


class Walk:
    """Goes through the moves of a block element by element, straight from the bytes of a chain's segments; those at the first
    R = ``rows`` rows of F count. It holds a chunk of each segment.

    Raises ValueError where the streams are damaged.
    """

    def __init__(self, streams: Sequence[Stream], kind: Kind, rows: int) -> None:
        starts = first_rows(streams)
        self._streams, self._kind, self._rows, self._to = list(streams), kind, rows, 0
        self._sources, self._gathered = np.zeros(len(streams), SOURCE), np.zeros(1, _GATHERED)
        self._sources["columns"], self._sources["row"], self._sources["ahead"] = np.diff(starts), starts[:-1], -1
        self._sources["inverse"] = [((1 << 64) - 1) // stream.columns + 1 & ((1 << 64) - 1) for stream in streams]
        self._gathered["element"] = -1
        self._held: dict[int, np.ndarray] = {}  # what the sources point to
        self._added, self._at_row = np.empty(rows), np.empty(rows, np.uint16)

    def gram(self, bits: np.ndarray, last: int, total: np.ndarray) -> None:
        """Add F^T F of the elements up to ``last`` to a symmetric float64 [R, R]: every pair of moves of an element, element
        after element. ``bits`` [size] are those of the base."""
        if total.shape != (self._rows, self._rows):
            raise ValueError(f"a total of {total.shape} does not fit {self._rows} rows")
        self._go(library.gram, bits, last, address(total, "f8"))

    def predict(self, bits: np.ndarray, last: int, weights: np.ndarray, results: np.ndarray) -> int:
        """Put base + F w for weights [R, S] in place of the base's bits in results [S, size], and say how many are not finite where
        the base is.

        An element's increments are weighed and added up in float64 in the order of its moves, the base is added to that,
        and the result is rounded once. Elements without moves keep their bits. A result that is no number is the same NaN
        on all machines.
        """
        lost, (rows, targets) = np.zeros(1, np.int64), weights.shape
        if rows != self._rows or results.shape != (targets, len(bits)) or not results.flags.writeable:
            raise ValueError(
                f"weights {weights.shape} and results {results.shape} do not fit {self._rows} rows of {len(bits)}"
            )
        out = address(results, self._kind.bits)
        self._go(library.predict, bits, last, address(weights, "f8"), targets, len(bits), out, lost.ctypes.data)
        return int(lost[0])

    def _go(self, loop: Callable[..., int], bits: np.ndarray, last: int, *arguments: int) -> None:
        """Run a loop up to an element, with as many more chunks as that needs."""
        if not self._to <= last <= len(bits):
            raise ValueError(f"{len(bits)} elements of a base do not reach from {self._to} to {last}")
        self._to = last
        chain = self._sources.ctypes.data, len(self._sources), last, self._rows, address(bits, self._kind.bits)
        scratch = self._gathered.ctypes.data, self._added.ctypes.data, self._at_row.ctypes.data
        while (need := loop(*chain, *scratch, *arguments, FLOAT[self._kind.name])) >= 0:
            self._feed(need)

    def _feed(self, need: int) -> None:
        source, changes = divmod(need, 2)
        stream, fields = self._streams[source], self._sources[source]
        chunk = next_chunk(stream.by, self._kind.bits) if changes else next_chunk(stream.when, "u1")
        if chunk is not None:
            name = "by" if changes else "when"
            self._held[need] = chunk
            fields[name], fields[f"{name}_left"] = chunk.ctypes.data, len(chunk)
        elif changes:
            raise ValueError(FEW)
        elif fields["open"]:
            raise ValueError(CUT_GAP)
        else:
            fields["ended"] = 1

    def finish(self) -> None:
        """Raise ValueError if there is more in a stream than was gone through."""
        for stream, fields in zip(self._streams, self._sources, strict=True):
            if fields["ahead"] >= 0 or fields["when_left"] or next_chunk(stream.when, "u1") is not None:
                raise ValueError(BEYOND)
            if fields["open"]:
                raise ValueError(CUT_GAP)
            if fields["by_left"] or next_chunk(stream.by, self._kind.bits) is not None:
                raise ValueError(MANY)
