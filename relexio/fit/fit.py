"""From Gram matrices to T weights for each tensor: the fit, its backtest, and its figures for every tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from shlex import quote

import numpy as np
from threadpoolctl import threadpool_limits

from relexio.dtypes import is_buffer
from relexio.engine.resources import Resources
from relexio.errors import RequestError
from relexio.fit.grams import SOLVERS, GramPlan, Grams, make_grams, plan_grams
from relexio.methods import Recipe, Window, directions
from relexio.methods.backtest import Backtest, backtest, heeding_norms
from relexio.methods.curves import Line, fit_line
from relexio.methods.line_tests import LEAD, base_doubt, signs
from relexio.methods.roles import Choice
from relexio.methods.skill import Errors, errors, terms
from relexio.methods.trials import Trial, make_folds
from relexio.methods.verdict import Outlook, outlook
from relexio.progress import Stages
from relexio.store.schema import Tensor
from relexio.store.store import Store
from relexio.words import Selection, describe_steps


@dataclass(frozen=True)
class TensorFit:
    """How one tensor moved: share of elements changed, sigma^2 along the rank and in all, first line, backtest errors.

    ``line`` is None for a tensor that never changed or cannot be fitted, ``sigma2_total`` where the solver does not know
    it.
    """

    name: str
    size: int
    changed: float
    sigma2: float = 0.0
    sigma2_total: float | None = None
    line: Line | None = None
    errors: Errors = field(default_factory=Errors)

    @property
    def energy(self) -> float | None:
        """The share of sigma^2 that the rank keeps; None for a tensor that never changed."""
        return self.sigma2 / self.sigma2_total if self.sigma2_total else None


@dataclass(frozen=True)
class FitPlan:
    """A fit that has been checked and planned; ``notes`` are for the user."""

    store: Store
    steps: tuple[int, ...]
    recipe: Recipe
    choice: Choice
    grams: GramPlan
    notes: list[str]


@dataclass(frozen=True)
class Fit:
    """A recipe fitted to a window, for the chosen tensors. ``notes`` are for the user."""

    store: Store
    steps: tuple[int, ...]
    recipe: Recipe
    grams: Grams
    choice: Choice = field(default_factory=Choice)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.store.shown}, {describe_steps(self.steps)}: {self.recipe.label}>"

    def rows(self) -> list[tuple[str, str]]:
        """What is fitted to what, for people."""
        rows = [("window", describe_steps(self.steps)), ("method", f"{self.recipe}, strength {self.recipe.strength:g}")]
        if len(self.chosen) < len(self.store.tensors):
            source = f"step {self.steps[-1]}" if self.choice.others == "last" else "the base"
            count = f"{len(self.chosen)} of {len(self.store.tensors)}"
            rows.append(("tensors", f"{count}; the others are as in {source}"))
        return rows

    @cached_property
    def chosen(self) -> frozenset[str]:
        """The names of the tensors that are predicted."""
        return self.choice.of(tensor.name for tensor in self.store.tensors)

    def weights(self, step: int | None) -> dict[str, np.ndarray]:
        """The weights [T] of the observed deltas that make up the prediction, by tensor; as ``weights_for`` has them."""
        return {name: weights[:, 0] for name, weights in self.weights_for([step]).items()}

    def weights_for(self, targets: Sequence[int | None]) -> dict[str, np.ndarray]:
        """Weights [T, S] over the window for S targets, by tensor; a tensor that keeps its last values has none.

        Raises RequestError for a target that the recipe cannot reach.
        """
        self.recipe.check(np.array(self.steps), targets)
        weights = ((tensor.name, self._weights(tensor, targets)) for tensor in self.store.tensors)
        return {name: array for name, array in weights if array is not None}

    def _weights(self, tensor: Tensor, targets: Sequence[int | None]) -> np.ndarray | None:
        if tensor.name not in self.chosen and self.choice.others == "base":
            return np.zeros((len(self.steps), len(targets)))
        if not tensor.kind.is_float or not tensor.size or self._recipe(tensor.name, self.recipe) is None:
            return None
        window = Window(self.grams.of(tensor, self.steps), np.array(self.steps))
        return self.recipe.weights(window, targets)

    def _recipe(self, name: str, recipe: Recipe) -> Recipe | None:
        return heeding_norms(name, recipe) if name in self.chosen else None

    @cached_property
    def backtest(self) -> Backtest | None:
        """The recipe, judged inside its window: fitted up to several cut-offs, compared with the steps after each.

        If more steps are stored before the window, all up to its end are used, and the window keeps its share of
        them. None where that cannot be done: fewer than 3 steps, no tensor that moved, a method that does not extrapolate,
        or a solver that keeps no whole Gram matrix.
        """
        if not self.grams.whole or not self.recipe.way.extrapolates:
            return None
        seen = tuple(step for step in self.grams.steps if step <= self.steps[-1])
        if seen[-len(self.steps) :] != self.steps:
            seen = self.steps
        if len(seen) < 3:
            return None
        trial, steps = Trial(self.recipe, len(self.steps) / len(seen)), np.array(seen)
        folds = [fold for fold in make_folds(steps) if trial.window(fold.known) is not None]
        fitted = [tensor for tensor in self.store.fitted() if tensor.name in self.chosen]
        pairs = ((tensor.name, self.grams.of(tensor, seen)) for tensor in fitted)
        if not folds or not fitted:
            return None
        with threadpool_limits(1):
            result = backtest(pairs, len(fitted), steps, [trial], folds, (self.recipe.strength,), self._recipe)
        return result if result.baseline.any() else None

    def outlook(self, target: int | None) -> Outlook | None:
        """What the backtest says about a target; None without a backtest."""
        return None if self.backtest is None or target is None else outlook(self.backtest, target, self.steps[-1])

    def signs(self) -> list[str]:
        """Evidence that the window is not one line (repeats, a jump, a break in the slope), in words."""
        if not self.grams.whole:
            return []
        total = sum(self.grams.of(tensor, self.steps) for tensor in self.store.fitted() if tensor.name in self.chosen)
        return signs(total, np.array(self.steps)) if isinstance(total, np.ndarray) else []

    def thrown_away(self, step: int) -> float | None:
        """|theta_hat - theta_t|^2 / |theta_t - theta_0|^2 of an observed step of the window, over all tensors.

        None without whole Gram matrices, or for a step at which nothing had moved.
        """
        if not self.grams.whole:
            return None
        row, unit, lost, total = self.steps.index(step), np.eye(len(self.steps)), 0.0, 0.0
        for tensor in self.store.fitted():
            gram, weights = self.grams.of(tensor, self.steps), self._weights(tensor, [step])
            gap = unit[row] - (unit[-1] if weights is None else weights[:, 0])
            lost += max(float(gap @ gram @ gap), 0.0)
            total += float(gram[row, row])
        return lost / total if total > 0 else None

    def skill(self, step: int) -> float | None:
        """Skill of the prediction at a stored step outside the window: above 0 beats keeping the last checkpoint.

        Raises RequestError as ``errors_at`` does.
        """
        return self.errors_at(step).skill

    def errors_at(self, step: int) -> Errors:
        """Errors of the prediction at a stored step outside the window, over all tensors.

        Raises RequestError where the step is not stored, or the solver has kept no Gram matrix of it.
        """
        self.store.find(step)
        if step in self.steps:
            raise RequestError(f"step {step} is in the window, so the fit has seen it; give a step outside the window")
        if step not in self.grams.steps or not self.grams.whole:
            raise RequestError(f"errors at step {step} need the gram solver")
        self.recipe.check(np.array(self.steps), [step])
        count, total = len(self.steps), Errors()
        for tensor in self.store.fitted():
            gram, weights = self.grams.of(tensor, (*self.steps, step)), self._weights(tensor, [step])
            update = np.zeros((count, 1)) if weights is None else weights
            parts = terms(gram, count - 1, weights is None, slice(count), update, np.array([count]))
            total += Errors(*(float(values[0]) for values in errors(parts, 1.0)))
        return total

    def tensors(self) -> list[TensorFit]:
        """Every tensor's figures, in the order of the checkpoint; those that cannot be fitted have only ``changed``."""
        shares, tested = changed_shares(self.store, self.steps), self.backtest
        held_out = tested.tensor_errors(tested.trials[0], self.recipe.strength) if tested else {}
        return [self._tensor(t, shares[t.name], held_out.get(t.name, Errors())) for t in self.store.tensors]

    def _tensor(self, tensor: Tensor, share: float, held_out: Errors) -> TensorFit:
        if not tensor.kind.is_float or not share:
            return TensorFit(tensor.name, tensor.size, share)
        gram = self.grams.of(tensor, self.steps)
        vectors = directions(gram, self.recipe.rank)
        energies = np.einsum("tr,ts,sr->r", vectors, gram, vectors)
        line = fit_line(np.array(self.steps), np.sqrt(max(energies[0], 0.0)) * vectors[:, 0])
        total = float(np.trace(gram)) if self.grams.whole else None
        return TensorFit(tensor.name, tensor.size, share, float(energies.sum()), total, line, held_out)


def changed_shares(store: Store, steps: tuple[int, ...]) -> dict[str, float]:
    """The largest share of each tensor's elements that differ from the base at any one of ``steps``."""
    counts = store.changed_counts(steps).max(axis=1)
    return {t.name: float(n) / t.size if t.size else 0.0 for t, n in zip(store.tensors, counts, strict=True)}


def plan_fit(
    store: Store,
    window: tuple[int, ...],
    recipe: Recipe,
    solver: str,
    resources: Resources,
    choice: Choice | None = None,
) -> FitPlan:
    """Check and plan the fit of a recipe to a window of observed steps, for the chosen tensors (all, without a choice).

    Raises RequestError where the window is too short or a tensor cannot be predicted, BudgetError where memory is.
    """
    choice = choice or Choice()
    recipe.check(np.array(window), [])
    if solver not in SOLVERS:
        raise RequestError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
    if recipe.way.whole:
        solver = _whole(recipe.method, solver)
    shares = changed_shares(store, window)
    chosen = choice.of(shares)
    notes = _carried(store, window, {name: shares[name] for name in chosen})
    if not any(shares[name] for name in chosen):
        what = "of the chosen tensors" if choice != Choice() else "of the tensors"
        notes.append(f"none {what} changed within the window: they stay as they are")
    return FitPlan(store, window, recipe, choice, plan_grams(store, window, recipe.rank, solver, resources), notes)


def _whole(method: str, solver: str) -> str:
    """The solver of a method that uses all of the Gram matrix. Raises RequestError for the one that does not form it."""
    if solver == "blocks":
        raise RequestError(
            f"--method {method} uses the whole Gram matrix, of which --solver blocks keeps the top directions alone; "
            f"leave --solver out, or give --solver gram"
        )
    return "gram"


def make_fit(plan: FitPlan, stages: Stages) -> Fit:
    """Fit as planned: passes over the store only where the Gram matrices are not kept."""
    grams, notes = make_grams(plan.grams, stages), list(plan.notes)
    if not grams.lasting:
        notes.append(f"{plan.store.shown} cannot be written: the fit is not kept for later")
    doubt = doubt_of_base(plan.store, grams)
    return Fit(plan.store, plan.steps, plan.recipe, grams, plan.choice, [*notes, *([doubt] if doubt else [])])


def fit(
    store: Store,
    window: tuple[int, ...],
    recipe: Recipe,
    solver: str,
    resources: Resources,
    stages: Stages,
    choice: Choice | None = None,
) -> Fit:
    """Plan a fit and compute it at once. Raises as ``plan_fit`` does."""
    return make_fit(plan_fit(store, window, recipe, solver, resources, choice), stages)


def doubt_of_base(store: Store, grams: Grams) -> str | None:
    """Why the base does not look like the model that training began from, whatever the window; None without a reason.

    None too where the solver keeps no whole Gram matrices.
    """
    first = grams.steps[:LEAD]
    if not grams.whole or len(first) < 2:
        return None
    total = sum((grams.of(tensor, first) for tensor in store.fitted()), np.zeros(()))
    return base_doubt(total, np.array(first)) if total.any() else None


def _carried(store: Store, window: tuple[int, ...], shares: dict[str, float]) -> list[str]:
    """Notes on integer and bool tensors that changed, by the shares given: they are carried over from the last step.

    Raises RequestError, by name, for tensors of another type that changed: nothing can be said of their future.
    """
    moved = [tensor for tensor in store.tensors if not tensor.kind.is_float and shares.get(tensor.name)]
    refused = [f"{t.name} ({t.dtype})" for t in moved if not is_buffer(t.dtype)]
    if refused:
        raise RequestError(
            f"{store.shown}: {', '.join(refused)}: changed within {describe_steps(window)}; only BF16, F16 and F32 "
            f"tensors can be predicted; leave the others as they are with --exclude"
        )
    return [f"{t.name} ({t.dtype}) changed; it is carried over from step {window[-1]}" for t in moved]


def name_window(store: Store, window: tuple[int, ...]) -> str:
    """The ``--window`` expression of some stored steps."""
    first, last = window[0], window[-1]
    between = all(step in window for step in store.steps if first <= step <= last)
    return f"{first}:{last}" if between else ",".join(map(str, window))


def command(name: str, store: Store, *more: str, window: tuple[int, ...] | None = None) -> str:
    """A command on a trajectory, or on some of its steps, as a shell takes it."""
    within = [] if window in (None, store.steps) else [f"--window {name_window(store, window or ())}"]
    return " ".join(["relexio", name, quote(store.shown), *within, *more])


def choose_window(store: Store, selection: Selection | None) -> tuple[int, ...]:
    """The stored steps that a selection names; all of them without one. Raises RequestError."""
    if selection is None:
        return store.steps
    missing = [step for step in selection.named if step not in store.steps]
    window = tuple(step for step in store.steps if step in selection)
    if missing or not window:
        what = f"step {missing[0]}" if missing else f"any step of {selection.text}"
        raise RequestError(f"{store.shown}: does not hold {what}; it holds {describe_steps(store.steps)}")
    return window
