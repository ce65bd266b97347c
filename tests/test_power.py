"""Power iteration finds the eigenpairs that LAPACK finds, and rounding is right to the last bit."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relexio.dtypes import KINDS, from_float64, nonfinite, to_float64
from relexio.methods.curves import fit_line, line_weights
from relexio.methods.eigen import Eigenpairs, power_iteration, solve
from tests.support.make import BF16, rounded


def eigenpairs(gram: np.ndarray, rank: int) -> tuple[Eigenpairs, list[int]]:
    applied: list[int] = []

    def apply(x: np.ndarray) -> np.ndarray:
        applied.append(x.shape[1])
        return gram @ x

    return solve(power_iteration(len(gram), rank), apply), applied


@settings(deadline=None)
@given(size=st.integers(1, 40), rank=st.integers(1, 5), decay=st.floats(0.05, 0.999), seed=st.integers(0, 100))
def test_eigenpairs_are_those_of_lapack(size: int, rank: int, decay: float, seed: int) -> None:
    rank = min(rank, size)
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    values = decay ** np.arange(size)
    gram = (basis * values) @ basis.T
    found, applied = eigenpairs(gram, rank)
    np.testing.assert_allclose(found.values, values[:rank], atol=1e-11)
    projector, want = found.vectors @ found.vectors.T, basis[:, :rank] @ basis[:, :rank].T
    gap = values[rank - 1] - (values[rank] if rank < size else 0.0)
    np.testing.assert_allclose(projector, want, atol=1e-11 / gap)
    assert (found.vectors[-1] >= 0).all(), "the coefficient at the last step is positive"
    assert sum(applied) <= size + rank + 2, "never more than the whole space"


@pytest.mark.parametrize(
    "gram",
    [
        np.zeros((4, 4)),
        np.eye(5),
        np.outer([1, -3, 3, -1], [1, -3, 3, -1]).astype(float),  # no overlap with any low polynomial
        np.diag([0, 0, 7.0, 0]),
        np.array([[4.0]]),
    ],
)
def test_hard_cases(gram: np.ndarray) -> None:
    found, _ = eigenpairs(gram, 1)
    np.testing.assert_allclose(found.values[0], np.linalg.eigvalsh(gram)[-1], atol=1e-12)
    np.testing.assert_allclose(gram @ found.vectors, found.vectors * found.values, atol=1e-10)


def exact(value: float, dtype: np.dtype) -> float:
    """The nearest number of a type to a float64, ties to even, by exact fractions over its neighbours."""
    guess = np.array(value).astype(np.float32).astype(dtype)
    bits = guess.view(np.uint16)
    near = [np.array((int(bits) + d) % 65536, np.uint16).view(dtype)[()] for d in (-1, 0, 1)]
    usable = [n for n in near if np.isfinite(float(n))]
    return float(min(usable, key=lambda n: (abs(Fraction(float(n)) - Fraction(value)), int(n.view(np.uint16)) & 1)))


@settings(max_examples=500)
@given(st.floats(-6e4, 6e4), st.sampled_from(["bf16", "f16"]), st.integers(-40, 0))
def test_rounding_happens_once(value: float, kind: str, scale: int) -> None:
    dtype = BF16 if kind == "bf16" else np.dtype("float16")
    value = value * 2.0**scale
    found = from_float64(np.array([value]), KINDS[kind]).view(dtype)[0]
    assert float(found) == exact(value, dtype)
    assert kind == "f16" or float(rounded(np.array([value]), BF16)[0]) == exact(value, BF16)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_near_ties_that_two_roundings_get_wrong(kind: str) -> None:
    bits = np.arange(0x0400, 0x7000, 7, dtype=np.uint16)
    low, high = to_float64(bits, KINDS[kind]), to_float64(bits + np.uint16(1), KINDS[kind])
    middle, crumb = (low + high) / 2, (high - low) * 2.0**-40
    np.testing.assert_array_equal(from_float64(middle - crumb, KINDS[kind]), bits)
    np.testing.assert_array_equal(from_float64(middle + crumb, KINDS[kind]), bits + 1)
    np.testing.assert_array_equal(from_float64(middle, KINDS[kind]), bits + (bits & 1))


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32"])
def test_every_pattern_of_bits_survives(kind: str) -> None:
    dtype = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}[kind]
    bits = np.arange(0, 1 << 16, dtype=np.uint16) if kind != "f32" else np.arange(0, 1 << 32, 65537, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        want = bits.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(to_float64(bits, KINDS[kind]), want)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(nonfinite(bits, KINDS[kind]), ~finite)
    np.testing.assert_array_equal(from_float64(want[finite], KINDS[kind]), bits[finite])
    assert np.isinf(to_float64(from_float64(np.array([1e300]), KINDS[kind]), KINDS[kind]))
    assert np.isnan(to_float64(from_float64(np.array([np.nan]), KINDS[kind]), KINDS[kind]))


def test_line_weights_read_the_line_off() -> None:
    rng = np.random.default_rng(0)
    steps = np.array([3, 4, 10, 31, 100])
    values = rng.standard_normal(5)
    line = fit_line(steps, values)
    slope, intercept = np.polyfit(steps, values, 1)
    np.testing.assert_allclose([line.slope, line.intercept], [slope, intercept])
    found = line_weights(steps, np.array([500, 7])).T @ values
    np.testing.assert_allclose(found, slope * np.array([500, 7]) + intercept)
    residual = values - slope * steps - intercept
    np.testing.assert_allclose(line.r_squared, 1 - residual.var() / values.var())
