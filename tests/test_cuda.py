"""The kernels for a GPU, run on the stand-in for CuPy: their tables, sums and bits are those of the loops for a CPU.

What a real device has to do is in test_gpu.py.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings

from relexio.dtypes import KINDS, Kind, from_float64, nonfinite, to_float64
from relexio.loops import Stream, cuda
from tests.support.device import StandIn
from tests.support.moves import DAMAGED, FLOATS, Case, as_loops_do, cases

BF16 = KINDS["bf16"]


@contextmanager
def standing_in() -> Iterator[StandIn]:
    cupy = StandIn()
    with mock.patch.dict(sys.modules, {"cupy": cupy}), cupy.cuda.Stream(non_blocking=True):
        yield cupy


@settings(max_examples=200)
@given(cases(FLOATS))
def test_what_kernels_give_are_the_bits_of_the_loops(case: Case) -> None:
    with standing_in() as cupy:
        as_loops_do(cupy, case)


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_results_are_rounded_once_to_nearest_even(kind: Kind) -> None:
    """Every finite number, what is halfway to the next and beside that, subnormal and too large ones, infinity and NaN."""
    rng = np.random.default_rng(4)
    every = np.arange(1 << 16, dtype=np.uint16)
    bits = every if kind.itemsize == 2 else rng.integers(0, 1 << 32, 1 << 16, np.uint32)
    bits = bits[~nonfinite(bits, kind)]
    one = np.dtype(kind.bits).type(1)
    with np.errstate(all="ignore"):
        exact = to_float64(bits, kind)
        half = (exact + to_float64(bits + one, kind)) / 2
        wide = [half, np.nextafter(half, np.inf), np.nextafter(half, -np.inf), exact * 2.0**-30, exact * 1e4]
    values = np.concatenate([exact, *wide, [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, 1e308]])
    with standing_in() as cupy:
        table = cupy.asarray(np.full((1, 1), 2, kind.bits))  # from 0 to the smallest number: an increment of that
        base, smallest = cupy.asarray(np.zeros(1, kind.bits)), to_float64(np.ones(1, kind.bits), kind)[0]
        with np.errstate(all="ignore"):
            weights = values / smallest
            wanted = from_float64(np.where(np.isnan(weights), np.nan, weights * smallest + 0.0), kind)
        result, lost = cuda.predict(table, base, cupy.asarray(weights[None]), kind)
        np.testing.assert_array_equal(result.get()[:, 0], wanted)
        assert lost.get()[0] == np.count_nonzero(nonfinite(wanted, kind))


@pytest.mark.parametrize(("when", "by", "text"), DAMAGED)
def test_damage_is_named(when: list[int], by: list[int], text: str) -> None:
    stream = Stream(2, iter([np.array(when, np.uint8)]), iter([np.array(by, np.uint16)]))
    with standing_in(), pytest.raises(ValueError, match=text):
        reader = cuda.Reader([stream], BF16, 2)
        reader.take(10)
        reader.finish()


def test_no_more_chunks_are_taken_than_needed() -> None:
    """A chunk that reaches into the next tile stays on the device."""
    taken: list[int] = []

    def chunks() -> Iterator[np.ndarray]:
        for number in range(4):
            taken.append(number)
            yield np.full(4, 3, np.uint8)  # moves at cells 3, 7, 11, 15: of four columns, one each element

    with standing_in():
        reader = cuda.Reader([Stream(4, chunks(), iter([np.full(16, 2, np.uint16)]))], BF16, 4)
        tables = [reader.take(last).get() for last in (3, 6, 16)]
        assert taken == [0, 1, 2, 3]
        reader.finish()
    assert all((table[3] == 2).all() and not table[:3].any() for table in tables)


def test_nothing_is_taken_of_an_empty_chain() -> None:
    with standing_in():
        reader = cuda.Reader([], BF16, 1)
        assert not reader.take(5).get().any()
        reader.finish()
