"""Is this trajectory one line, and from this base? Signs that it is not, and what a walk without direction looks like."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from relexio.extrapolate.fit import fit_line
from relexio.extrapolate.methods import directions

_UNDONE = -0.2  # cosine of the directions of two halves
_JUMP = 5.0  # times the usual increment
_BREAK = 2.5  # one slope in terms of the other
_LEFT = 0.25  # of the squared distances from one line, those from two
_KINK = 0.5  # of those from a cubic
_FAR = 30.0  # times the distance between two steps; real runs have up to 1.0
LEAD = 8  # steps that tell whether the base is the right one


def random_walk(steps: np.ndarray) -> tuple[float, float]:
    """Energy of rank 1 and r_squared of the line, of a random walk of many dimensions observed at the same steps.

    Its increments are independent, so that its Gram matrix is min(s_i, s_j) but for a factor: nothing is drawn.
    """
    gram = np.minimum.outer(steps, steps).astype(np.float64)
    u = directions(gram, 1)[:, 0]
    return float(u @ gram @ u / np.trace(gram)), fit_line(steps, u).r_squared


def split_half(gram: np.ndarray) -> float | None:
    """Cosine of the directions of two halves: trajectories of the odd and of the even increments. None below 4 steps.

    A walk without direction gives about 0, a straight line 1, and noise about one place -1: its increments undo each other.
    Momentum in the optimizer makes neighbours alike, so that a value a little above 0 is not yet a direction.
    """
    count = len(gram)
    if count < 4 or not gram.any():
        return None
    found = []
    for offset in (0, 1):
        picked = np.arange(offset, count, 2)
        rows = np.zeros((len(picked), count))  # deltas of this half, as weights of the real ones
        for place, step in enumerate(picked):
            rows[place:, step] += 1.0
            if step:
                rows[place:, step - 1] -= 1.0
        found.append(rows.T @ directions(rows @ gram @ rows.T, 1)[:, 0])
    a, b = found
    length = np.sqrt(max(a @ gram @ a, 0.0) * max(b @ gram @ b, 0.0))
    return float(a @ gram @ b / length) if length > 0 else None


@dataclass(frozen=True)
class Straightness:
    """How straight a model moved at rank 1, beside what a random walk over the same steps gives.

    ``energy`` is summed over all tensors; ``r_squared`` and ``split_half`` are medians over those that moved; ``signs``
    are what speaks against one line, in words.
    """

    energy: float
    r_squared: float
    split_half: float | None
    walk_energy: float
    walk_r_squared: float
    signs: list[str]


def straightness(grams: Iterable[np.ndarray], steps: np.ndarray) -> Straightness | None:
    """Measure the Gram matrices [T, T] of a model's tensors, one at a time; None where nothing moved, or T < 2."""
    whole, kept, lines, halves = np.zeros((len(steps), len(steps))), 0.0, [], []
    if len(steps) < 2:
        return None
    for gram in grams:
        if gram.any():
            whole += gram
            u = directions(gram, 1)[:, 0]
            kept += float(u @ gram @ u)
            lines.append(fit_line(steps, u).r_squared)
            half = split_half(gram)
            halves += [] if half is None else [half]
    if not lines:
        return None
    walk_energy, walk_r_squared = random_walk(steps)
    return Straightness(
        kept / float(np.trace(whole)),
        float(np.median(lines)),
        float(np.median(halves)) if halves else None,
        walk_energy,
        walk_r_squared,
        signs(whole, steps),
    )


def base_doubt(gram: np.ndarray, steps: np.ndarray) -> str | None:
    """Why the base does not look like the model that training began from, in words; None where nothing speaks against it.

    ``gram`` [K, K] is that of a run's first deltas, summed over tensors, or over a sample of their elements. The first
    step is held against the first after it that differs. Its distance may grow with its number: a run stored from step
    1000 on, every 10 steps, may well have a hundred times the distance.
    """
    squares = np.diag(gram)
    apart = squares[0] + squares[1:] - 2 * gram[0, 1:]
    others = np.flatnonzero(apart > 1e-14 * squares[0])
    if not (squares[0] > 0 and len(others)):  # a kept fit that is damaged may have negative squares
        return None
    other = int(others[0]) + 1
    times = float(np.sqrt(squares[0] / apart[other - 1]))
    first, gap = int(steps[0]), int(steps[other] - steps[0])
    if times * min(1.0, gap / max(first, 1)) <= _FAR:
        return None
    return (
        f"step {first} is about {float(f'{times:.2g}'):,.0f} times farther from the base than from step {steps[other]}: is this "
        f"the model that training began from? If not, convert with that one as --base"
    )


def signs(gram: np.ndarray, steps: np.ndarray) -> list[str]:
    """What speaks against one line, in words, from the Gram matrix [T, T] summed over all tensors."""
    if not gram.any():
        return []
    squares = np.diag(gram)
    apart = squares[:, None] + squares[None, :] - 2 * gram
    same = np.tril(apart <= 1e-12 * squares.max(), -1)
    fresh = ~same.any(axis=1)
    found = _repeats(same, steps)
    gram, steps = gram[np.ix_(fresh, fresh)], steps[fresh]
    return [*found, *_noise(gram), *_jumps(gram, steps), *_break(gram, steps)]


def _repeats(same: np.ndarray, steps: np.ndarray) -> list[str]:
    again = np.flatnonzero(same.any(axis=1))
    if not len(again):
        return []
    first = steps[np.flatnonzero(same[again[0]])[0]]
    more = f", and {len(again) - 1} more repeat one before them" if len(again) > 1 else ""
    return [f"step {steps[again[0]]} is the same as step {first}{more}: leave repeated checkpoints out with --window"]


def _noise(gram: np.ndarray) -> list[str]:
    half = split_half(gram)
    if half is None or half > _UNDONE:
        return []
    return [f"its increments undo each other (split-half cosine {half:.2f}): what moves is noise about one place"]


def _increments(gram: np.ndarray) -> np.ndarray:
    """Lengths of the increments from each step to the next: [T - 1]."""
    squares = np.diag(gram)
    return np.sqrt(np.maximum(squares[1:] + squares[:-1] - 2 * np.diag(gram, 1), 0.0))


def _jumps(gram: np.ndarray, steps: np.ndarray) -> list[str]:
    lengths, gaps = _increments(gram), np.diff(steps)
    if len(lengths) < 4:
        return []
    # between a walk, as the root of the steps, and a line, as their number, a long gap is no jump
    speeds = np.minimum(lengths / gaps, lengths / np.sqrt(gaps))
    usual = np.minimum(np.median(lengths / gaps), np.median(lengths / np.sqrt(gaps)))
    far: np.ndarray = np.flatnonzero(speeds > _JUMP * usual) if usual > 0 else np.zeros(0, int)
    if not len(far):
        return []
    worst = int(far[np.argmax(speeds[far])])
    times = speeds[worst] / usual
    return [
        f"a jump from step {steps[worst]} to step {steps[worst + 1]}, {times:.0f} times the usual distance: predict "
        f"from one side of it with --window"
    ]


def _break(gram: np.ndarray, steps: np.ndarray) -> list[str]:
    """Two lines through the coefficients where one will not do, one much steeper than the other."""
    count = len(steps)
    if count < 8 or not gram.any():
        return []
    u = directions(gram, 1)[:, 0]
    values = u * np.sqrt(max(u @ gram @ u, 0.0))
    whole = _left(steps, values)
    middle = range(3, count - 2)
    split = min(middle, key=lambda at: _left(steps[:at], values[:at]) + _left(steps[at:], values[at:]))
    before, after = fit_line(steps[:split], values[:split]), fit_line(steps[split:], values[split:])
    left = _left(steps[:split], values[:split]) + _left(steps[split:], values[split:])
    low, high = sorted((abs(before.slope), abs(after.slope)))
    turned = before.slope * after.slope < 0 or high > _BREAK * low
    bent = np.polynomial.Polynomial.fit(steps, values, 3)  # a smooth bend, as a walk has, is no break
    smooth = float(((values - bent(steps)) ** 2).sum())
    if whole <= 0 or left > min(_LEFT * whole, _KINK * smooth) or not turned:
        return []
    return [
        f"the slope breaks at step {steps[split]}: {before.slope:.2g} a step before, {after.slope:.2g} after; predict "
        f"from the steps after it with --window {steps[split]}:"
    ]


def _left(steps: np.ndarray, values: np.ndarray) -> float:
    """What a line leaves of the values: sum of squares."""
    line = fit_line(steps, values)
    return float(((values - line.slope * steps - line.intercept) ** 2).sum())
