"""``findings``: the paper's Findings 1 and 2 on a run, its ablations of rank and curve, and what rank r throws away."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from relexio.engine import graph, plan
from relexio.engine.resources import Resources
from relexio.engine.tiles import Rows
from relexio.errors import RequestError
from relexio.fit.fit import changed_shares
from relexio.fit.grams import find_grams
from relexio.methods import Recipe, Window
from relexio.methods.line_tests import random_walk
from relexio.methods.linearity import Linearity, null_shares
from relexio.methods.spectrum import SPECTRUM, TensorFindings, alike, find, left_over, thrown_away
from relexio.progress import Stages
from relexio.store.schema import Block
from relexio.store.storage import METADATA
from relexio.store.store import Store
from relexio.verbs.backtest import Judgement, by_horizon, judge

_BLOCKS = 32  # as many as single elements are looked at in


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
    judged: Judgement | None

    @property
    def r_squared(self) -> float:
        """The median r_squared of the tensors' lines."""
        return float(np.median([t.line.r_squared for t in self.tensors]))

    @cached_property
    def walk(self) -> tuple[float, float]:
        """Energy of rank 1 and r_squared that a random walk over the same steps has."""
        return random_walk(np.array(self.window))

    def ablation(self) -> dict[str, np.ndarray]:
        """Skill by horizon, at strength 1 on the whole window, for ranks 1 to 3 and for each curve at rank 1."""
        if self.judged is None:
            return {}
        test = self.judged.test
        trials = [t for t in test.trials if t.share == 1 and t.recipe.refit is None and "fit" in t.recipe.way.uses]
        return {str(trial.recipe): test.by_horizon(trial, 1.0) for trial in trials}

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "path": self.store.shown,
            "window": list(self.window),
            "rank": self.rank,
            "spectrum": self.spectrum.tolist(),
            "r_squared": self.r_squared,
            "random_walk": dict(zip(("energy", "r_squared"), self.walk, strict=True)),
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
    """Measure a run; the Gram matrices are computed and kept if they are not yet.

    Raises RequestError for a rank above the window, fewer than two steps, or a run in which nothing moved; BudgetError.
    """
    Recipe(rank=rank).check(np.array(window), [])
    steps, count = np.array(window), len(window)
    grams = find_grams(store, store.steps, 1, "gram", resources, stages)
    shares, tensors = changed_shares(store, window), []
    left, lengths, spectrum = np.zeros((count, count)), np.zeros(count), np.zeros(min(count, SPECTRUM))
    with threadpool_limits(1), stages("findings", 8 * count**2 * len(store.fitted())) as advance:
        for tensor in store.fitted():
            one = Window(grams.of(tensor, window), steps)
            advance(one.gram.nbytes)
            if not one.gram.any():
                continue
            tensors.append(find(one, rank, tensor.name, shares[tensor.name]))
            left += left_over(one, rank)
            lengths += np.diag(one.gram)
            spectrum += tensors[-1].spectrum * tensors[-1].sigma2
    if not tensors:
        raise RequestError(
            f"{store.shown}: no tensor moved within the window: there is nothing to measure; give another --window"
        )
    judged = judge(store, window, resources, stages) if count > 2 else None
    spectrum /= lengths.sum()
    return Findings(store, window, rank, tensors, spectrum, thrown_away(left, lengths), alike(left), judged)


def linearity(store: Store, window: tuple[int, ...], resources: Resources, stages: Stages) -> Linearity | None:
    """How many single elements move on a line, in at most 32 blocks, spread evenly over the model; None below 3 steps.

    Raises BudgetError.
    """
    if len(window) < 3:
        return None
    blocks = [block for block in store.blocks if block.kind.is_float]
    chosen = evenly(blocks, _BLOCKS)
    executor = resources.on_cpu(plan.linear_need(plan.Shape.of(store), Rows.of(store, window).count))
    executor.require(store.files(METADATA))
    nbytes = sum(block.size * block.kind.itemsize for block in chosen) * len(window)
    with stages("findings: elements", nbytes) as advance:
        counts = graph.linear(store, window, chosen, executor, advance).tolist() if chosen else [0] * 4
    with threadpool_limits(1):
        walk, momentum = null_shares(np.array(window))
    moved, linear, several, both = counts
    elements = sum(block.size for block in chosen)
    return Linearity(len(chosen), len(blocks), elements, moved, linear, several, both, walk, momentum)


def evenly(blocks: list[Block], most: int) -> list[Block]:
    """At most so many of the blocks, evenly spread, with the first and the last."""
    return [blocks[i] for i in sorted({round(i) for i in np.linspace(0, len(blocks) - 1, min(most, len(blocks)))})]
