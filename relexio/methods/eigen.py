"""Top eigenpairs of a T x T operator A = M M^T by block power iteration, one application of A at a time.

Plain power iteration throws its past iterates away. Keeping them (a block Krylov space, with a Rayleigh-Ritz step
in it) finds the same directions in far fewer applications, and needs at most about T of them however small the gap.
That matters to the ``blocks`` solver, for which one application is one pass over the data.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

Matrix = np.ndarray
#: Yields X [T, k], is sent A X [T, k], returns the eigenpairs.
Iteration = Generator[Matrix, Matrix, "Eigenpairs"]

_TOLERANCE = 1e-12  # of sigma_1^2: how near every |A u - sigma^2 u| must come to 0
_GUARD = 2  # extra columns that are iterated along, so that a close next eigenvalue does not slow the wanted ones


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues sigma^2 [r], descending, and unit eigenvectors u [T, r] of M M^T, float64."""

    values: np.ndarray
    vectors: np.ndarray


def power_iteration(size: int, rank: int) -> Iteration:
    """Iterate from a fixed start until every |A u - sigma^2 u| <= 1e-12 sigma_1^2, or the space is full.

    ``size`` is T, ``rank`` how many pairs are wanted (at most T). Signs: the last component of each u is >= 0,
    so that the coefficient at the last step of the window is.
    """
    block = min(size, rank + _GUARD)
    start = np.random.default_rng(0).standard_normal((size, block))
    start[:, 0] = np.arange(1, size + 1)  # coefficients grow about linearly: begin there
    basis, images = np.empty((size, 0)), np.empty((size, 0))
    fresh = _orthonormal(start, basis)
    while True:
        basis = np.hstack([basis, fresh])
        images = np.hstack([images, (yield fresh)])
        values, vectors, residual = _ritz(basis, images, rank)
        scale = max(abs(values[0]), np.finfo(float).tiny)
        unfinished = np.linalg.norm(residual, axis=0) > _TOLERANCE * scale
        fresh = _orthonormal(residual[:, unfinished], basis)
        if not unfinished.any() or fresh.shape[1] == 0:
            sign = np.where(vectors[-1] < 0, -1.0, 1.0)
            return Eigenpairs(np.maximum(values, 0.0), vectors * sign)


def _ritz(basis: Matrix, images: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """The best eigenpairs within span(basis), and their residuals A u - sigma^2 u."""
    small = basis.T @ images
    values, mix = np.linalg.eigh((small + small.T) / 2)
    values, mix = values[::-1][:rank], mix[:, ::-1][:, :rank]
    vectors = basis @ mix
    return values, vectors, images @ mix - vectors * values


def _orthonormal(columns: Matrix, basis: Matrix) -> Matrix:
    """An orthonormal basis of what the columns add to span(basis); twice is enough (Kahan, Parlett)."""
    room = columns.shape[0] - basis.shape[1]
    norms = np.linalg.norm(columns, axis=0)
    columns = columns[:, norms > 0] / norms[norms > 0]
    for _ in range(2):
        columns = columns - basis @ (basis.T @ columns)
    left, weight, _ = np.linalg.svd(columns, full_matrices=False)
    left = left[:, : min(room, int(np.count_nonzero(weight > 1e-8)))]
    left = left - basis @ (basis.T @ left)
    return np.linalg.qr(left)[0]


def solve(iteration: Iteration, apply: Callable[[Matrix], Matrix]) -> Eigenpairs:
    """Run one iteration to its end with A given as a function."""
    try:
        wanted = next(iteration)
        while True:
            wanted = iteration.send(apply(wanted))
    except StopIteration as end:
        return end.value
