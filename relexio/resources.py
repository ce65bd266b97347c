"""What a job may use, and the executor that keeps to it."""

import sys
from dataclasses import dataclass, field

from relexio import backend, graph, plan
from relexio.cache import SMALL
from relexio.errors import BudgetError, RequestError
from relexio.trajectory.schema import moves_chunk
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
        need = plan.fit_need(shape.block, shape.itemsize, shape.groups, shape.chunks, steps, whole)
        held = 4 * 8 * steps * steps + 2 * min(SMALL, 8 * steps * steps * len(store.tensors))
        return self._executor(
            need, shared=held
        )  # one Gram matrix and its copies, and all of them where they are kept whole

    def for_combine(self, store: Store, steps: int, targets: int) -> graph.Executor:
        """An executor for the pass that writes ``targets`` predictions. Raises BudgetError."""
        shape = _Shape.of(store)
        need = plan.combine_need(shape.block, shape.itemsize, shape.groups, shape.chunks, steps, targets)
        return self._executor(need, shared=8 * steps * targets * len(store.tensors))

    def plan_for(self, need: plan.Need, shared: int = 0) -> plan.Plan:
        """The plan for a job of that need on the CPU. Raises BudgetError."""
        return plan.make(need, self.memory, self.held, self.workers, shared)

    def _executor(self, need: plan.Need, shared: int = 0) -> graph.Executor:
        if backend.resolve(self.device) == "cuda":
            try:
                return self._on_device(need, shared + plan.CUDA)
            except BudgetError:
                if self.device == "cuda":  # and not auto: the CPU does with less
                    raise
        return graph.Executor(self.plan_for(need, shared))

    def _on_device(self, need: plan.Need, shared: int) -> graph.Executor:
        plan.make(need, self.memory, self.held, self.workers, shared, sys.maxsize)  # before the device takes memory
        limit = backend.device_limit(self.device_memory)
        made = plan.make(need, self.memory, self.held, self.workers, shared, limit)
        return graph.Executor(made, "cuda", limit)


@dataclass(frozen=True)
class _Shape:
    """The largest block of a store, in elements and bytes an element; groups, and bytes of one chunk of each."""

    block: int
    itemsize: int
    groups: int
    chunks: int

    @classmethod
    def of(cls, store: Store) -> "_Shape":
        kinds = {tensor.kind for tensor in store.tensors if tensor.size}
        block = min(store.block, max((tensor.size for tensor in store.tensors), default=1))
        move = 4 + max((kind.itemsize for kind in kinds), default=1)
        chunks = sum(moves_chunk(store.block, len(group.steps)) * move for group in store.groups)
        return cls(block, max((kind.itemsize for kind in kinds), default=1), len(store.groups), chunks)
