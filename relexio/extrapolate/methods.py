"""The methods: pure functions (Gram matrix, steps, target step) -> T weights, one for each observed delta.

A predicted tensor is theta_0 + M^T w, where row t of M is the delta at step s_t. In formulas below, P = U U^T
projects on the top-r eigenvectors of the Gram matrix M M^T, and l(s) are the weights by which a least-squares line
through T values is read off at s. The paper writes the same as v = M^T u / sigma, c = sigma u, a line through c,
theta_0 + c_hat v: since c_hat = l . (sigma u), M^T w with w = u u^T l is c_hat v.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from relexio.errors import RequestError
from relexio.extrapolate.fit import line_weights
from relexio.power import power_iteration, solve

Vector = np.ndarray
Matrix = np.ndarray


def directions(gram: Matrix, rank: int) -> Matrix:
    """The top-r eigenvectors U [T, r] of the Gram matrix [T, T], by power iteration."""
    return solve(power_iteration(len(gram), rank), lambda x: gram @ x).vectors


def relex(gram: Matrix, steps: Vector, target: int, rank: int, strength: float) -> Vector:
    """RELEX (arXiv 2605.21468, section 4): a line through the coefficients, rebuilt from the base. w = strength P l(s)."""
    u = directions(gram, rank)
    return strength * (u @ (u.T @ line_weights(steps, target)))


def pinned(gram: Matrix, steps: Vector, target: int, rank: int, strength: float) -> Vector:
    """The line's increment added to the last checkpoint. w = e_T + strength P (l(s) - l(s_T))."""
    u = directions(gram, rank)
    step_on = line_weights(steps, target) - line_weights(steps, steps[-1])
    weights = strength * (u @ (u.T @ step_on))
    weights[-1] += 1.0
    return weights


def reconstruct(gram: Matrix, steps: Vector, target: int, rank: int, strength: float) -> Vector:
    """What rank r keeps of an observed step t (paper, Finding 1). w = strength P e_t."""
    found = np.flatnonzero(steps == target)
    if not len(found):
        raise RequestError(
            f"step {target} is not in the window {steps[0]}..{steps[-1]}: only observed steps are reconstructed"
        )
    u = directions(gram, rank)
    return strength * (u @ u[found[0]])


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods: what it is called, what it needs, and what computes its weights."""

    name: str
    weights: Callable[[Matrix, Vector, int, int, float], Vector]
    least_steps: int = 2
    extrapolates: bool = True


METHODS = {
    method.name: method
    for method in (
        Method("relex", relex),
        Method("pinned", pinned),
        Method("reconstruct", reconstruct, least_steps=1, extrapolates=False),
    )
}


_MOST_STRENGTH = 1e100  # its square is still a float64


@dataclass(frozen=True)
class Recipe:
    """How to predict: method, rank, and strength lambda (1 is the method as published)."""

    method: str = "relex"
    rank: int = 1
    strength: float = 1.0

    def check(self, steps: Vector, targets: list[int]) -> None:
        """Raise RequestError, naming the limit, where this recipe cannot be used on a window for these targets."""
        method = METHODS.get(self.method)
        if method is None:
            raise RequestError(f"unknown method {self.method!r}; known are {', '.join(METHODS)}")
        if len(steps) < method.least_steps:
            raise RequestError(
                f"a window of {len(steps)} step cannot be fitted: a line needs at least 2 observed steps"
            )
        if type(self.rank) is not int or not 1 <= self.rank <= len(steps):
            raise RequestError(
                f"--rank {self.rank} does not fit a window of {len(steps)} steps; give 1 to {len(steps)}"
            )
        if not abs(self.strength) <= _MOST_STRENGTH:
            raise RequestError(f"--strength {self.strength} is not a number of reasonable size")
        for target in targets:
            if type(target) is not int or target < 0 or target > 10**15:
                raise RequestError(f"--step {target} is not a training step")
            if method.extrapolates and target <= steps[-1]:
                raise RequestError(
                    f"--step {target} is not beyond the window, which ends at step {steps[-1]}; give a later step, "
                    f"a window that ends earlier, or --method reconstruct"
                )
            if not method.extrapolates and target not in steps:
                raise RequestError(
                    f"--step {target}: --method {self.method} needs a step of the window {steps[0]}..{steps[-1]}"
                )

    def weights(self, gram: Matrix, steps: Vector, target: int) -> Vector:
        """The T weights of this recipe for one tensor's Gram matrix [T, T]; zeros for a tensor that never changed."""
        if not gram.any():
            return np.zeros(len(steps))
        return METHODS[self.method].weights(gram, steps, target, self.rank, self.strength)
