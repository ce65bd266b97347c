"""The paper's findings in T-space: how few directions a run needs, how straight it runs, and what rank r throws away."""

from dataclasses import dataclass

import numpy as np

from relexio.methods.curves import Line, fit_line
from relexio.methods.registry import directions

SPECTRUM = 10  # singular values that are told


@dataclass(frozen=True)
class Finding:
    """Of one tensor: shares of the energy by direction [<= 10], coefficients [T] of the first one, and the line through them.

    ``energy`` is trace(G), the sum of sigma^2 over all directions. ``left`` [T, T] is the Gram matrix of what the rank
    throws away, (1 - P) G (1 - P), and ``lengths`` [T] are the squared lengths of the deltas.
    """

    spectrum: np.ndarray
    coefficients: np.ndarray
    line: Line
    energy: float
    left: np.ndarray
    lengths: np.ndarray

    @property
    def kept(self) -> float:
        """The share of the energy that the rank keeps."""
        return min(max(1.0 - float(np.trace(self.left)) / self.energy, 0.0), 1.0)


def find(gram: np.ndarray, steps: np.ndarray, rank: int) -> Finding:
    """Measure one tensor that moved: its Gram matrix [T, T] over steps [T], T >= 2."""
    values = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    u = directions(gram, rank)
    rest = np.eye(len(gram)) - u @ u.T
    coefficients = np.sqrt(max(u[:, 0] @ gram @ u[:, 0], 0.0)) * u[:, 0]
    energy = float(np.trace(gram))
    left = rest @ gram @ rest
    return Finding(values[:SPECTRUM] / energy, coefficients, fit_line(steps, coefficients), energy, left, np.diag(gram))


def thrown_away(left: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The share of each delta that the rank throws away: |delta - P delta|^2 / |delta|^2, [T]; NaN for a delta of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lengths > 0, np.maximum(np.diag(left), 0.0) / lengths, np.nan)


def alike(left: np.ndarray) -> np.ndarray:
    """Cosines of the neighbouring increments of what is thrown away, [T - 2]: about 0 is noise, above it a drift of its own."""
    steps = np.diff(np.eye(len(left)), axis=0)
    increments = steps @ left @ steps.T
    lengths = np.sqrt(np.maximum(np.diag(increments), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lengths[1:] * lengths[:-1] > 0, np.diag(increments, 1) / (lengths[1:] * lengths[:-1]), np.nan)
