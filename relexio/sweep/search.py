"""The search for the best step of a recipe: farther and farther until scores drop, then nearer to the best.

A recipe moves weights along one direction, and the step says how far. Scores over it rise to a single top, as far as
evaluations tell (docs/evidence.md). So this is a line search, with as few evaluations as it takes.
"""

from collections.abc import Mapping
from math import inf, sqrt

#: How many times as far ahead the next horizon is, and how many horizons and points between them there are at most.
GROWTH, HORIZONS, BETWEEN = 3, 5, 2
#: Evaluations of a search.
MOST = HORIZONS + BETWEEN


def next_step(last: int, ahead: int, scores: Mapping[int, float | None], known: float, error: float) -> int | None:
    """The step to evaluate next; None when the search is over.

    ``scores``: those of the steps so far, the higher the better, None where the evaluation failed. ``known``: that of step
    ``last``, the last observed. ``error``: a drop that is not larger says nothing.
    """
    seen = {last: known}
    for horizon in range(HORIZONS):
        step = last + ahead * GROWTH**horizon
        if step not in scores:
            return step
        seen[step] = -inf if (score := scores[step]) is None else score
        if seen[step] < max(seen.values()) - error:
            break
    for _ in range(BETWEEN):
        between = _between(last, seen)
        if between is None or between not in scores:
            return between
        seen[between] = -inf if (score := scores[between]) is None else score
    return None


def _between(last: int, seen: Mapping[int, float]) -> int | None:
    """A step beside the best, halfway (in times as far ahead) to the better of its neighbours; None if there is none."""
    steps = sorted(seen)
    best = min(steps, key=lambda step: (-seen[step], step))
    place = steps.index(best)
    for other in sorted(steps[max(place - 1, 0) : place] + steps[place + 1 : place + 2], key=lambda step: -seen[step]):
        near, far = sorted((best - last, other - last))
        middle = last + (round(sqrt(near * far)) if near else round(far / sqrt(GROWTH)))
        if middle not in seen:
            return middle
    return None
