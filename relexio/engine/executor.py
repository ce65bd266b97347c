"""Where a graph runs: threads of this process. ``cluster`` has the same on worker processes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from dask import threaded
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed
from threadpoolctl import threadpool_limits

from relexio.engine.device import limited, own_stream
from relexio.engine.plan import Plan
from relexio.engine.process import keep_within

#: Takes the bytes of each finished task, in the thread that asked for the pass.
Progress = Callable[[int], None]
#: Takes a result, and its place among those of a pass, in the process that asked for it; perhaps in one of its threads.
Keep = Callable[[int, Any], None]
_BLOCKS_AT_ONCE = 1024


@dataclass(frozen=True)
class Pass:
    """One pass over blocks: makes the nodes of its graph, and knows the bytes of each by its key, for the progress.

    The token makes keys that no other pass on the same cluster has. ``within`` is what works on blocks elsewhere: it is
    called with the token, the key, the function and its arguments.
    """

    within: Callable[..., Any] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    token: str = field(default_factory=lambda: uuid4().hex)

    def task(self, function: Callable[..., Any], *arguments: Any, key: str) -> Delayed:
        """One node, under a key; only ``arguments`` may hold other nodes."""
        return delayed(function, pure=False, traverse=False)(*arguments, dask_key_name=f"{key}-{self.token}")

    def block(self, function: Callable[..., Any], *arguments: Any, key: str, size: int) -> Delayed:
        """One node that works on a block of ``size`` bytes."""
        name = f"{key}-{self.token}"
        self.sizes[name] = size
        if self.within is not None:
            function = partial(self.within, self.token, name, function)
        return self.task(function, *arguments, key=key)

    def shared(self, value: Any) -> Delayed:
        """A node that holds what many others need: on a cluster it travels once to each worker, not with every task."""
        return delayed(value, name=f"shared-{self.token}", traverse=False)


@dataclass(frozen=True)
class Executor:
    """Where a graph runs: threads of this process, on one device, inside a plan."""

    plan: Plan
    device: str = "cpu"
    device_memory: int = 0

    def begin(self) -> Pass:
        """A new pass, whose tasks ``run`` takes."""
        return Pass()

    def run(self, nodes: Pass, tasks: Iterable[Delayed], progress: Progress, keep: Keep | None = None) -> list[Any]:
        """Compute all tasks and return their results in order, a thousand blocks at a time: a graph takes memory too.

        With ``keep`` a result is handed over as soon as it is ready, and not held.
        """
        results: list[Any] = []
        with (
            self.limits(),
            _Reporter(nodes.sizes, progress, self.plan.projected),
            _pool(self.plan.workers, self.device) as pool,
        ):
            for batch in batches(nodes, tasks):
                if keep is not None:
                    batch = [
                        nodes.task(partial(keep, place), task, key=f"keep-{place}")
                        for place, task in enumerate(batch, len(results))
                    ]
                results += compute(*batch, scheduler=threaded.get, pool=pool, optimize_graph=False)
                nodes.sizes.clear()
        return results

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Hold this process to the plan while inside: threads of linear algebra, and the device's memory."""
        with threadpool_limits(1), limited(self.device, self.device_memory):
            yield

    def require(self, paths: Iterable[Path]) -> None:
        """Raise ClusterError unless whoever does the work sees these files as this process does."""

    def settle(self, directories: Iterable[Path]) -> None:
        """Make durable what other machines wrote below directories."""


def batches(nodes: Pass, tasks: Iterable[Delayed]) -> Iterator[list[Delayed]]:
    """The tasks, a thousand blocks at a time, made when needed."""
    batch: list[Delayed] = []
    for task in tasks:
        batch.append(task)
        if len(nodes.sizes) >= _BLOCKS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _pool(workers: int, device: str) -> Iterator[ThreadPoolExecutor]:
    """Worker threads, all of them done when it ends: after an error too nothing is written any more."""
    pool = ThreadPoolExecutor(workers, initializer=own_stream, initargs=(device,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Reporter(Callback):
    def __init__(self, sizes: dict[str, int], progress: Progress, projected: int) -> None:
        def report(key: str, *_: Any) -> None:
            if key in sizes:
                progress(sizes[key])
                keep_within(projected)

        super().__init__(posttask=report)
