"""Skill: how near a prediction comes to a step that was really observed. From the Gram matrix alone."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Errors:
    """Squared errors of a prediction and of its baseline, the last checkpoint kept; they add up over tensors."""

    predicted: float = 0.0
    baseline: float = 0.0

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(self.predicted + other.predicted, self.baseline + other.baseline)

    @property
    def skill(self) -> float | None:
        """1 - predicted / baseline: above 0 beats keeping the last checkpoint; None where that is exact."""
        return 1.0 - self.predicted / self.baseline if self.baseline > 0 else None


TERMS = 6


def terms(
    gram: np.ndarray, last: int, from_last: bool, window: slice, update: np.ndarray, held_out: np.ndarray
) -> np.ndarray:
    """What the errors of theta_start + lambda M^T b are made of, for any strength lambda: float64 [..., S, 6].

    ``gram`` [..., T, T] is over all steps, ``last`` the index of the last known one, and a prediction starts there or from the
    base. ``update`` [..., k, S] are the weights b of a ``window`` of k steps, for S predictions of the steps with the indices
    ``held_out`` [S]. Seen from the last known checkpoint, with x = start - e_last and y = e_n - e_last, the six are
    x G x, x G b, b G b, x G y, b G y, y G y. They add up over tensors.
    """
    at_y = gram[..., held_out] - gram[..., [last]]
    bb = (update * (gram[..., window, window] @ update)).sum(axis=-2)
    by = (update * at_y[..., window, :]).sum(axis=-2)
    yy = at_y[..., held_out, np.arange(len(held_out))] - at_y[..., last, :]
    if from_last:
        xx = xb = xy = np.zeros_like(yy)
    else:
        xx = np.broadcast_to(gram[..., last, [last]], yy.shape)
        xb, xy = -(gram[..., [last], window] @ update)[..., 0, :], -at_y[..., last, :]
    return np.stack([xx, xb, bb, xy, by, yy], axis=-1)


def errors(sums: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of the predictions and of their baseline, from terms [..., 6]: two arrays [...]."""
    xx, xb, bb, xy, by, yy = np.moveaxis(sums, -1, 0)
    moved = xx + 2 * strength * xb + strength**2 * bb
    return np.maximum(moved - 2 * (xy + strength * by) + yy, 0.0), yy


def ratio(predicted: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Skill from squared errors, 1 - predicted / baseline; NaN where the baseline is exact."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(baseline > 0, 1.0 - predicted / baseline, np.nan)


def cosine(sums: np.ndarray, strength: float) -> np.ndarray:
    """Cosine of the predicted and the real update from the last checkpoint, from terms [..., 6]; NaN without one."""
    xx, xb, bb, xy, by, yy = np.moveaxis(sums, -1, 0)
    moved = np.maximum(xx + 2 * strength * xb + strength**2 * bb, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        length = np.sqrt(moved * yy)
        return np.where(length > 0, (xy + strength * by) / length, np.nan)
