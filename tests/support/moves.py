"""States of a block, their moves, and the streams that a store would keep of them."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from relexio import loops
from relexio.dtypes import KINDS, Kind, from_float64
from relexio.loops import COMPILED, Found, Moves, Stream, plain

#: ``when`` and ``by`` of a segment of two columns and ten elements, and what is said of them.
DAMAGED = [
    ([0, 255], [1], "the last gap between moves has no end"),
    ([0, 1], [1], "there are more moves than changes"),
    ([0, 1], [1, 2, 3], "there are more changes than moves"),
    ([0, 255, 9], [1, 2], "moves are beyond the last element"),
]
FLOATS = [kind for kind in KINDS.values() if kind.is_float]
VERSIONS = [plain, *([importlib.import_module("relexio.loops.compiled")] if COMPILED else [])]
each_version = pytest.mark.parametrize("loops", VERSIONS, ids=lambda module: module.__name__.split(".")[-1])


@dataclass(frozen=True)
class Case:
    """States [K + 1, n] of a block, and a source of chance for cuts."""

    kind: Kind
    states: np.ndarray
    seed: int

    @property
    def columns(self) -> int:
        return len(self.states) - 1

    @property
    def size(self) -> int:
        return self.states.shape[1]

    def chance(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def cuts(self, rng: np.random.Generator, end: int) -> list[tuple[int, int]]:
        """0 to end in some pieces, as firsts and lasts."""
        places = sorted({0, end, *map(int, rng.integers(0, end + 1, 4))})
        return list(pairwise(places))


@st.composite
def cases(draw: st.DrawFn, kinds: list[Kind] | None = None) -> Case:
    """Dense and sparse, long and short, with small steps and with any bits at all."""
    kind = draw(st.sampled_from(kinds or list(KINDS.values())))
    columns = draw(st.sampled_from([1, 2, 3, 8, 9, 63, 64, 65, 130]) | st.integers(1, 130))
    n = draw(st.sampled_from([1, 63, 64, 65, 128]) | st.integers(1, 400))
    density = draw(st.sampled_from([0, 0.001, 0.01, 0.1, 0.6, 0.95, 1]))
    wild, seed = draw(st.booleans()), draw(st.integers(0, 2**32))
    return Case(kind, make_states(kind, columns, n, density, wild, np.random.default_rng(seed)), seed)


def make_states(kind: Kind, columns: int, n: int, density: float, wild: bool, rng: np.random.Generator) -> np.ndarray:
    """States in a buffer that is wider than they are."""
    largest = np.iinfo(kind.bits).max
    states = np.zeros((columns + 1, n + 7), kind.bits)
    states[0] = rng.integers(0, largest, n + 7, kind.bits, endpoint=True)
    if kind.is_float and not wild:
        states[0] = from_float64(rng.standard_normal(n + 7), kind)
    for k in range(columns):
        moves = rng.random(n + 7) < density
        step = rng.integers(0, largest if wild else 5, n + 7, kind.bits, endpoint=True)
        states[k + 1] = states[k] + np.where(moves, step - np.dtype(kind.bits).type(2), 0).astype(kind.bits)
    return states[:, 3 : n + 3]


def chunks(array: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """An array in chunks of any size, often of one item, sometimes of none."""
    first = 0
    while first < len(array):
        last = first + int(rng.integers(0, rng.choice([2, 9, 400])))
        yield array[first:last]
        first = last


def found(loops: ModuleType, states: np.ndarray, kind: Kind, first: int = 0, before: int = -1) -> Found:
    """The moves between states that all began from the first of them."""
    moves: Found = loops.find(states, states[0].copy(), kind, first, before)
    return moves


def streams(loops: ModuleType, case: Case, rng: np.random.Generator) -> list[Stream]:
    """A case as the segments of a chain."""
    parts = [
        (last - first, found(loops, case.states[first : last + 1], case.kind))
        for first, last in case.cuts(rng, case.columns)
    ]
    return [Stream(columns, chunks(one.when, rng), chunks(one.by, rng)) for columns, one in parts]


def table(loops: ModuleType, case: Case) -> Moves:
    """All moves of a case."""
    rng = case.chance()
    reader = loops.Reader(streams(loops, case, rng), case.kind)
    moves: Moves = reader.take(case.size)
    reader.finish()
    return moves


def same(a: Any, b: Any) -> None:
    """Equal type and bits; one NaN is as good as another."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    if a.dtype == np.float64:
        a, b = (np.where(np.isnan(values), np.nan, values).view(np.uint64) for values in (a, b))
    np.testing.assert_array_equal(a, b)


def as_loops_do(cupy: Any, case: Case) -> None:
    """What the kernels for a GPU make of a case, tile by tile, has the bits of the loops."""
    from relexio.loops import cuda

    rng = case.chance()
    rows, base = int(rng.integers(1, case.columns + 1)), case.states[0].copy()
    weights = rng.standard_normal((rows, 3))
    behind = np.where(np.arange(case.columns) < rows, np.arange(case.columns), -1).astype(np.int32)
    moves = loops.fold(table(loops, case), behind, case.kind)
    f = loops.dense(moves, loops.increments(moves, base, case.kind), rows)
    wanted, walk = np.tile(base, (3, 1)), loops.Walk(streams(loops, case, rng), case.kind, rows)
    lost = walk.predict(base, case.size, weights, wanted)
    reader = cuda.Reader(streams(loops, case, rng), case.kind, rows, int(rng.integers(0, 500)))
    for first, last in case.cuts(rng, case.size):
        changes, bits = reader.take(last), cupy.asarray(base[first:last])
        same(cuda.increments(changes, bits, case.kind).get().T, f[first:last])
        result, some = cuda.predict(changes, bits, cupy.asarray(weights), case.kind)
        same(result.get(), wanted[:, first:last])
        lost -= int(some.get()[0])
    reader.finish()
    assert lost == 0


def same_moves(a: Moves, b: Moves) -> None:
    """They are the same tables, bit for bit."""
    for name in ("start", "row", "by"):
        same(getattr(a, name), getattr(b, name))
