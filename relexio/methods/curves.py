"""Curves through values over real step numbers: a line (the paper's), polynomials, a sinusoid; and refitting on the way.

All of them are least squares, and scale with their values: a curve through c u is c times the curve through u. So a
coefficient sigma u can be read off as sigma times what is read off u.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from relexio.errors import RequestError

#: The curves by name, and how many steps each needs at least: as many as it has parameters, and a sinusoid one more, since
#: waves of almost any frequency go through four points.
CURVES = {"line": 2, "poly2": 3, "poly3": 4, "sinusoid": 5}
_MOST_REFITS = 100_000
_FREQUENCIES, _ZOOM, _ZOOMS = 128, 17, 7  # how many are tried at first, then around the best, and how often


def line_weights(steps: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The weights l [T, S] with which a least-squares line through values y is read off: c_hat(at) = l^T y.

    ``steps`` are real step numbers (int or float [T], at least two different ones), ``at`` those to read off [S].
    """
    centred = steps - steps.mean()
    return 1.0 / len(steps) + np.outer(centred, (at - steps.mean()) / (centred @ centred))


def read_off(curve: str, steps: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Curves through values [..., T, r] over steps [T], one a column, read off at [S]: float64 [..., S, r]."""
    if curve == "line":
        return line_weights(steps, at).T @ values
    moved = np.moveaxis(values, -2, 0)
    columns = moved.reshape(len(steps), -1)
    if curve == "sinusoid":
        found = _sinusoids(steps, columns, at)
    else:
        found = _polynomial(steps, columns, at, int(curve.removeprefix("poly")))
    return np.moveaxis(found.reshape(len(at), *moved.shape[1:]), 0, -2)


def _polynomial(steps: np.ndarray, values: np.ndarray, at: np.ndarray, degree: int) -> np.ndarray:
    """A polynomial in steps that are centred and scaled first: powers of 500 would cost all digits.

    As numpy.polynomial.Polynomial.fit, which takes the values of one curve only.
    """
    middle, half = steps.mean(), np.ptp(steps) / 2
    powers = np.vander((steps - middle) / half, degree + 1)
    return np.vander((at - middle) / half, degree + 1) @ np.linalg.lstsq(powers, values, rcond=None)[0]


def _sinusoids(steps: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each column of values [T, C] A sin(2 pi f s + phi) + C (RELEX's ablation), the frequency f from ever finer grids.

    For a given f the rest is linear least squares. From a quarter of a period over the window to one in two steps: what
    is nearly straight asks for ever smaller f, where a sinusoid is a parabola with a huge amplitude.
    """
    span = float(np.ptp(steps))
    grid = np.geomspace(0.25 / span, max((len(steps) - 1) / 2, 0.5) / span, _FREQUENCIES)[None]  # [C or 1, F]
    each = np.arange(values.shape[1])
    for _ in range(_ZOOMS):
        along = np.linalg.qr(_waves(steps, grid))[0].swapaxes(-1, -2) @ values.T[:, None, :, None]
        explained = (along[..., 0] ** 2).sum(axis=-1)
        equal = 1e-9 if grid.shape[1] == _FREQUENCIES else 0.0  # of waves that fit equally well, the slowest
        best = np.argmax(explained >= (1 - equal) * explained.max(axis=1, keepdims=True), axis=1)
        grid = np.broadcast_to(grid, explained.shape)
        low, high = grid[each, np.maximum(best - 1, 0)], grid[each, np.minimum(best + 1, grid.shape[1] - 1)]
        found, grid = grid[each, best], np.linspace(low, high, _ZOOM, axis=1)
    fits = zip(_waves(steps, found), _waves(at, found), values.T, strict=True)
    return np.stack([there @ np.linalg.lstsq(here, y, rcond=None)[0] for here, there, y in fits], axis=1)


def _waves(steps: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """sin, cos and 1 at every step [T], for every frequency [...]: [..., T, 3]."""
    turns = 2 * np.pi * (frequencies[..., None] * steps)
    return np.stack([np.sin(turns), np.cos(turns), np.ones_like(turns)], axis=-1)


def check_refits(steps: np.ndarray, target: float, every: int) -> None:
    """Raise RequestError for a target more than 100,000 fits away."""
    if (target - steps[-1]) / (_distance(steps) * every) > _MOST_REFITS:
        raise RequestError(f"step {target:.0f} is more than {_MOST_REFITS:,} refits away; give a larger --refit")


def _distance(steps: np.ndarray) -> float:
    return max(float(np.median(np.diff(steps))), 1.0)


def read_off_refitting(curve: str, steps: np.ndarray, values: np.ndarray, at: np.ndarray, every: int) -> np.ndarray:
    """As ``read_off``, but with a fit that moves on: read off the next ``every`` steps, add them, drop the first, fit again.

    The window keeps its T points, and continues at the median distance of its steps. A target is read off the fit that is
    nearest before it.
    """
    if curve == "sinusoid":
        return _refitted(curve, steps, values, at, every)
    return _refit_weights(curve, tuple(steps.tolist()), tuple(at.tolist()), every) @ values


@lru_cache(maxsize=64)
def _refit_weights(curve: str, steps: tuple[float, ...], at: tuple[float, ...], every: int) -> np.ndarray:
    """What is read off a curve that is linear in its values depends on them by weights [S, T], the same for all tensors."""
    return _refitted(curve, np.array(steps), np.eye(len(steps)), np.array(at), every)


def _refitted(curve: str, steps: np.ndarray, values: np.ndarray, at: np.ndarray, every: int) -> np.ndarray:
    gap, size = _distance(steps), len(steps)
    result = np.empty((*values.shape[:-2], len(at), values.shape[-1]))
    steps = steps.astype(np.float64)
    for target in np.argsort(at, kind="stable"):
        while at[target] > steps[-1] + gap * every:
            ahead = steps[-1] + gap * np.arange(1, every + 1)
            values = np.concatenate([values, read_off(curve, steps, values, ahead)], axis=-2)[..., -size:, :]
            steps = np.concatenate([steps, ahead])[-size:]
        result[..., target, :] = read_off(curve, steps, values, at[target : target + 1])[..., 0, :]
    return result


@dataclass(frozen=True)
class Line:
    """c(s) = slope s + intercept, with the share r_squared of the values' variance that it explains."""

    slope: float
    intercept: float
    r_squared: float


def fit_line(steps: np.ndarray, values: np.ndarray) -> Line:
    """Least-squares line through values [T] over steps [T]; r_squared is 1 where the values do not vary."""
    centred = steps - steps.mean()
    slope = float(centred @ values / (centred @ centred))
    intercept = float(values.mean() - slope * steps.mean())
    spread = float(((values - values.mean()) ** 2).sum())
    residual = float(((values - slope * steps - intercept) ** 2).sum())
    return Line(slope, intercept, 1.0 - residual / spread if spread > 0 else 1.0)
