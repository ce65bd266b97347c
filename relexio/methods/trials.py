"""What a backtest tries: cut-offs inside a trajectory with the steps held out after each, and recipes with their windows."""

from dataclasses import dataclass
from math import ceil

import numpy as np

from relexio.errors import RequestError
from relexio.methods.curves import CURVES
from relexio.methods.recipe import Recipe
from relexio.methods.registry import METHODS

#: Horizons are given in times the last known step: 1.5 is step 75 seen from step 50.
#: A horizon is from the one before it (from 1 at first) to this; the last one is open.
HORIZONS = (1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
STRENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
_CUT_OFFS = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
_EACH = 3  # steps held out for each cut-off and horizon
_SHORTEST = 3  # steps of a window that is only a part of what is known
_RANKS, _CURVES, _SHARES = (1, 2, 3), ("poly2", "sinusoid"), (1.0, 1 / 2, 1 / 3)


@dataclass(frozen=True)
class Fold:
    """One cut-off: how many steps are known, and the indices of the steps to be predicted from them."""

    known: int
    held_out: tuple[int, ...]


def within(times: float) -> int:
    """The first of HORIZONS that is not below this many times the last known step; the last one for all beyond."""
    return min(int(np.searchsorted(HORIZONS, times - 1e-9)), len(HORIZONS) - 1)


def horizon_name(place: int) -> str:
    """What a horizon is called: its end, or for the last one its start."""
    return f"{HORIZONS[place]:g}x" if place < len(HORIZONS) - 1 else f">{HORIZONS[place - 1]:g}x"


def make_folds(steps: np.ndarray) -> list[Fold]:
    """The cut-offs inside a trajectory of ascending steps [T]. Raises RequestError for fewer than three steps."""
    count = len(steps)
    if count < 3:
        raise RequestError(f"a backtest needs at least 3 observed steps (two to fit, one held out); there are {count}")
    least = min(5, count - 1)
    folds = []
    for known in sorted({max(round(count * share), least) for share in _CUT_OFFS}):
        if known >= count:
            continue
        groups: dict[int, list[int]] = {}
        for index in range(known, count):
            groups.setdefault(within(steps[index] / max(steps[known - 1], 1)), []).append(index)
        held_out = {group[round(i)] for group in groups.values() for i in np.linspace(len(group) - 1, 0, _EACH)}
        folds.append(Fold(known, tuple(sorted(held_out))))
    return folds


@dataclass(frozen=True)
class Trial:
    """A recipe at strength 1, and the share of the known steps that its window is."""

    recipe: Recipe
    share: float = 1.0

    def window(self, known: int) -> int | None:
        """How many of the known steps its window has, never too few to be fitted; None where all are too few."""
        recipe = self.recipe
        curve = CURVES[recipe.curve] if "fit" in recipe.way.uses else 1
        least = max(recipe.way.least_steps, recipe.rank, curve, recipe.last or 1)
        count = max(ceil(self.share * known - 1e-9), least, min(_SHORTEST, known))
        return count if count <= known else None


def make_trials(steps: int) -> list[Trial]:
    """Every method, rank, curve and window that a backtest of a trajectory of ``steps`` steps tries.

    Of recipes that do equally well the first one is advised: plain ones come first. Methods that count from step 0 or
    average observed steps have no window of their own.
    """
    tried = [method for method in METHODS.values() if method.extrapolates]
    wide = [method for method in tried if not (method.from_zero or method.stays)]
    plain = [Recipe(m.name, rank) for m in wide for rank in (_RANKS if "rank" in m.uses else (1,))]
    curved = [Recipe(m.name, curve=curve) for m in wide if "fit" in m.uses for curve in _CURVES]
    refitted = [Recipe(m.name, refit=1) for m in wide if "refit" in m.uses]
    last = min(5, max(steps // 4, 2))
    single = [Recipe(m.name, last=last if "last" in m.uses else None) for m in tried if m not in wide]
    return [*(Trial(r, share) for r in plain for share in _SHARES), *map(Trial, [*curved, *refitted, *single])]
