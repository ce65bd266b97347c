"""The line: coefficients over real step numbers, by least squares."""

from dataclasses import dataclass

import numpy as np


def line_weights(steps: np.ndarray, at: float) -> np.ndarray:
    """The weights l [T] with which a least-squares line through values y at ``steps`` is read off: c_hat(at) = l . y.

    The steps are real step numbers (int or float [T], at least two different ones).
    """
    centred = steps - steps.mean()
    return 1.0 / len(steps) + centred * ((at - steps.mean()) / (centred @ centred))


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
    left = float(((values - slope * steps - intercept) ** 2).sum())
    return Line(slope, intercept, 1.0 - left / spread if spread > 0 else 1.0)
