"""The paper's findings in T-space: how few directions a run needs, how straight it runs, and what rank r throws away."""

from dataclasses import dataclass

import numpy as np

from relexio.methods.curves import Line, fit_line
from relexio.methods.registry import Window
from relexio.methods.roles import layer_of, part_of

SPECTRUM = 10  # directions whose shares of the energy are given


@dataclass(frozen=True)
class TensorFindings:
    """One tensor that moved: its share of changed elements, spectrum, coefficients, and the line through them.

    ``energy`` is the share of sigma^2 that the rank keeps, ``sigma2`` the sum of it over all directions, trace(G).
    ``spectrum`` [<= 10]: shares of it by direction. ``coefficients`` [T] are those of the first direction.
    """

    name: str
    changed: float
    energy: float
    sigma2: float
    spectrum: np.ndarray
    coefficients: np.ndarray
    line: Line

    @property
    def part(self) -> str:
        """The part of the model that it belongs to."""
        return part_of(self.name)

    @property
    def layer(self) -> int | None:
        """The number of its layer, None for a tensor outside."""
        return layer_of(self.name)


def find(window: Window, rank: int, name: str = "", changed: float = 0.0) -> TensorFindings:
    """Measure one tensor that moved, over at least two steps."""
    gram, u = window.gram, window.directions(rank)[:, 0]
    sigma2 = float(np.trace(gram))
    energy = min(max(1.0 - float(np.trace(left_over(window, rank))) / sigma2, 0.0), 1.0)
    spectrum = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)[:SPECTRUM] / sigma2
    coefficients = np.sqrt(max(u @ gram @ u, 0.0)) * u
    return TensorFindings(name, changed, energy, sigma2, spectrum, coefficients, fit_line(window.steps, coefficients))


def left_over(window: Window, rank: int) -> np.ndarray:
    """The Gram matrix [T, T] of what the rank throws away: (1 - P) G (1 - P)."""
    u = window.directions(rank)
    complement = np.eye(len(u)) - u @ u.T
    return complement @ window.gram @ complement


def thrown_away(left: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The share of each delta that the rank throws away: |delta - P delta|^2 / |delta|^2, [T]; NaN for a delta of 0.

    ``left`` [T, T] is ``left_over``, ``lengths`` [T] are the squared lengths of the deltas.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(lengths > 0, np.maximum(np.diag(left), 0.0) / lengths, np.nan)


def alike(left: np.ndarray) -> np.ndarray:
    """Cosines of the neighbouring increments of what is thrown away, [T - 2]: about 0 is noise, above it a drift of its own."""
    steps = np.diff(np.eye(len(left)), axis=0)
    increments = steps @ left @ steps.T
    lengths = np.sqrt(np.maximum(np.diag(increments), 0.0))
    products = lengths[1:] * lengths[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(products > 0, np.diag(increments, 1) / products, np.nan)
