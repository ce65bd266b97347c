"""What a job may use, and the executor that keeps to it."""

import re
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from relexio.engine import device as backend
from relexio.engine import plan
from relexio.engine.executor import Executor
from relexio.engine.process import cores, resident_bytes
from relexio.errors import BudgetError, ClusterError, RequestError
from relexio.store.cache import SMALL
from relexio.store.store import Store

if TYPE_CHECKING:
    from relexio.engine.cluster import Link


@dataclass(frozen=True)
class Resources:
    """Bytes of memory, workers (None for every core; at most eight threads to fit or predict), device, bytes of device memory
    (None for most of it), and where.

    ``scheduler`` is None for threads of this process, ``processes`` for worker processes of this machine, which share the
    memory, or the address of a Dask scheduler, each of whose worker processes has the memory and at most so many threads.
    As a context manager it leaves the cluster, or ends those processes, at its end; else they last as long as the program.
    ``held`` is what the program held when it was asked for the job: what one pass leaves to the next is not counted twice.
    """

    memory: int = plan.DEFAULT_MEMORY
    workers: int | None = None
    device: str = "auto"
    device_memory: int | None = None
    held: int = field(default_factory=resident_bytes)
    scheduler: str | None = None
    _link: "Link | None" = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.workers is not None and (type(self.workers) is not int or self.workers < 1):
            raise RequestError(f"workers: {self.workers!r} is not a whole number of at least 1")
        if self.device not in backend.DEVICES:
            raise RequestError(f"unknown device {self.device!r}; known are {', '.join(backend.DEVICES)}")
        if self.scheduler is not None and self._link is None:
            object.__setattr__(self, "_link", _link(self.scheduler))  # what ``replace`` makes of it shares the cluster

    def __enter__(self) -> "Resources":
        return self

    def __exit__(self, *_: object) -> None:
        if self._link is not None:
            self._link.close()

    def for_gram(self, store: Store, steps: int, whole: bool = True) -> Executor:
        """An executor for the Gram pass over T = ``steps``, or for the matrix-free one. Raises BudgetError."""
        need = plan.fit_need(plan.Shape.of(store), steps, whole)
        worth = whole and self.device == "auto" and self._saved(store) > plan.WORTH_CUDA
        return self._on_device(need, plan.gram_bytes(steps, len(store.tensors), SMALL), worth)

    def check_reading(self, store: Store, steps: int) -> None:
        """Raise BudgetError unless Gram matrices over T = ``steps`` that are kept can be read."""
        plan.make(plan.Need(plan.gram_bytes(steps, len(store.tensors), SMALL), 0.0), self.memory, self.held, 1)

    def for_combine(self, store: Store, steps: int, targets: int) -> Executor:
        """An executor for the pass that writes ``targets`` predictions. Raises BudgetError."""
        need = plan.combine_need(plan.Shape.of(store), steps, targets)
        return self._on_device(need, 8 * steps * targets * len(store.tensors), False)

    def on_cpu(self, need: plan.Need, shared: int = 0) -> Executor:
        """An executor for a job of that need that knows no other device; ``shared`` bytes are held once. Raises BudgetError."""
        if self._link is not None:
            return self._link.executor(self._link.plan(need, self.memory, self.held, self.workers, shared), "cpu", 0)
        return Executor(plan.make(need, self.memory, self.held, self.workers, shared))

    def _saved(self, store: Store) -> float:
        elements = sum(tensor.size for tensor in store.fitted())
        return plan.saved(store.moves(), elements, self._threads().workers or cores())

    def _threads(self) -> "Resources":
        """The same, with as many threads as are of use where no number was asked for."""
        if self.workers is not None or self._link is not None:
            return self
        return replace(self, workers=min(cores(), plan.MOST_THREADS))

    def _on_device(self, need: plan.Need, shared: int, worth: bool) -> Executor:
        """An executor on the device asked for; for ``auto`` on a GPU if that is ``worth`` it and there is one."""
        asked = self._threads()
        if asked._choose(worth) == "cuda":
            try:
                return asked._on_cuda(need, shared + plan.CUDA)
            except BudgetError:
                if self.device == "cuda":  # and not auto: the CPU does with less
                    raise
        return asked.on_cpu(need, shared)

    def _choose(self, worth: bool) -> str:
        if self.device == "auto" and not worth:
            return "cpu"
        return self._link.device(self.device) if self._link else backend.resolve(self.device)

    def _on_cuda(self, need: plan.Need, shared: int) -> Executor:
        asked = (need, self.memory, self.held, self.workers, shared)
        if self._link is not None:
            limit = self._link.device_limit(self.device_memory)
            return self._link.executor(self._link.plan(*asked, limit), "cuda", limit)
        plan.make(*asked, device_memory=sys.maxsize)  # before the device takes memory
        limit = backend.device_limit(self.device_memory)
        return Executor(plan.make(*asked, device_memory=limit), "cuda", limit)


def _link(scheduler: str) -> "Link":
    """A connection yet to be made. Raises RequestError for what is no address, ClusterError without dask.distributed."""
    if scheduler != "processes" and not re.fullmatch(r"(tcp|tls)://\S+:\d+", scheduler):
        raise RequestError(
            f"--scheduler {scheduler}: give processes, or the address of a Dask scheduler: tcp://HOST:PORT"
        )
    try:
        from relexio.engine.cluster import Link
    except ImportError as error:
        raise ClusterError(
            f"--scheduler {scheduler} needs dask.distributed ({error}); pip install 'relexio[distributed]'"
        ) from error
    return Link(scheduler)
