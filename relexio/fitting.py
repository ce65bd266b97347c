"""From a trajectory to T weights for each tensor: Gram matrices made once and kept, the two solvers, the fit.

The ``gram`` solver keeps M M^T of every tensor, over all stored steps, beside the data (``cache/`` in the store), so
that every later window, rank, target and backtest reads nothing. The ``blocks`` solver never forms M M^T of the data;
it keeps the top eigenpairs of one window, and M M^T is what they make up.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from relexio import graph
from relexio.cache import Kept, has, keep
from relexio.checkpoints.layout import Selection
from relexio.dtypes import is_buffer
from relexio.errors import BudgetError, RequestError, StoreError
from relexio.executor import Executor
from relexio.extrapolate.fit import Line, fit_line
from relexio.extrapolate.methods import METHODS, Recipe, directions
from relexio.extrapolate.skill import Errors, backtest_window, held_out
from relexio.places import METADATA
from relexio.power import Eigenpairs, power_iteration
from relexio.progress import Stages
from relexio.resources import Resources
from relexio.trajectory.schema import Tensor
from relexio.trajectory.store import Store, describe_steps

SOLVERS = ("auto", "gram", "blocks")


@dataclass(frozen=True)
class Grams:
    """The Gram matrix of every fitted tensor over ``steps``, read one at a time.

    ``whole`` if no eigenpair is missing; ``lasting`` if it is kept in the store for later runs.
    """

    steps: tuple[int, ...]
    whole: bool
    read: Callable[[Tensor], np.ndarray]
    lasting: bool

    def of(self, tensor: Tensor, steps: tuple[int, ...]) -> np.ndarray:
        """M M^T [T, T] over some of the steps."""
        places = [self.steps.index(step) for step in steps]
        return self.read(tensor)[np.ix_(places, places)]


def choose_solver(store: Store, window: tuple[int, ...], solver: str, resources: Resources) -> tuple[str, Executor]:
    """The solver and its executor: ``auto`` takes ``gram`` wherever it fits the memory. Raises BudgetError if none does."""
    if solver != "blocks":
        try:
            return "gram", resources.for_gram(store, len(store.steps))
        except BudgetError:
            if solver == "gram":
                raise
    return "blocks", resources.for_gram(store, len(window), whole=False)


def find_grams(
    store: Store, window: tuple[int, ...], rank: int, solver: str, resources: Resources, stages: Stages
) -> Grams:
    """Gram matrices by the solver that was asked for, from the cache if they are there. Raises BudgetError."""
    chosen, executor = choose_solver(store, window, solver, resources)
    if chosen == "gram":
        return _gram_solver(store, executor, stages)
    return _blocks_solver(store, window, rank, executor, stages)


def _kept_name(store: Store, solver: str, window: tuple[int, ...], rank: int) -> str:
    if solver == "gram":
        return f"gram-{len(store.groups):04d}"
    digest = hashlib.sha256(repr(window).encode()).hexdigest()[:16]
    return f"blocks-{len(store.groups):04d}-rank{rank}-{digest}"


def is_kept(store: Store, window: tuple[int, ...], rank: int, solver: str) -> bool:
    """Whether the fit that a solver needs is in the store already."""
    return has(store, _kept_name(store, solver, window, rank))


def _gram_solver(store: Store, executor: Executor, stages: Stages) -> Grams:
    places = {tensor.name: place for place, tensor in enumerate(store.fitted())}
    steps, count = store.steps, len(store.steps)

    def build(kept: Kept) -> None:
        with kept.create("gram", (len(places), count, count)) as grams:

            def keep_one(tensor: Tensor, gram: np.ndarray) -> None:
                grams[places[tensor.name]] = gram

            executor.require(store.files(METADATA))
            with stages("fit: Gram matrices", _window_bytes(store, count)) as advance:
                graph.gram(store, steps, keep_one, executor, advance)

    kept = keep(store, _kept_name(store, "gram", (), 0), build)
    return Grams(
        steps,
        True,
        lambda tensor: kept.read("gram", places[tensor.name], (len(places), count, count)),
        kept.owner is None,
    )


def _blocks_solver(store: Store, window: tuple[int, ...], rank: int, executor: Executor, stages: Stages) -> Grams:
    places = {tensor.name: place for place, tensor in enumerate(store.fitted())}

    def build(kept: Kept) -> None:
        executor.require(store.files(METADATA))
        pairs = _iterate_all(store, window, rank, executor, stages)
        with (
            kept.create("values", (len(places), rank)) as values,
            kept.create("vectors", (len(places), len(window), rank)) as vectors,
        ):
            for name, found in pairs.items():
                values[places[name]], vectors[places[name]] = found.values, found.vectors

    def read(tensor: Tensor) -> np.ndarray:
        place = places[tensor.name]
        vectors = kept.read("vectors", place, (len(places), len(window), rank))
        return (vectors * kept.read("values", place, (len(places), rank))) @ vectors.T

    kept = keep(store, _kept_name(store, "blocks", window, rank), build)
    return Grams(window, False, read, kept.owner is None)


def _iterate_all(
    store: Store, window: tuple[int, ...], rank: int, executor: Executor, stages: Stages
) -> dict[str, Eigenpairs]:
    """Power iteration on all tensors at once: every round is one pass over the blocks of those not yet done."""
    running = {tensor.name: power_iteration(len(window), rank) for tensor in store.fitted()}
    wanted = {name: next(iteration) for name, iteration in running.items()}
    done: dict[str, Eigenpairs] = {}
    round_ = 0
    while wanted:
        round_ += 1
        total = sum(store.tensor(name).nbytes for name in wanted) * len(window)
        with stages(f"fit: power iteration, pass {round_}", total) as advance:
            images = graph.operator(store, wanted, window, executor, advance)
        wanted = {}
        for name, image in images.items():
            if not np.isfinite(image).all():
                raise StoreError(f"{store.address}: tensor {name}: its moves are no numbers; damaged")
            try:
                wanted[name] = running[name].send(image)
            except StopIteration as end:
                done[name] = end.value
    return done


def _window_bytes(store: Store, steps: int) -> int:
    return sum(tensor.nbytes for tensor in store.fitted()) * steps


@dataclass(frozen=True)
class TensorFit:
    """How one tensor moved: share of elements changed, sigma^2 kept and in all, its first line, backtest errors.

    ``line`` is None for a tensor that never changed or cannot be fitted, ``total`` where the solver does not know it.
    """

    name: str
    size: int
    changed: float
    kept: float = 0.0
    total: float | None = None
    line: Line | None = None
    errors: Errors = field(default_factory=Errors)

    @property
    def energy(self) -> float | None:
        """The share of sigma^2 that the rank keeps; None for a tensor that never changed."""
        return self.kept / self.total if self.total else None


@dataclass(frozen=True)
class Backtest:
    """A prediction of an observed step from the steps before it: fitted on ``first``..``last``, errors at ``step``."""

    first: int
    last: int
    step: int
    errors: Errors


@dataclass(frozen=True)
class Fit:
    """A recipe fitted to a window. ``notes`` are things that its user should know."""

    store: Store
    steps: tuple[int, ...]
    recipe: Recipe
    grams: Grams
    notes: list[str] = field(default_factory=list)

    def weights(self, targets: list[int]) -> dict[str, np.ndarray]:
        """Weights [T, S] over the window for S targets, by tensor."""
        steps = np.array(self.steps)
        self.recipe.check(steps, targets)
        found = {}
        for tensor in self.store.fitted():
            gram = self.grams.of(tensor, self.steps)
            found[tensor.name] = np.stack([self.recipe.weights(gram, steps, s) for s in targets], axis=1)
        return found

    @property
    def backtest(self) -> Backtest | None:
        """The recipe fitted to the first two thirds of the window and judged at its last step, over all tensors.

        None where that cannot be done: fewer than 3 steps, a rank above the shorter window, a method that does not
        extrapolate, or a solver that keeps no whole Gram matrix.
        """
        window = self._backtest_window
        if window is None:
            return None
        return Backtest(self.steps[0], self.steps[window - 1], self.steps[-1], sum(self._held_out.values(), Errors()))

    @property
    def _backtest_window(self) -> int | None:
        window = backtest_window(len(self.steps))
        possible = self.grams.whole and METHODS[self.recipe.method].extrapolates
        return window if window is not None and possible and self.recipe.rank <= window else None

    @cached_property
    def _held_out(self) -> dict[str, Errors]:
        window, steps = self._backtest_window, np.array(self.steps)
        if window is None:
            return {}
        return {
            tensor.name: held_out(self.grams.of(tensor, self.steps), steps, window, len(steps) - 1, self.recipe)
            for tensor in self.store.fitted()
        }

    def errors_at(self, step: int) -> Errors:
        """Errors of the prediction at a stored step outside the window, over all tensors.

        Raises RequestError where the step is not stored, or the solver has kept no Gram matrix of it.
        """
        self.store.find(step)
        if step in self.steps:
            raise RequestError(f"step {step} is in the window: the fit has seen it, and errors there tell nothing")
        if step not in self.grams.steps or not self.grams.whole:
            raise RequestError(f"errors at step {step} need the gram solver")
        everything = (*self.steps, step)
        count = len(self.steps)
        grams = (self.grams.of(tensor, everything) for tensor in self.store.fitted())
        return sum((held_out(gram, np.array(everything), count, count, self.recipe) for gram in grams), Errors())

    def tensors(self) -> list[TensorFit]:
        """Every tensor's figures, in the order of the checkpoint; those that cannot be fitted have only ``changed``."""
        shares = changed_shares(self.store, self.steps)
        return [self._tensor(t, shares[t.name], self._held_out.get(t.name, Errors())) for t in self.store.tensors]

    def _tensor(self, tensor: Tensor, share: float, errors: Errors) -> TensorFit:
        if not tensor.kind.is_float or not share:
            return TensorFit(tensor.name, tensor.size, share)
        gram = self.grams.of(tensor, self.steps)
        vectors = directions(gram, self.recipe.rank)
        energies = np.einsum("tr,ts,sr->r", vectors, gram, vectors)
        line = fit_line(np.array(self.steps), np.sqrt(max(energies[0], 0.0)) * vectors[:, 0])
        total = float(np.trace(gram)) if self.grams.whole else None
        return TensorFit(tensor.name, tensor.size, share, float(energies.sum()), total, line, errors)


def changed_shares(store: Store, steps: tuple[int, ...]) -> dict[str, float]:
    """The largest share of each tensor's elements that differ from the base at any one of ``steps``."""
    counts = np.max([store.changed(group)[:, held].max(axis=1) for group, held, _ in store.columns(steps)], axis=0)
    return {t.name: float(n) / t.size if t.size else 0.0 for t, n in zip(store.tensors, counts, strict=True)}


def fit(
    store: Store, window: tuple[int, ...], recipe: Recipe, solver: str, resources: Resources, stages: Stages
) -> Fit:
    """Fit a recipe to a window of observed steps.

    Raises RequestError where the window is too short or a tensor cannot be predicted, BudgetError where memory is.
    """
    recipe.check(np.array(window), [])
    if solver not in SOLVERS:
        raise RequestError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
    notes = check_carried(store, window)
    grams = find_grams(store, window, recipe.rank, solver, resources, stages)
    if not grams.lasting:
        notes.append(f"{store.address} cannot be written: the fit is not kept for later")
    return Fit(store, window, recipe, grams, notes)


def check_carried(store: Store, window: tuple[int, ...]) -> list[str]:
    """Notes on integer and bool tensors that changed within the window: they are carried over from its last step.

    Raises RequestError, by name, for tensors of another type that changed: nothing can be said of their future.
    """
    shares = changed_shares(store, window)
    moved = [t for t in store.tensors if not t.kind.is_float and shares[t.name]]
    refused = [f"{t.name} ({t.dtype})" for t in moved if not is_buffer(t.dtype)]
    if refused:
        raise RequestError(
            f"{store.address}: {', '.join(refused)}: changed within {describe_steps(window)}; only BF16, F16 and F32 "
            f"tensors can be predicted, others only where they never change"
        )
    return [f"{t.name} ({t.dtype}) changed; it is carried over from step {window[-1]}" for t in moved]


def choose_window(store: Store, selection: Selection | None) -> tuple[int, ...]:
    """The stored steps that a selection names; all of them without one. Raises RequestError."""
    if selection is None:
        return store.steps
    missing = [step for step in selection.named if step not in store.steps]
    window = tuple(step for step in store.steps if step in selection)
    if missing or not window:
        what = f"step {missing[0]}" if missing else f"any step of {selection.text}"
        raise RequestError(f"{store.address}: does not hold {what}; it holds {describe_steps(store.steps)}")
    return window
