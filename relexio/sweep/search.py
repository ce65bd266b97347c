"""The search for the best step of a recipe: farther and farther until scores drop, then at the top of the curve between.

A recipe moves weights along one direction, and the step says how far. Scores over it rise to one top and fall, as far as
evaluations tell (docs/evidence.md). So this is a line search, in as few evaluations as it takes.
"""

from collections.abc import Mapping
from math import exp, inf, isfinite, log

#: How many times as far ahead the next horizon is, and how many horizons and points between them there are at most.
GROWTH, HORIZONS, BETWEEN = 3, 5, 2
#: Evaluations of a search.
MOST = HORIZONS + BETWEEN


def next_step(last: int, ahead: int, scores: Mapping[int, float | None], known: float, error: float) -> int | None:
    """The step to evaluate next; None when the search is over.

    ``scores``: those of the steps so far, the higher the better, None where the evaluation failed. ``known``: that of step
    ``last``, the last observed. ``error``: the standard error of the best; a difference that is not larger says nothing.
    """
    seen = {0: known}
    for horizon in range(HORIZONS):
        far = ahead * GROWTH**horizon
        if last + far not in scores:
            return last + far
        seen[far] = _number(scores[last + far])
        if seen[far] < max(seen.values()) - error:
            break
    for _ in range(BETWEEN):
        far = _top(seen, error)
        if far in seen or last + far not in scores:
            return None if far in seen else last + far
        seen[far] = _number(scores[last + far])
    return None


def _number(score: float | None) -> float:
    return -inf if score is None else score


def _top(seen: Mapping[int, float], error: float) -> int:
    """How many steps ahead the best score seems to be; where that promises no more than the error, the best so far."""
    steps = sorted(seen)
    place = min(range(len(steps)), key=lambda i: (-seen[steps[i]], i))
    best = steps[place]
    if place == len(steps) - 1:  # nothing dropped
        return best
    if not best:  # nothing helped; where the nearest was worse, one horizon nearer
        return max(round(steps[1] / GROWTH), 1) if seen[steps[1]] < seen[0] - error else best
    near, far = steps[place - 1], steps[place + 1]
    left, right = log(best / (near or best / GROWTH)), log(far / best)
    rise, fall = seen[best] - seen[near], seen[best] - seen[far]
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
