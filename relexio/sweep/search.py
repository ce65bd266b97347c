"""The search for the best step of a recipe: farther and farther until scores drop, then at the top of the curve between.

A recipe moves weights along one direction, and the step says how far. Scores over it rise to one top and fall, as far as
evaluations tell (docs/evidence.md). So this is a line search, in as few evaluations as it takes.
"""

from collections.abc import Mapping
from math import exp, isfinite, log
from typing import NamedTuple

#: How many times as far ahead the next horizon is, and how many horizons and points between them there are at most.
GROWTH, HORIZONS, BETWEEN = 3, 5, 2
#: Evaluations of a search.
MOST = HORIZONS + BETWEEN


class Scored(NamedTuple):
    """A score, the higher the better (-inf where the evaluation failed), and its standard error, 0 if that is not known."""

    score: float
    error: float = 0.0


def next_step(last: int, ahead: int, scores: Mapping[int, Scored], known: Scored) -> int | None:
    """The step to evaluate next; None when the search is over.

    ``scores``: those of the steps so far. ``known``: that of step ``last``, the last observed. A difference from the best
    that is not larger than the best's standard error says nothing.
    """
    seen = {0: known}
    for horizon in range(HORIZONS):
        far = ahead * GROWTH**horizon
        if last + far not in scores:
            return last + far
        seen[far] = scores[last + far]
        best = max(seen.values(), key=lambda one: one.score)  # of equals the nearest
        if seen[far].score < best.score - best.error:
            break
    for _ in range(BETWEEN):
        far = _top(seen)
        if far in seen or last + far not in scores:
            return None if far in seen else last + far
        seen[far] = scores[last + far]
    return None


def _top(seen: Mapping[int, Scored]) -> int:
    """How many steps ahead the best score seems to be; where that promises no more than the error, the best so far."""
    steps = sorted(seen)
    place = min(range(len(steps)), key=lambda i: (-seen[steps[i]].score, i))
    best, (top, error) = steps[place], seen[steps[place]]
    if place == len(steps) - 1:  # nothing dropped
        return best
    if not best:  # nothing helped; where the nearest was worse, one horizon nearer
        return max(round(steps[1] / GROWTH), 1) if seen[steps[1]].score < top - error else best
    near, far = steps[place - 1], steps[place + 1]
    left, right = log(best / (near or best / GROWTH)), log(far / best)
    rise, fall = top - seen[near].score, top - seen[far].score
    if not isfinite(fall):  # the evaluation failed
        return round(best * exp(right / 2))
    height = rise + fall
    if not isfinite(height) or height <= 0:
        return best
    # the parabola through the three, over the logarithm, seen from the best: height * (slope x - bend x^2)
    rise, fall = rise / height, fall / height
    bend = (rise / left + fall / right) / (left + right)
    slope = (rise * right / left - fall * left / right) / (left + right)
    promised = height * slope * slope / (4 * bend)
    return round(best * exp(slope / (2 * bend))) if promised > error else best
