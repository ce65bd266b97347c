"""The methods: pure functions (window of one tensor, target steps, recipe) -> T weights for each target.

A predicted tensor is theta_start + lambda M^T b, where row t of M is the delta at step s_t; it starts from the base, or
from the last checkpoint of the window. Below, P = U U^T projects on the top-r eigenvectors of the Gram matrix M M^T, and
l(s) are the weights by which a curve through T values is read off at s. The paper writes the same as v = M^T u / sigma,
c = sigma u, a line through c, theta_0 + c_hat v: since c_hat = l . (sigma u), M^T b with b = u u^T l is c_hat v.
"""

from typing import TYPE_CHECKING

import numpy as np

from relexio.methods.mix import delta_weights
from relexio.methods.registry import Matrix, Vector, Window, method

if TYPE_CHECKING:
    from relexio.methods.recipe import Recipe

_CURVE = ("rank", "fit", "refit")
_ROUNDING = 1e-12  # of sums of squares over a tensor


@method(
    "relex",
    "A curve through the coefficients of the top directions, rebuilt from the base.",
    "RELEX (Wei et al. 2026, arXiv 2605.21468), section 4",
    uses=_CURVE,
    least_steps=2,
)
def relex(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b = P l(s): a curve through the coefficients of the top directions."""
    return _curve(window, targets, recipe)[..., :-1]


@method(
    "pinned",
    "The increment of that curve, added to the last checkpoint.",
    "RELEX, pinned to the latest checkpoint as the verl fork by shamanez does",
    uses=_CURVE,
    least_steps=2,
    from_last=True,
)
def pinned(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b = P (l(s) - l(s_T)): the curve's increment alone."""
    weights = _curve(window, targets, recipe)
    return weights[..., :-1] - weights[..., -1:]


@method(
    "reconstruct",
    "What the top directions keep of an observed step; nothing is extrapolated.",
    "RELEX, Finding 1",
    uses=("rank",),
    extrapolates=False,
)
def reconstruct(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b = P e_t: what rank r keeps of an observed step t."""
    u = window.directions(recipe.rank)
    return u @ u[np.searchsorted(window.steps, targets)].T


@method(
    "two-point",
    "The same chord; norms stay as they are in the last checkpoint.",
    "RLVR-Linearity (Wang et al. 2026, arXiv 2601.04537), weight extrapolation",
    least_steps=2,
    from_last=True,
    keeps_norms=True,
    needs_base=False,
)
@method(
    "secant",
    "From the last checkpoint on, along the chord from the window's first to its last.",
    "the secant line of numerical analysis; no direction, no rank",
    least_steps=2,
    from_last=True,
    needs_base=False,
)
def secant(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b = f (e_T - e_1) with f = (s - s_T) / (s_T - s_1): on along the chord from the first to the last checkpoint."""
    first, last = window.steps[0], window.steps[-1]
    factor = (targets - last) / (last - first)
    return np.outer(_unit(window, -1) - _unit(window, 0), factor)


@method(
    "scaled-last",
    "The last delta times s / s_T, from the base.",
    "ExPO (Zheng et al., ACL 2025, arXiv 2404.16792), with alpha from the step numbers",
    from_zero=True,
)
def scaled_last(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b = (s / s_T) e_T: the last delta, as if all steps since step 0 went on like this."""
    return np.outer(_unit(window, -1), targets / window.steps[-1])


@method(
    "scaled-first",
    "The first delta times s / s_1, from the base.",
    "alpha of basetenlabs/relex-replication, from the step numbers",
    from_zero=True,
)
def scaled_first(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b = (s / s_1) e_1: the first delta, as if all steps were like it."""
    return np.outer(_unit(window, 0), targets / window.steps[0])


@method(
    "mean",
    "The mean of the window's last k checkpoints, whatever the target.",
    "LAWA (Kaddour 2022, arXiv 2209.14981)",
    uses=("last",),
    stays=True,
    fixed=True,
    needs_base=False,
)
def mean(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b = (e_{T-k+1} + ... + e_T) / k: the mean of the last k checkpoints, whatever the target."""
    count = recipe.last or len(window.steps)
    weights = np.where(np.arange(len(window.steps)) >= len(window.steps) - count, 1.0 / count, 0.0)
    return np.tile(weights[:, None], len(targets))


@method(
    "ema",
    "An exponential mean over the window that reaches back about k checkpoints.",
    "iterate averaging (Polyak and Juditsky 1992), with decay 1 - 2 / (k + 1)",
    uses=("last",),
    stays=True,
    fixed=True,
    needs_base=False,
)
def ema(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b_i ~ (1 - 2 / (k + 1))^(T - i), adding up to 1: an exponential mean, whatever the target."""
    count = recipe.last or len(window.steps)
    weights = (1.0 - 2.0 / (count + 1)) ** np.arange(len(window.steps))[::-1]
    return np.tile((weights / weights.sum())[:, None], len(targets))


@method(
    "rre",
    "Towards the limit that the window heads for, whatever the target; uneven steps by their speeds.",
    "reduced rank extrapolation (Eddy 1979, Mesina 1977), one checkpoint on, as in Anderson acceleration",
    least_steps=3,
    from_last=True,
    needs_base=False,
    whole=True,
    fixed=True,
)
def rre(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b = sum_i gamma_i e_{i+1} - e_T, where gamma adds up to 1, and |sum_i gamma_i u_i| is least.

    u_i = (theta_{i+1} - theta_i) / (s_{i+1} - s_i), i = 1 ... T - 1: over evenly spaced steps the differences of the
    literature, but for a factor. Of several gamma the shortest: eigenvalues that are rounding, below 1e-12 of the squares
    that speeds are differences of, count as 0. So a straight line, which has no limit, gets the mean of its last T - 1.
    """
    count = len(window.steps) - 1
    differ = np.diff(np.eye(count + 1), axis=0) / np.diff(window.steps)[:, None]
    speeds = differ @ window.gram @ differ.T
    lengths = np.sqrt(np.diagonal(window.gram, axis1=-2, axis2=-1))
    rounding = _ROUNDING * ((lengths @ np.abs(differ).T) ** 2).max(axis=-1, keepdims=True)
    even = np.full((count, 1), 1.0 / count)
    basis = np.linalg.svd(even.T)[2][1:].T  # of what adds up to 0, which gamma is but for even
    values, vectors = np.linalg.eigh(basis.T @ speeds @ basis)
    found, real = basis @ vectors, (values > rounding)[..., None]
    pull = found.swapaxes(-1, -2) @ (speeds @ even)
    gamma = even - found @ np.divide(pull, values[..., None], out=np.zeros_like(pull), where=real)
    last = _unit(window, -1)[:, None]
    return np.repeat(np.insert(gamma, 0, 0.0, axis=-2) - last, len(targets), axis=-1)


@method(
    "mix",
    "The base and observed checkpoints with the weights that you give; nothing is extrapolated, nothing is judged.",
    "task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089), over the steps of one run",
    uses=("weights",),
    extrapolates=False,
    aims=False,
)
def mix(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """b_t = w_t, the weight given to step t; the base has the rest of 1."""
    return np.tile(delta_weights(recipe.mix or "", window.steps)[:, None], len(targets))


def _curve(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """P l(s) at the targets and, last, at the window's last step: [..., T, S + 1]. It is kept: two methods begin with it."""
    key = recipe.rank, recipe.curve, recipe.refit, targets.tobytes()
    if key not in window.kept:
        u = window.directions(recipe.rank)
        read = recipe.read_off(window.steps, u, np.append(targets, window.steps[-1]))
        window.kept[key] = u @ read.swapaxes(-1, -2)
    return window.kept[key]


def _unit(window: Window, index: int) -> Vector:
    unit = np.zeros(len(window.steps))
    unit[index] = 1.0
    return unit
