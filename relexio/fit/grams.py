"""Gram matrices of a trajectory: made once by one of two solvers, and kept.

The ``gram`` solver keeps M M^T of every tensor, over all stored steps, beside the data (``cache/`` in the store), so
that every later window, rank, target and backtest reads nothing. The ``blocks`` solver never forms M M^T of the data;
it keeps the top eigenpairs of one window, and M M^T is what they make up.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from relexio.engine import graph
from relexio.engine.executor import Executor
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, StoreError
from relexio.methods.eigen import Eigenpairs, power_iteration
from relexio.progress import Stages
from relexio.store.cache import CacheName, Kept, has, keep
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


def is_kept(store: Store, window: tuple[int, ...], rank: int, solver: str) -> bool:
    """Whether the fit that a solver needs is in the store already."""
    return has(store, CacheName.of(store, solver, window, rank))


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

    kept = keep(store, CacheName.of(store, "gram", (), 0), build)
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

    kept = keep(store, CacheName.of(store, "blocks", window, rank), build)
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
                raise StoreError(f"{store.shown}: tensor {name}: its moves are no numbers; damaged")
            try:
                wanted[name] = running[name].send(image)
            except StopIteration as end:
                done[name] = end.value
    return done


def _window_bytes(store: Store, steps: int) -> int:
    return sum(tensor.nbytes for tensor in store.fitted()) * steps
