"""Gram matrices of a trajectory: planned, computed once by one of two solvers, and kept.

The ``gram`` solver keeps M M^T of every tensor, over all stored steps, beside the data (``cache/`` in the store), so
that every later window, rank, target and backtest reads nothing. The ``blocks`` solver never forms M M^T of the data;
it keeps the top eigenpairs of one window, and builds M M^T from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from relexio.engine import graph
from relexio.engine.executor import Executor
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, StoreError
from relexio.methods.eigen import Eigenpairs, power_iteration
from relexio.progress import Stages
from relexio.store.cache import CachedResult, CacheName, has, keep
from relexio.store.schema import Tensor
from relexio.store.storage import METADATA
from relexio.store.store import Store

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
        """M M^T [T, T] over a choice of the steps."""
        rows = [self.steps.index(step) for step in steps]
        return self.read(tensor)[np.ix_(rows, rows)]


@dataclass(frozen=True)
class GramPlan:
    """How Gram matrices over ``steps`` will be obtained: whole by the ``gram`` solver, or the eigenpairs of a rank by ``blocks``.

    ``name``: under which the store keeps the result. ``executor``: of the passes that make it, None where it is kept.
    """

    store: Store
    whole: bool
    steps: tuple[int, ...]
    rank: int
    name: CacheName
    resources: Resources
    executor: Executor | None

    @property
    def kept(self) -> bool:
        """Whether they are in the store already, so that no pass is needed."""
        return self.executor is None

    @cached_property
    def rows(self) -> dict[str, int]:
        """Where each fitted tensor's result stands among those that are kept."""
        return {tensor.name: row for row, tensor in enumerate(self.store.fitted())}

    def begin(self) -> Executor:
        """The executor, once whoever works with it sees the store. Raises BudgetError, ClusterError."""
        # what was kept when this was planned may have been removed since
        executor = self.executor or self.resources.for_gram(self.store, len(self.steps), self.whole)
        executor.require(self.store.files(METADATA))
        return executor


def plan_grams(store: Store, window: tuple[int, ...], rank: int, solver: str, resources: Resources) -> GramPlan:
    """Choose the solver and plan it: ``auto`` takes ``gram`` wherever that fits the memory.

    Memory for making them is planned only where they are not kept yet. Raises BudgetError where no solver fits.
    """
    if solver != "blocks":
        try:
            return _plan(store, True, store.steps, 0, resources)
        except BudgetError:
            if solver == "gram":
                raise
    return _plan(store, False, window, rank, resources)


def _plan(store: Store, whole: bool, steps: tuple[int, ...], rank: int, resources: Resources) -> GramPlan:
    name, executor = CacheName.of(store, "gram" if whole else "blocks", steps, rank), None
    if has(store, name):
        resources.check_reading(store, len(steps))
    else:
        executor = resources.for_gram(store, len(steps), whole)
    return GramPlan(store, whole, steps, rank, name, resources, executor)


def make_grams(plan: GramPlan, stages: Stages) -> Grams:
    """The Gram matrices as planned, computed unless they are kept. Raises StoreError for moves that are not numbers."""
    make, read = (_make_whole, _read_whole) if plan.whole else (_make_pairs, _read_pairs)
    result = keep(plan.store, plan.name, partial(make, plan, stages))
    return Grams(plan.steps, plan.whole, partial(read, plan, result), result.owner is None)


def find_grams(
    store: Store, window: tuple[int, ...], rank: int, solver: str, resources: Resources, stages: Stages
) -> Grams:
    """Plan Gram matrices, and compute them at once. Raises BudgetError."""
    return make_grams(plan_grams(store, window, rank, solver, resources), stages)


def _make_whole(plan: GramPlan, stages: Stages, result: CachedResult) -> None:
    count, tensors = len(plan.steps), plan.store.fitted()
    with result.create("gram", (len(tensors), count, count)) as array:

        def put(tensor: Tensor, gram: np.ndarray) -> None:
            array[plan.rows[tensor.name]] = gram

        executor = plan.begin()
        with stages("fit: Gram matrices", sum(tensor.nbytes for tensor in tensors) * count) as advance:
            graph.gram(plan.store, plan.steps, put, executor, advance)


def _read_whole(plan: GramPlan, result: CachedResult, tensor: Tensor) -> np.ndarray:
    return result.read("gram", plan.rows[tensor.name], (len(plan.rows), len(plan.steps), len(plan.steps)))


def _make_pairs(plan: GramPlan, stages: Stages, result: CachedResult) -> None:
    pairs = _iterate_all(plan.store, plan.steps, plan.rank, plan.begin(), stages)
    with (
        result.create("values", (len(plan.rows), plan.rank)) as values,
        result.create("vectors", (len(plan.rows), len(plan.steps), plan.rank)) as vectors,
    ):
        for name, row in plan.rows.items():
            values[row], vectors[row] = pairs[name].values, pairs[name].vectors


def _read_pairs(plan: GramPlan, result: CachedResult, tensor: Tensor) -> np.ndarray:
    row, count = plan.rows[tensor.name], len(plan.rows)
    vectors = result.read("vectors", row, (count, len(plan.steps), plan.rank))
    return (vectors * result.read("values", row, (count, plan.rank))) @ vectors.T


def _iterate_all(
    store: Store, window: tuple[int, ...], rank: int, executor: Executor, stages: Stages
) -> dict[str, Eigenpairs]:
    """Power iteration on all tensors at once: every round is one pass over the blocks of those not yet done."""
    running = {tensor.name: power_iteration(len(window), rank) for tensor in store.fitted()}
    wanted = {name: next(iteration) for name, iteration in running.items()}
    done: dict[str, Eigenpairs] = {}
    number = 0
    while wanted:
        number += 1
        total = sum(store.tensor(name).nbytes for name in wanted) * len(window)
        with stages(f"fit: power iteration, pass {number}", total) as advance:
            images = graph.operator(store, wanted, window, executor, advance)
        wanted = {}
        for name, image in images.items():
            if not np.isfinite(image).all():
                raise StoreError(f"{store.shown}: tensor {name}: its moves are not numbers; the store is damaged")
            try:
                wanted[name] = running[name].send(image)
            except StopIteration as end:
                done[name] = end.value
    return done
