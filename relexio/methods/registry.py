"""What a method is, and the table of all methods. Each is entered by the decorator beside its function (formulas.py)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relexio.methods.eigen import power_iteration, solve

#: In the place of a method's name, it leaves the recipe to the backtest; in that of a step, how far to predict.
AUTO = "auto"
#: Up to so many steps LAPACK finds all eigenvectors faster than power iteration the first. For a random walk it takes 0.02 ms
#: at 10 steps and 0.7 ms at 96, power iteration 0.6 and 1.7; at 400 it is 26 ms against 2.
_SMALL = 96
Vector = np.ndarray
Matrix = np.ndarray


def directions(gram: Matrix, rank: int) -> Matrix:
    """The top-r eigenvectors U [T, r] of the Gram matrix [T, T], by power iteration."""
    return solve(power_iteration(len(gram), rank), lambda x: gram @ x).vectors


def leading(grams: Matrix, rank: int) -> Matrix:
    """As ``directions``, of one Gram matrix or of several [N, T, T], by what is faster; the last component is >= 0."""
    if grams.shape[-1] > _SMALL:
        return directions(grams, rank) if grams.ndim == 2 else np.stack([directions(gram, rank) for gram in grams])
    vectors = np.linalg.eigh(grams)[1][..., ::-1][..., :rank]
    return vectors * np.where(vectors[..., -1:, :] < 0, -1.0, 1.0)


@dataclass(frozen=True)
class Window:
    """All that a method sees of a tensor: the Gram matrix [T, T] of its deltas, and their real step numbers [T].

    Of several tensors at once: their matrices [N, T, T]. ``kept`` is for what several recipes need, by what it depends on.
    """

    gram: Matrix
    steps: Vector
    _top: dict[int, Matrix] = field(default_factory=dict, compare=False, repr=False)
    kept: dict[Any, Matrix] = field(default_factory=dict, compare=False, repr=False)

    def directions(self, rank: int) -> Matrix:
        """The top-r eigenvectors U [..., T, r]; the first ones of more, if more were asked for before."""
        top = next((vectors for vectors in self._top.values() if vectors.shape[-1] >= rank), None)
        if top is None:
            top = self._top[rank] = directions(self.gram, rank)
        return top[..., :rank]


#: (window of one tensor, target steps [S], Recipe) -> updates b [T, S]. Of N tensors: [N, T, S], or [T, S] for all alike.
Weights = Callable[[Window, Vector, Any], Matrix]


@dataclass(frozen=True)
class Method:
    """One method: its name, what it does in a line, its source, its weights, and what it needs.

    ``uses``: the options of a recipe that it uses. ``from_last``: it starts from the last checkpoint, not from the base.
    ``from_zero``: it counts steps from 0, where the base was. ``stays``: it averages what was observed.
    ``fixed``: it predicts the same for every target.
    ``keeps_norms``: norms stay as they are in the last checkpoint. ``needs_base``: it predicts something else where the base
    is another model. ``whole``: it uses all of the Gram matrix, of which the ``blocks`` solver keeps the top directions alone.
    ``aims``: it makes the checkpoint of a step; without it there is one, of no step.
    """

    name: str
    what: str
    source: str
    weights: Weights
    uses: frozenset[str] = frozenset()
    least_steps: int = 1
    from_last: bool = False
    from_zero: bool = False
    extrapolates: bool = True
    keeps_norms: bool = False
    stays: bool = False
    fixed: bool = False
    needs_base: bool = True
    whole: bool = False
    aims: bool = True


#: All methods by name. The order is that of help texts, of colours, and of the trials of a backtest.
METHODS: dict[str, Method] = {}


def method(
    name: str, what: str, source: str, *, uses: tuple[str, ...] = (), least_steps: int = 1, **traits: bool
) -> Callable[[Weights], Weights]:
    """Enter a function into the table of methods, under a name and with what it needs (see Method)."""

    def enter(weights: Weights) -> Weights:
        METHODS[name] = Method(name, what, source, weights, frozenset(uses), least_steps, **traits)
        return weights

    return enter
