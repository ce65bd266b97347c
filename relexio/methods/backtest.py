"""The backtest in T-space: every trial at every held-out step, over all tensors of a model.

Everything is a matter of Gram matrices: a prediction fitted up to a cut-off is a vector of weights over all steps, and its
error at a later step is a quadratic form in it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from relexio.methods.recipe import Recipe
from relexio.methods.registry import Window, leading
from relexio.methods.roles import PARTS, part_of
from relexio.methods.skill import TERMS, Errors, cosine, errors, ratio, terms
from relexio.methods.trials import HORIZONS, Fold, Trial, within

#: Tensors that are tried together: at most so many, and so many bytes of their Gram matrices.
_TOGETHER, _GRAMS = 64, 1 << 22
#: Which recipe a tensor of that name gets in a trial; None leaves it as it is in the last known checkpoint.
Chosen = Callable[[str, Recipe], Recipe | None]


def heeding_norms(name: str, recipe: Recipe) -> Recipe | None:
    """The recipe, but for norms in a method that keeps those as they are."""
    return None if recipe.way.keeps_norms and part_of(name) == "norm" else recipe


def try_all(
    grams: np.ndarray, steps: np.ndarray, trials: list[Trial], folds: list[Fold], heeded: np.ndarray
) -> np.ndarray:
    """The terms of the errors (skill.py) of every trial at every held-out step: [N, trials, columns, 6] for N tensors.

    ``grams`` [N, T, T] are over all of ``steps`` [T]. Where ``heeded`` [N, trials] is False, a trial leaves that tensor as
    it is in the last known checkpoint. NaN where a trial's window would be too short, or begins at step 0 for a method that
    counts from there.
    """
    result, start = np.full((len(grams), len(trials), columns(folds), TERMS), np.nan), 0
    most = max((trial.recipe.rank for trial in trials if "rank" in trial.recipe.way.uses), default=0)
    for fold in folds:
        windows: dict[int, Window] = {}
        stop = start + len(fold.held_out)
        for column, trial in enumerate(trials):
            count = trial.window(fold.known)
            if count is None or (trial.recipe.way.from_zero and steps[fold.known - count] <= 0):
                continue
            if count not in windows:
                inside = slice(fold.known - count, fold.known)
                windows[count] = _window(grams[:, inside, inside], steps[inside], most)
            tried = _try(grams, steps, windows[count], fold, trial.recipe)
            tried[~heeded[:, column], :, :-1] = 0.0  # all but the baseline
            result[:, column, start:stop] = tried
        start = stop
    return result


def _window(grams: np.ndarray, steps: np.ndarray, most: int) -> Window:
    """A window of tensors with its ``most`` first directions found once for all ranks."""
    rank = min(most, len(steps))
    return Window(grams, steps, {rank: leading(grams, rank)} if rank else {})


def _try(grams: np.ndarray, steps: np.ndarray, window: Window, fold: Fold, recipe: Recipe) -> np.ndarray:
    held_out, inside = np.array(fold.held_out), slice(fold.known - len(window.steps), fold.known)
    moved = window.gram.any(axis=(1, 2), keepdims=True)
    update = np.where(moved, recipe.way.weights(window, steps[held_out], recipe), 0.0)
    return terms(grams, fold.known - 1, recipe.way.from_last, inside, update, held_out)


def columns(folds: list[Fold]) -> int:
    """How many predictions of held-out steps each trial makes."""
    return sum(len(fold.held_out) for fold in folds)


def together(steps: int) -> int:
    """How many tensors are tried together over so many steps."""
    return max(1, min(_TOGETHER, _GRAMS // (8 * steps**2)))


def bytes_of(tensors: int, steps: int, trials: int, folds: list[Fold], strengths: int) -> int:
    """Bytes that a backtest of so many steps holds: its result, and the tensors that are tried together."""
    each = 8 * (8 * steps**2 + 4 * TERMS * trials * columns(folds))
    sums = 8 * TERMS * len(PARTS) * trials * columns(folds)
    return together(steps) * each + sums + 8 * tensors * columns(folds) * (trials * strengths + 1)


@dataclass(frozen=True)
class Backtest:
    """The results of every trial at every held-out step (a column), for a whole model.

    ``totals`` [parts, trials, columns, 6] are the terms of the errors, summed over the tensors of a part; ``predicted``
    [tensors, trials, columns, strengths] and ``baseline`` [tensors, columns] the squared errors of each tensor.
    """

    steps: np.ndarray
    folds: list[Fold]
    trials: list[Trial]
    strengths: tuple[float, ...]
    names: list[str]
    totals: np.ndarray
    predicted: np.ndarray
    baseline: np.ndarray

    @cached_property
    def known(self) -> np.ndarray:
        """The last known step of every column."""
        return np.array([self.steps[fold.known - 1] for fold in self.folds for _ in fold.held_out])

    @cached_property
    def held_out(self) -> np.ndarray:
        """The held-out step of every column."""
        return np.array([self.steps[index] for fold in self.folds for index in fold.held_out])

    @cached_property
    def times(self) -> np.ndarray:
        """The held-out step of every column, in times the last known one."""
        return self.held_out / np.maximum(self.known, 1)

    @cached_property
    def horizons(self) -> np.ndarray:
        """Which of HORIZONS every column is within."""
        return np.array([within(times) for times in self.times])

    @cached_property
    def order(self) -> dict[Trial, int]:
        """The place of every trial among all of them."""
        return {trial: place for place, trial in enumerate(self.trials)}

    def pooled(self, trial: Trial, part: str | None = None) -> np.ndarray:
        """Terms [columns, 6] of a trial, summed over all tensors or those of a part."""
        sums = self.totals[:, self.order[trial]]
        return sums.sum(axis=0) if part is None else sums[PARTS.index(part)]

    def errors(self, trial: Trial, strength: float, among: np.ndarray | None = None) -> Errors:
        """Errors summed over all tensors and over the columns (a mask ``among`` them)."""
        chosen = slice(None) if among is None else among
        predicted, baseline = errors(self.pooled(trial), strength)
        return Errors(float(predicted[chosen].sum()), float(baseline[chosen].sum()))

    def by_horizon(
        self, trial: Trial, strength: float, among: np.ndarray | None = None, part: str | None = None
    ) -> np.ndarray:
        """Skill within each of HORIZONS, errors pooled over its columns and all tensors; NaN where nothing was held out."""
        predicted, baseline = errors(self.pooled(trial, part), strength)
        inside = self.horizons[:, None] == np.arange(len(HORIZONS))
        inside = inside if among is None else inside & among[:, None]
        return ratio(predicted @ inside, baseline @ inside)

    def medians(self, trial: Trial, strength: float) -> np.ndarray:
        """The median skill over the tensors that moved, for every column: [columns]."""
        skills = ratio(self.predicted[:, self.order[trial], :, self.strengths.index(strength)], self.baseline)
        result, tried = np.full(skills.shape[1], np.nan), ~np.isnan(skills).all(axis=0)
        result[tried] = np.nanmedian(skills[:, tried], axis=0)
        return result

    def tensor_errors(self, trial: Trial, strength: float) -> dict[str, Errors]:
        """Errors of each tensor, summed over the columns."""
        predicted = self.predicted[:, self.order[trial], :, self.strengths.index(strength)].sum(axis=1)
        pairs = zip(predicted.tolist(), self.baseline.sum(axis=1).tolist(), strict=True)
        return {name: Errors(*pair) for name, pair in zip(self.names, pairs, strict=True)}

    def cosines(self, trial: Trial, strength: float) -> np.ndarray:
        """Cosine of the predicted and the real update of the whole model, for every column: [columns]."""
        return cosine(self.pooled(trial), strength)


def backtest(
    grams: Iterable[tuple[str, np.ndarray]],
    count: int,
    steps: np.ndarray,
    trials: list[Trial],
    folds: list[Fold],
    strengths: tuple[float, ...],
    chosen: Chosen = heeding_norms,
) -> Backtest:
    """Try everything on the Gram matrices [T, T] of ``count`` tensors by name, a few at a time."""
    totals = np.zeros((len(PARTS), len(trials), columns(folds), TERMS))
    predicted = np.zeros((count, len(trials), columns(folds), len(strengths)))
    baseline = np.zeros((count, columns(folds)))
    names: list[str] = []
    pairs = iter(grams)
    while group := list(islice(pairs, together(len(steps)))):
        places = [len(names) + i for i, (_, gram) in enumerate(group) if gram.any()]
        names += [name for name, _ in group]
        if not places:
            continue
        moved = [names[place] for place in places]
        heeded = np.array([[chosen(name, trial.recipe) is not None for trial in trials] for name in moved])
        sums = try_all(np.stack([gram for _, gram in group if gram.any()]), steps, trials, folds, heeded)
        for name, each in zip(moved, sums, strict=True):
            totals[PARTS.index(part_of(name))] += each
        for i, strength in enumerate(strengths):
            predicted[places, :, :, i], _ = errors(sums, strength)
        baseline[places] = np.fmax.reduce(sums[..., -1], axis=1)  # the same for every trial that has a window
    return Backtest(steps, folds, trials, strengths, names, totals, predicted, baseline)
