"""Is a single element's way a line? The share of elements that have one, beside what walks without direction have.

Wang et al. 2026 (RLVR-Linearity, arXiv 2601.04537) call an element linear if a line over the steps has r_squared above 0.7.
"""

from dataclasses import dataclass

import numpy as np

#: Above this r_squared an element counts as linear.
LINEAR = 0.7
#: The published code leaves out elements that take fewer different values over the steps.
VALUES = 4
_MOMENTUM = 0.9  # Adam's beta_1, and the correlation of updates that follow each other
_GRID = np.arange(-45.0, 60.0, 0.05)  # log u: below and above it, what is integrated is under 1e-17


@dataclass(frozen=True)
class Linearity:
    """Elements looked at in so many ``blocks`` of ``all_blocks``; those that moved within the window; those with VALUES.

    ``linear`` and ``several_linear`` are how many have r_squared above LINEAR; ``walk`` and ``momentum`` the shares that a
    random walk has, and one whose updates are correlated at 0.9 from step to step.
    """

    blocks: int
    all_blocks: int
    elements: int
    moved: int
    linear: int
    several: int
    several_linear: int
    walk: float
    momentum: float

    @property
    def share(self) -> float | None:
        """The share that is linear of what moved; None where nothing did."""
        return self.linear / self.moved if self.moved else None

    @property
    def several_share(self) -> float | None:
        """The share that is linear of what took VALUES or more; None where nothing did."""
        return self.several_linear / self.several if self.several else None


def null_shares(steps: np.ndarray) -> tuple[float, float]:
    """The share of elements that are linear at steps [T], T > 2, of a random walk, and of one with momentum.

    Walks of real numbers, with an update at each training step. Nothing is drawn.
    """
    since = (steps - steps[0])[1:].astype(np.float64)  # where a walk is at the first step has no influence

    def variance(count: np.ndarray) -> np.ndarray:
        """That of the sum of so many neighbouring updates: of a stationary AR(1) process."""
        return count * (1 + _MOMENTUM) / (1 - _MOMENTUM) - 2 * _MOMENTUM * (1 - _MOMENTUM**count) / (1 - _MOMENTUM) ** 2

    apart = np.abs(np.subtract.outer(since, since))
    own = variance(since)
    momentum = (np.add.outer(own, own) - variance(apart)) / 2
    return _share(steps, np.minimum.outer(since, since)), _share(steps, momentum)


def _share(steps: np.ndarray, covariance: np.ndarray) -> float:
    """The probability that r_squared is above LINEAR for a Gaussian way, 0 at the first step, of this covariance after it.

    r_squared > c means y^T A y > 0, where A = x x^T / |x|^2 - c C, x are the centred steps and C centres. That is a sum of
    independent squares, weighted by the eigenvalues of A times the covariance; its sign has Imhof's integral (Biometrika 48,
    1961), which the trapezoidal rule gives to all digits over log u.
    """
    x = steps - steps.mean()
    form = np.outer(x, x) / (x @ x) - LINEAR * (np.eye(len(x)) - 1.0 / len(x))
    root = np.linalg.cholesky(covariance)
    values = np.linalg.eigvalsh(root.T @ form[1:, 1:] @ root)
    terms = np.outer(np.exp(_GRID), values / np.abs(values).max())
    angle, size = np.arctan(terms).sum(axis=1) / 2, np.log1p(terms**2).sum(axis=1) / 4
    return float(0.5 + np.diff(_GRID).mean() / np.pi * (np.sin(angle) * np.exp(-size)).sum())


def r_squared(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """r_squared [n] of lines over steps [T] through values float64 [n, T] that vary."""
    x, centred = steps - steps.mean(), values - values.mean(axis=1, keepdims=True)
    return (centred @ x) ** 2 / ((x @ x) * np.einsum("nt,nt->n", centred, centred))
