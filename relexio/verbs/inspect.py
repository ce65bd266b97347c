"""``inspect``: what a trajectory holds, how large it is, and how each tensor moved."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from relexio.engine.resources import Resources
from relexio.fit.fit import TensorFit, changed_shares, doubt_of_base, fit
from relexio.methods import Recipe
from relexio.methods.backtest import Backtest
from relexio.methods.line_tests import Straightness, straightness
from relexio.methods.skill import Errors
from relexio.progress import Stages
from relexio.store.storage import locate
from relexio.store.store import Store


@dataclass(frozen=True)
class Sizes:
    """Bytes: of the observed checkpoints as they were, and of what the store holds for steps, base, and kept fits."""

    checkpoints: int
    steps: int
    base: int
    cache: int

    @property
    def compression(self) -> float:
        """Bytes of the observed checkpoints for one byte of the store, the base apart."""
        return self.checkpoints / self.steps


@dataclass(frozen=True)
class Inspection:
    """Figures of a store over a window, at a rank: sizes, shares of changed elements, one TensorFit for each tensor."""

    store: Store
    window: tuple[int, ...]
    rank: int
    sizes: Sizes
    changed: dict[int, float]
    tensors: list[TensorFit]
    backtest: Backtest | None
    straight: Straightness | None
    doubt: str | None = None

    @property
    def moved(self) -> list[TensorFit]:
        """The fitted tensors that changed: those that averages are about."""
        return [tensor for tensor in self.tensors if tensor.line is not None]

    @property
    def energy(self) -> float | None:
        """The share of sigma^2 that the rank keeps, summed over all tensors."""
        total = sum(tensor.sigma2_total or 0.0 for tensor in self.tensors)
        return sum(tensor.sigma2 for tensor in self.tensors if tensor.sigma2_total) / total if total else None

    @property
    def skill(self) -> float | None:
        """Skill inside the window, pooled over all tensors, cut-offs and steps held out; None without a backtest."""
        return self.backtest.errors(self.backtest.trials[0], 1.0).skill if self.backtest else None

    @property
    def slope(self) -> float | None:
        """The speed of the whole model along its directions, a step: the norm of the tensors' slopes."""
        return float(np.linalg.norm([t.line.slope for t in self.moved if t.line])) if self.moved else None

    @property
    def r_squared(self) -> float | None:
        """The median r_squared of the tensors that changed."""
        return statistics.median(t.line.r_squared for t in self.moved if t.line) if self.moved else None

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "path": self.store.shown,
            "steps": list(self.store.steps),
            "window": list(self.window),
            "parameters": sum(tensor.size for tensor in self.store.tensors if tensor.kind.is_float),
            "bytes": asdict(self.sizes),
            "compression": self.sizes.compression,
            "changed": {str(step): share for step, share in self.changed.items()},
            "energy": self.energy,
            "slope": self.slope,
            "r_squared": self.r_squared,
            "straightness": asdict(self.straight) if self.straight else None,
            "doubt": self.doubt,
            "skill": self.skill,
            "backtest": {"cut_offs": np.unique(self.backtest.known).tolist()} if self.backtest else None,
            "tensors": [
                {
                    "name": t.name,
                    "elements": t.size,
                    "changed": t.changed,
                    "energy": t.energy,
                    "slope": t.line.slope if t.line else None,
                    "r_squared": t.line.r_squared if t.line else None,
                    "skill": t.errors.skill,
                }
                for t in self.tensors
            ],
        }


def inspect(store: Store, window: tuple[int, ...], rank: int, resources: Resources, stages: Stages) -> Inspection:
    """Measure a store; the Gram matrices are computed and kept if they are not yet.

    Raises RequestError for a rank above the window, BudgetError for too little memory.
    """
    if len(window) > 1:
        fitted = fit(store, window, Recipe(rank=rank), "gram", resources, stages)
        tensors, backtest = fitted.tensors(), fitted.backtest
        doubt = doubt_of_base(store, fitted.grams)
        straight = straightness((fitted.grams.of(t, window) for t in store.fitted()), np.array(window))
    else:
        shares = changed_shares(store, window)
        tensors = [TensorFit(t.name, t.size, shares[t.name], errors=Errors()) for t in store.tensors]
        backtest = straight = doubt = None
    elements = max(sum(tensor.size for tensor in store.tensors), 1)
    counts = store.changed_counts(store.steps).sum(axis=0)
    changed = {step: float(count) / elements for step, count in zip(store.steps, counts, strict=True)}
    return Inspection(store, window, rank, sizes(store), changed, tensors, backtest, straight, doubt)


def sizes(store: Store) -> Sizes:
    """How large a store is, and what it stands for."""
    checkpoints = sum(c.nbytes(store.table) for s in store.segments for c in store.checkpoints(s).values())
    root = locate(store.address)
    steps = sum(root.below(name).nbytes() for name in ("files", *(segment.path for segment in store.segments)))
    return Sizes(checkpoints, steps, root.below("base").nbytes(), root.below("cache").nbytes())
