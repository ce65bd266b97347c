"""``findings``: the paper's Findings 1 and 2 on a run, its ablations of rank and curve, and what rank r throws away."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from relexio.engine.resources import Resources
from relexio.errors import RequestError
from relexio.fit.fit import changed_shares
from relexio.fit.grams import Grams, find_grams
from relexio.methods import Recipe
from relexio.methods.curves import Line
from relexio.methods.roles import layer_of, part_of
from relexio.methods.spectrum import SPECTRUM, alike, find, thrown_away
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.verbs.backtest import Judged, by_horizon, judge


@dataclass(frozen=True)
class TensorFindings:
    """One tensor that moved: where it stands, its share of changed elements, spectrum, coefficients [T] and their line.

    ``energy`` is the sum of sigma^2 over all directions, ``kept`` the share of it that the rank keeps.
    """

    name: str
    part: str
    layer: int | None
    changed: float
    energy: float
    kept: float
    spectrum: np.ndarray
    coefficients: np.ndarray
    line: Line


@dataclass(frozen=True)
class Findings:
    """A run over a window at a rank: its tensors that moved, and the sums over all of them.

    ``spectrum`` [<= 10]: shares of the energy by direction. ``thrown`` [T]: the share of each delta that the rank throws
    away. ``alike`` [T - 2]: cosines of the neighbouring increments of what is thrown away, by the step between them.
    ``judged``: the backtest.
    """

    store: Store
    window: tuple[int, ...]
    rank: int
    tensors: list[TensorFindings]
    spectrum: np.ndarray
    thrown: np.ndarray
    alike: np.ndarray
    judged: Judged | None

    def ablation(self) -> dict[str, np.ndarray]:
        """Skill by horizon, at strength 1 on the whole window, for ranks 1 to 3 and for each curve at rank 1."""
        if self.judged is None:
            return {}
        test, found = self.judged.test, {}
        for place, trial in enumerate(test.trials):
            recipe = trial.recipe
            if trial.share == 1 and recipe.refit is None and recipe.method in ("relex", "pinned"):
                found[str(Recipe(recipe.method, recipe.rank, curve=recipe.curve))] = test.by_horizon(place, 1.0)
        return found

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "path": self.store.shown,
            "window": list(self.window),
            "rank": self.rank,
            "spectrum": self.spectrum.tolist(),
            "thrown_away": {str(s): _number(v) for s, v in zip(self.window, self.thrown, strict=True)},
            "alike": {str(s): _number(v) for s, v in zip(self.window[1:], self.alike, strict=False)},
            "ablation": {name: by_horizon(skills) for name, skills in self.ablation().items()},
            "tensors": [
                {
                    "name": t.name,
                    "part": t.part,
                    "layer": t.layer,
                    "changed": t.changed,
                    "spectrum": t.spectrum.tolist(),
                    "coefficients": t.coefficients.tolist(),
                    "slope": t.line.slope,
                    "intercept": t.line.intercept,
                    "r_squared": t.line.r_squared,
                }
                for t in self.tensors
            ],
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def findings(store: Store, window: tuple[int, ...], rank: int, resources: Resources, stages: Stages) -> Findings:
    """Measure a run; the Gram matrices are made and kept if they are not there yet.

    Raises RequestError for a rank above the window, fewer than two steps, or a run in which nothing moved; BudgetError.
    """
    Recipe(rank=rank).check(np.array(window), [])
    steps, count = np.array(window), len(window)
    grams = find_grams(store, store.steps, 1, "gram", resources, stages)
    shares, tensors = changed_shares(store, window), []
    left, lengths, spectrum = np.zeros((count, count)), np.zeros(count), np.zeros(min(count, SPECTRUM))
    with threadpool_limits(1), stages("findings", 8 * count**2 * len(store.fitted())) as advance:
        for name, gram in _moved(store, window, grams, advance):
            found = find(gram, steps, rank)
            left += found.left
            lengths += found.lengths
            spectrum += found.spectrum * found.energy
            tensors.append(
                TensorFindings(
                    name, part_of(name), layer_of(name), shares[name], found.energy, found.kept, found.spectrum,
                    found.coefficients, found.line,
                )
            )  # fmt: skip
    if not tensors:
        raise RequestError(f"{store.shown}: no tensor moved within the window; there is nothing to find")
    judged = judge(store, window, resources, stages) if count > 2 else None
    spectrum /= lengths.sum()
    return Findings(store, window, rank, tensors, spectrum, thrown_away(left, lengths), alike(left), judged)


def _moved(
    store: Store, window: tuple[int, ...], grams: Grams, advance: Callable[[int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in store.fitted():
        gram = grams.of(tensor, window)
        advance(gram.nbytes)
        if gram.any():
            yield tensor.name, gram
