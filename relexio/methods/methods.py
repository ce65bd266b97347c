"""The methods: pure functions (window of one tensor, target steps) -> T weights for each target.

A predicted tensor is theta_start + lambda M^T w, where row t of M is the delta at step s_t, and it starts from the base
or from the last checkpoint of the window. In formulas below, P = U U^T projects on the top-r eigenvectors of the Gram
matrix M M^T, and l(s) are the weights by which a curve through T values is read off at s (a line, unless another is
asked for). The paper writes the same as v = M^T u / sigma, c = sigma u, a line through c, theta_0 + c_hat v: since
c_hat = l . (sigma u), M^T w with w = u u^T l is c_hat v.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from relexio.errors import RequestError
from relexio.methods.curves import CURVES, check_refits, read_off, read_off_refitting
from relexio.methods.eigen import power_iteration, solve

Vector = np.ndarray
Matrix = np.ndarray


def directions(gram: Matrix, rank: int) -> Matrix:
    """The top-r eigenvectors U [T, r] of the Gram matrix [T, T], by power iteration."""
    return solve(power_iteration(len(gram), rank), lambda x: gram @ x).vectors


@dataclass(frozen=True)
class Window:
    """All that a method sees of a tensor: the Gram matrix [T, T] of its deltas, and their real step numbers [T]."""

    gram: Matrix
    steps: Vector
    _found: dict[int, Matrix] = field(default_factory=dict, compare=False, repr=False)

    def directions(self, rank: int) -> Matrix:
        """The top-r eigenvectors U [T, r]; the first ones of more, if more were asked for before."""
        known = next((found for found in self._found.values() if found.shape[1] >= rank), None)
        if known is None:
            known = self._found[rank] = directions(self.gram, rank)
        return known[:, :rank]


def relex(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """w = P l(s): a curve through the coefficients of the top directions."""
    u = window.directions(recipe.rank)
    return u @ recipe.read_off(window.steps, u, targets).T


def pinned(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """w = P (l(s) - l(s_T)): the curve's increment alone."""
    found = relex(window, np.append(targets, window.steps[-1]), recipe)
    return found[:, :-1] - found[:, -1:]


def reconstruct(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """w = P e_t: what rank r keeps of an observed step t."""
    u = window.directions(recipe.rank)
    return u @ u[np.searchsorted(window.steps, targets)].T


def secant(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """w = f (e_T - e_1) with f = (s - s_T) / (s_T - s_1): on along the chord from the first to the last checkpoint."""
    first, last = window.steps[0], window.steps[-1]
    factor = (targets - last) / (last - first)
    return np.outer(_unit(window, -1) - _unit(window, 0), factor)


def scaled_last(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """w = (s / s_T) e_T: the last delta, as if all steps since step 0 went on like this."""
    return np.outer(_unit(window, -1), targets / window.steps[-1])


def scaled_first(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """w = (s / s_1) e_1: the first delta, as if all steps were like it."""
    return np.outer(_unit(window, 0), targets / window.steps[0])


def mean(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """w = (e_{T-k+1} + ... + e_T) / k: the mean of the last k checkpoints, whatever the target."""
    count = recipe.last or len(window.steps)
    weights = np.where(np.arange(len(window.steps)) >= len(window.steps) - count, 1.0 / count, 0.0)
    return np.tile(weights[:, None], len(targets))


def ema(window: Window, targets: Vector, recipe: "Recipe") -> Matrix:
    """w_i ~ (1 - 2 / (k + 1))^(T - i), adding up to 1: an exponential mean, whatever the target."""
    count = recipe.last or len(window.steps)
    weights = (1.0 - 2.0 / (count + 1)) ** np.arange(len(window.steps))[::-1]
    return np.tile((weights / weights.sum())[:, None], len(targets))


def _unit(window: Window, place: int) -> Vector:
    unit = np.zeros(len(window.steps))
    unit[place] = 1.0
    return unit


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods: name, what it does in a line, where it is from, its weights, what it needs.

    ``stays``: it averages what was seen, and goes nowhere. ``from_last``: it starts from the last checkpoint, else from
    the base. ``from_zero``: it counts steps from 0, where the base was. ``needs_base``: it predicts something else where the
    base is another model. ``uses``: the fields of a Recipe that it heeds.
    """

    name: str
    what: str
    source: str
    weights: Callable[[Window, Vector, "Recipe"], Matrix]
    least_steps: int = 1
    from_last: bool = False
    extrapolates: bool = True
    keeps_norms: bool = False
    from_zero: bool = False
    stays: bool = False
    needs_base: bool = True
    uses: frozenset[str] = frozenset()


_CURVE = frozenset({"rank", "fit", "refit"})
METHODS = {
    method.name: method
    for method in (
        Method(
            "relex",
            "A curve through the coefficients of the top directions, rebuilt from the base.",
            "RELEX (Wei et al. 2026, arXiv 2605.21468), section 4",
            relex,
            least_steps=2,
            uses=_CURVE,
        ),
        Method(
            "pinned",
            "The increment of that curve, added to the last checkpoint.",
            "RELEX, pinned to the latest checkpoint as the verl fork by shamanez does",
            pinned,
            least_steps=2,
            from_last=True,
            uses=_CURVE,
        ),
        Method(
            "reconstruct",
            "What the top directions keep of an observed step; nothing is extrapolated.",
            "RELEX, Finding 1",
            reconstruct,
            extrapolates=False,
            uses=frozenset({"rank"}),
        ),
        Method(
            "secant",
            "On from the last checkpoint along the chord from the window's first to its last.",
            "the secant line of numerical analysis; no direction, no rank",
            secant,
            least_steps=2,
            from_last=True,
            needs_base=False,
        ),
        Method(
            "two-point",
            "The same chord; norms stay as they are in the last checkpoint.",
            "RLVR-Linearity (Wang et al. 2026, arXiv 2601.04537), weight extrapolation",
            secant,
            least_steps=2,
            from_last=True,
            needs_base=False,
            keeps_norms=True,
        ),
        Method(
            "scaled-last",
            "The last delta times s / s_T, from the base.",
            "ExPO (Zheng et al., ACL 2025, arXiv 2404.16792), with alpha from the step numbers",
            scaled_last,
            from_zero=True,
        ),
        Method(
            "scaled-first",
            "The first delta times s / s_1, from the base.",
            "alpha of basetenlabs/relex-replication, from the step numbers",
            scaled_first,
            from_zero=True,
        ),
        Method(
            "mean",
            "The mean of the window's last k checkpoints; goes nowhere new.",
            "LAWA (Kaddour 2022, arXiv 2209.14981)",
            mean,
            stays=True,
            needs_base=False,
            uses=frozenset({"last"}),
        ),
        Method(
            "ema",
            "An exponential mean over the window that reaches back about k checkpoints.",
            "iterate averaging (Polyak and Juditsky 1992), with decay 1 - 2 / (k + 1)",
            ema,
            stays=True,
            needs_base=False,
            uses=frozenset({"last"}),
        ),
    )
}

_MOST_STRENGTH = 1e100  # its square is still a float64


@dataclass(frozen=True)
class Recipe:
    """How to predict: a method, its rank, curve and refits, the k of a mean, and strength lambda (1 is as published).

    ``refit``: steps read off before the window moves on and is fitted again; None fits once. ``last``: the k of ``mean``
    and ``ema``; None is the whole window.
    """

    method: str = "relex"
    rank: int = 1
    strength: float = 1.0
    fit: str = "line"
    refit: int | None = None
    last: int | None = None

    def read_off(self, steps: Vector, values: Matrix, at: Vector) -> Matrix:
        """This recipe's curve through values [T, r] over steps [T], read off at [S]: [S, r]."""
        if self.refit is None:
            return read_off(self.fit, steps, values, at)
        return read_off_refitting(self.fit, steps, values, at, self.refit)

    def weights(self, window: Window, targets: list[int], strength: float | None = None) -> Matrix:
        """The weights [T, S] of this recipe for one tensor; zeros for a tensor that never changed."""
        method = METHODS[self.method]
        if not window.gram.any():
            return np.zeros((len(window.steps), len(targets)))
        found = (self.strength if strength is None else strength) * method.weights(window, np.array(targets), self)
        if method.from_last:
            found[-1] += 1.0
        return found

    def __str__(self) -> str:
        """For people: ``pinned, rank 2, poly2``; what the method does not use, and strength, are left out."""
        uses = METHODS[self.method].uses
        parts = [self.method]
        parts += [f"rank {self.rank}"] if "rank" in uses else []
        parts += [self.fit] if "fit" in uses and self.fit != "line" else []
        parts += [f"refit {self.refit}"] if self.refit is not None else []
        parts += [f"last {self.last}"] if self.last is not None else []
        return ", ".join(parts)

    def check(self, steps: Vector, targets: list[int]) -> None:
        """Raise RequestError, naming the limit, where this recipe cannot be used on a window for these targets."""
        method = METHODS.get(self.method)
        if method is None:
            raise RequestError(f"unknown method {self.method!r}; known are {', '.join(METHODS)}")
        if len(steps) < method.least_steps:
            raise RequestError(
                f"a window of {len(steps)} step cannot be fitted: --method {self.method} needs at least "
                f"{method.least_steps} observed steps"
            )
        if method.from_zero and steps[0] <= 0:
            raise RequestError(f"--method {self.method} counts from step 0; the window begins at step {steps[0]}")
        self._check_numbers(steps)
        self._check_uses(method)
        for target in targets:
            if type(target) is not int or target < 0 or target > 10**15:
                raise RequestError(f"--step {target} is not a training step")
            if method.extrapolates and target <= steps[-1]:
                raise RequestError(
                    f"--step {target} is not beyond the window, which ends at step {steps[-1]}; give a later step, "
                    f"a window that ends earlier, or --method reconstruct"
                )
            if self.refit is not None:
                check_refits(steps, target, self.refit)
            if not method.extrapolates and target not in steps:
                raise RequestError(
                    f"--step {target}: --method {self.method} needs a step of the window {steps[0]}..{steps[-1]}"
                )

    def _check_numbers(self, steps: Vector) -> None:
        count = len(steps)
        if type(self.rank) is not int or not 1 <= self.rank <= count:
            raise RequestError(f"--rank {self.rank} does not fit a window of {count} steps; give 1 to {count}")
        if not abs(self.strength) <= _MOST_STRENGTH:
            raise RequestError(f"--strength {self.strength} is not a number of reasonable size")
        if self.fit not in CURVES:
            raise RequestError(f"unknown --fit {self.fit!r}; known are {', '.join(CURVES)}")
        if self.fit != "line" and count < CURVES[self.fit]:
            raise RequestError(f"--fit {self.fit} needs at least {CURVES[self.fit]} steps; the window has {count}")
        if self.refit is not None and (type(self.refit) is not int or not 1 <= self.refit <= count):
            raise RequestError(f"--refit {self.refit} does not fit a window of {count} steps; give 1 to {count}")
        if self.last is not None and (type(self.last) is not int or not 1 <= self.last <= count):
            raise RequestError(f"--last {self.last} does not fit a window of {count} steps; give 1 to {count}")

    def _check_uses(self, method: Method) -> None:
        """Nothing that was asked for is left out without a word."""
        plain = Recipe(self.method)
        for option in ("rank", "fit", "refit", "last"):
            if option not in method.uses and getattr(self, option) != getattr(plain, option):
                users = [other.name for other in METHODS.values() if option in other.uses]
                raise RequestError(f"--{option} means nothing to --method {self.method}; it is for {', '.join(users)}")
