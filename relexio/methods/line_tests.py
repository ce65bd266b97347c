"""Is this trajectory one line, and from this base? Evidence that it is not, and what a walk without direction looks like."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from relexio.methods.curves import fit_line, read_off
from relexio.methods.registry import leading

_UNDONE = -0.2  # cosine of the directions of two halves
_JUMP = 5.0  # times the usual increment
_BREAK = 2.5  # one slope in terms of the other
_TWO_LINES, _CUBIC = 0.25, 0.5  # of the squared distances from one line, and from a cubic, those from two lines
_FAR = 30.0  # times the distance between two steps; real runs have up to 1.0
LEAD = 8  # steps that tell whether the base is the right one


def walk_gram(steps: np.ndarray) -> np.ndarray:
    """The Gram matrix [T, T] of a random walk of many dimensions observed at steps [T], but for a factor.

    Its increments are independent, so that it is min(s_i, s_j): nothing is drawn.
    """
    return np.minimum.outer(steps, steps).astype(np.float64)


def random_walk(steps: np.ndarray) -> tuple[float, float]:
    """Energy of rank 1 and r_squared of the line, of a random walk of many dimensions observed at the same steps."""
    gram = walk_gram(steps)
    u = leading(gram, 1)[:, 0]
    return float(u @ gram @ u / np.trace(gram)), fit_line(steps, u).r_squared


def split_half(gram: np.ndarray) -> float | None:
    """Cosine of the directions of two halves: trajectories of the odd and of the even increments. None below 4 steps.

    A walk without direction gives about 0, a straight line 1, and noise around one point -1: its increments undo each other.
    Momentum in the optimizer makes neighbours alike, so that a value a little above 0 is not yet a direction.
    """
    count = len(gram)
    if count < 4 or not gram.any():
        return None
    increments = np.eye(count) - np.eye(count, k=-1)  # as weights of the deltas
    halves = [np.cumsum(increments[offset::2], axis=0) for offset in (0, 1)]
    a, b = (half.T @ leading(half @ gram @ half.T, 1)[:, 0] for half in halves)
    length = np.sqrt(max(a @ gram @ a, 0.0) * max(b @ gram @ b, 0.0))
    return float(a @ gram @ b / length) if length > 0 else None


@dataclass(frozen=True)
class Straightness:
    """How straight a model moved at rank 1, beside what a random walk over the same steps gives.

    ``energy`` is summed over all tensors; ``r_squared`` and ``split_half`` are medians over those that moved; ``signs``
    are the evidence against one line, in words.
    """

    energy: float
    r_squared: float
    split_half: float | None
    walk_energy: float
    walk_r_squared: float
    signs: list[str]


def straightness(grams: Iterable[np.ndarray], steps: np.ndarray) -> Straightness | None:
    """Measure the Gram matrices [T, T] of a model's tensors, one at a time; None where nothing moved, or T < 2."""
    if len(steps) < 2:
        return None
    total, along, lines, halves = np.zeros((len(steps), len(steps))), 0.0, [], []
    for gram in grams:
        if gram.any():
            total += gram
            u = leading(gram, 1)[:, 0]
            along += float(u @ gram @ u)
            lines.append(fit_line(steps, u).r_squared)
            halves.append(split_half(gram))
    if not lines:
        return None
    cosines = [half for half in halves if half is not None]
    half = float(np.median(cosines)) if cosines else None
    energy, r_squared = along / float(np.trace(total)), float(np.median(lines))
    return Straightness(energy, r_squared, half, *random_walk(steps), signs(total, steps))


def base_doubt(gram: np.ndarray, steps: np.ndarray) -> str | None:
    """Why the base does not look like the model that training began from, in words; None without evidence against it.

    ``gram`` [K, K] is that of a run's first deltas, summed over tensors, or over a sample of their elements. The first
    step is compared with the first after it that differs. Its distance may grow with its number: a run stored from step
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
        f"the model that training began from? If not, convert again with that model as --base"
    )


def signs(gram: np.ndarray, steps: np.ndarray) -> list[str]:
    """The evidence against one line, in words, from the Gram matrix [T, T] summed over all tensors."""
    if not gram.any():
        return []
    squares = np.diag(gram)
    apart = squares[:, None] + squares[None, :] - 2 * gram
    same = np.tril(apart <= 1e-12 * squares.max(), -1)
    fresh = ~same.any(axis=1)
    repeats = _repeats(same, steps)
    gram, steps = gram[np.ix_(fresh, fresh)], steps[fresh]
    return [*repeats, *_noise(gram), *_jumps(gram, steps), *_break(gram, steps)]


def _repeats(same: np.ndarray, steps: np.ndarray) -> list[str]:
    repeats = np.flatnonzero(same.any(axis=1))
    if not len(repeats):
        return []
    first = steps[np.flatnonzero(same[repeats[0]])[0]]
    more = f", and {len(repeats) - 1} more repeat one before them" if len(repeats) > 1 else ""
    return [f"step {steps[repeats[0]]} is the same as step {first}{more}: leave repeated checkpoints out with --window"]


def _noise(gram: np.ndarray) -> list[str]:
    half = split_half(gram)
    if half is None or half > _UNDONE:
        return []
    return [f"its increments undo each other (split-half cosine {half:.2f}): what moves is noise around one point"]


def _jumps(gram: np.ndarray, steps: np.ndarray) -> list[str]:
    squares, gaps = np.diag(gram), np.diff(steps)
    if len(gaps) < 4:
        return []
    lengths = np.sqrt(np.maximum(squares[1:] + squares[:-1] - 2 * np.diag(gram, 1), 0.0))
    # between a walk, as the root of the steps, and a line, as their number, a long gap is no jump
    speeds = np.minimum(lengths / gaps, lengths / np.sqrt(gaps))
    usual = np.minimum(np.median(lengths / gaps), np.median(lengths / np.sqrt(gaps)))
    worst = int(np.argmax(speeds))
    if not (usual > 0 and speeds[worst] > _JUMP * usual):
        return []
    return [
        f"a jump from step {steps[worst]} to step {steps[worst + 1]}, {speeds[worst] / usual:.0f} times the usual "
        f"distance: give a --window on one side of it"
    ]


def _break(gram: np.ndarray, steps: np.ndarray) -> list[str]:
    """Two lines through the coefficients where one will not do, one much steeper than the other."""
    count = len(steps)
    if count < 8 or not gram.any():
        return []
    u = leading(gram, 1)[:, 0]
    values = u * np.sqrt(max(u @ gram @ u, 0.0))
    one_line = _residual(steps, values)
    residuals = {i: _residual(steps[:i], values[:i]) + _residual(steps[i:], values[i:]) for i in range(3, count - 2)}
    split = min(residuals, key=lambda i: residuals[i])
    before, after = (fit_line(steps[part], values[part]).slope for part in (slice(split), slice(split, None)))
    low, high = sorted((abs(before), abs(after)))
    turned = before * after < 0 or high > _BREAK * low
    bend = read_off("poly3", steps, values[:, None], steps)[:, 0]  # a smooth bend, as a walk has, is no break
    cubic = float(((values - bend) ** 2).sum())
    if one_line <= 0 or residuals[split] > min(_TWO_LINES * one_line, _CUBIC * cubic) or not turned:
        return []
    return [
        f"the slope breaks at step {steps[split]}: {before:.2g} a step before, {after:.2g} after; fit only "
        f"the steps after it with --window {steps[split]}:"
    ]


def _residual(steps: np.ndarray, values: np.ndarray) -> float:
    """What a line leaves of the values: sum of squares."""
    line = fit_line(steps, values)
    return float(((values - line.slope * steps - line.intercept) ** 2).sum())
