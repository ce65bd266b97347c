"""What a job may use, and the executor that keeps to it."""

from dataclasses import dataclass, field

import numpy as np

from relexio import backend, graph, plan
from relexio.cache import SMALL
from relexio.errors import RequestError
from relexio.trajectory.schema import count_type, moves_chunk
from relexio.trajectory.store import Store


@dataclass(frozen=True)
class Resources:
    """Bytes of memory, worker threads (None for every core), device, bytes of device memory (None for most of it).

    ``held`` is what the program held when it was asked for the job: what one pass leaves to the next is not counted twice.
    """

    memory: int = plan.DEFAULT_MEMORY
    workers: int | None = None
    device: str = "auto"
    device_memory: int | None = None
    held: int = field(default_factory=plan.resident_bytes)

    def __post_init__(self) -> None:
        if self.workers is not None and (type(self.workers) is not int or self.workers < 1):
            raise RequestError(f"workers: {self.workers!r} is not a number of at least 1")
        if self.device not in backend.DEVICES:
            raise RequestError(f"unknown device {self.device!r}; known are {', '.join(backend.DEVICES)}")

    def for_gram(self, store: Store, steps: int, whole: bool = True) -> graph.Executor:
        """An executor for the Gram pass over T = ``steps``, or for the matrix-free one. Raises BudgetError."""
        shape = _Shape.of(store)
        need = plan.fit_need(shape.block, shape.itemsize, shape.counts, shape.chunks, steps, whole)
        held = 4 * 8 * steps * steps + 2 * min(SMALL, 8 * steps * steps * len(store.tensors))
        return self._executor(
            need, shared=held
        )  # one Gram matrix and its copies, and all of them where they are kept whole

    def for_combine(self, store: Store, steps: int, targets: int) -> graph.Executor:
        """An executor for the pass that writes ``targets`` predictions. Raises BudgetError."""
        shape = _Shape.of(store)
        need = plan.combine_need(shape.block, shape.itemsize, shape.counts, shape.chunks, steps, targets)
        return self._executor(need, shared=8 * steps * targets * len(store.tensors))

    def plan_for(self, need: plan.Need, shared: int = 0) -> plan.Plan:
        """The plan for a job of that need. Raises BudgetError."""
        return plan.make(need, self.memory, self.held, self.workers, shared)

    def _executor(self, need: plan.Need, shared: int = 0) -> graph.Executor:
        device = backend.resolve(self.device)
        limit = 0
        if device == "cuda":
            limit = self.device_memory or int(backend.free_device_bytes() * 0.8)
        return graph.Executor(self.plan_for(need, shared), device, limit)


@dataclass(frozen=True)
class _Shape:
    """The largest block of a store, in elements and bytes an element; over all groups, bytes of the counts of one
    element, and of one decoded chunk of moves (and of the largest twice more, while it is decoded)."""

    block: int
    itemsize: int
    counts: int
    chunks: int

    @classmethod
    def of(cls, store: Store) -> "_Shape":
        itemsize = max((tensor.kind.itemsize for tensor in store.tensors if tensor.size), default=1)
        block = min(store.block, max((tensor.size for tensor in store.tensors), default=1))
        numbers = [np.dtype(count_type(len(group.steps))).itemsize for group in store.groups]
        chunks = [
            moves_chunk(store.block, len(group.steps)) * (number + itemsize)
            for group, number in zip(store.groups, numbers, strict=True)
        ]
        return cls(block, itemsize, sum(numbers), sum(chunks) + 2 * max(chunks))
