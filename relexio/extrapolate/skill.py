"""Skill: how near a prediction comes to a step that was really observed. From the Gram matrix alone."""

from dataclasses import dataclass

import numpy as np

from relexio.extrapolate.methods import Recipe


def squared_error(gram: np.ndarray, weights: np.ndarray, n: int) -> float:
    """|theta_hat - theta_n|^2 of the prediction with ``weights`` against observed step index n.

    w^T G w - 2 w^T G[:, n] + G[n, n], with weights [T] over the same steps as the Gram matrix [T, T].
    """
    gap = weights.copy()
    gap[n] -= 1.0
    return max(float(gap @ gram @ gap), 0.0)


@dataclass(frozen=True)
class Errors:
    """Squared errors of a prediction and of keeping the last checkpoint; they add up over tensors."""

    predicted: float = 0.0
    kept: float = 0.0

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(self.predicted + other.predicted, self.kept + other.kept)

    @property
    def skill(self) -> float | None:
        """1 - predicted / kept: above 0 beats keeping the last checkpoint; None where that is exact."""
        return 1.0 - self.predicted / self.kept if self.kept > 0 else None


def held_out(gram: np.ndarray, steps: np.ndarray, window: int, n: int, recipe: Recipe) -> Errors:
    """Errors at observed step index n of a recipe fitted on the first ``window`` of the steps (n >= window)."""
    weights = np.zeros(len(steps))
    weights[:window] = recipe.weights(gram[:window, :window], steps[:window], int(steps[n]))
    keep = np.zeros(len(steps))
    keep[window - 1] = 1.0
    return Errors(squared_error(gram, weights, n), squared_error(gram, keep, n))


def backtest_window(count: int) -> int | None:
    """How many of ``count`` observed steps the standard backtest fits on, predicting the last; None if too few."""
    window = max(2, (2 * count) // 3)
    return window if window < count else None
