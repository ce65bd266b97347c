"""A graph on a cluster: tasks sent, news of them followed, results fetched, and nothing left running."""

import asyncio
import queue
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dask.delayed import Delayed
from distributed import CancelledError, Client, Future, KilledWorker, as_completed
from distributed.comm.core import CommClosedError

from relexio.engine.cluster.worker import TOPIC, end_pass, fingerprint, sync_all, unlike, work
from relexio.engine.executor import Executor, Keep, Pass, Progress, batches
from relexio.errors import ClusterError, RelexioError

_GONE = "the Dask scheduler is gone; start it and its workers, and run the same command again"
_CUT = "the connection to the Dask cluster was cut; check that its scheduler and workers run, and run the same command again"
_DROPPED = "the Dask cluster dropped this work; look at the scheduler's log, and run the same command again"
_NO_WORKERS = "all workers of the cluster are gone; start some, and run the same command again"
PATIENCE = 8.0  # seconds for a scheduler to answer, and for workers to be there
_ALONE = 60.0  # seconds without any worker, in the middle of a pass, after which none is expected any more
_LOST = (OSError, ValueError, RuntimeError)  # what Dask raises where the cluster is gone


@dataclass(frozen=True)
class ClusterExecutor(Executor):
    """Worker processes of a Dask cluster, each inside the plan; of ``local`` ones there is one for each of its workers."""

    connect: Callable[[], Client] = field(kw_only=True)
    local: bool = field(kw_only=True)

    def begin(self) -> Pass:
        """A new pass, whose tasks ``run`` takes."""
        plan = replace(self.plan, workers=1) if self.local else self.plan
        return Pass(partial(work, Executor(plan, self.device, self.device_memory)))

    def run(self, nodes: Pass, tasks: Iterable[Delayed], progress: Progress, keep: Keep | None = None) -> list[Any]:
        """As the executor of threads does it. Raises ClusterError where the cluster is lost."""
        client = self.connect()
        results: list[Any] = []
        with reached(client), _reports(client, nodes.token) as reports:

            def report() -> None:
                with suppress(queue.Empty):
                    progress(nodes.sizes.pop(reports.get(timeout=0.05), 0))

            for batch in batches(nodes, tasks):
                results += _compute(client, batch, report, keep, len(results))
                progress(sum(nodes.sizes.values()))  # of workers that died since, or reports still on their way
                nodes.sizes.clear()
        return results

    def require(self, paths: Iterable[Path]) -> None:
        """Raise ClusterError unless every worker sees these files as this process does."""
        expected = {path.absolute(): fingerprint(path) for path in paths}
        deadline = time.monotonic() + (0 if self.local else PATIENCE)
        client = self.connect()
        while True:  # a file system shared over a network may take a moment to show a new file
            with reached(client):
                unseen = [(name, path) for name, path in client.run(unlike, expected).items() if path is not None]
            if not unseen:
                return
            if time.monotonic() > deadline:
                name, path = unseen[0]
                raise ClusterError(
                    f"worker {name}: does not see {path} as it is on {socket.gethostname()}; "
                    f"checkpoints, trajectory and outputs must be on storage that all workers share, under the same path"
                )
            time.sleep(0.5)

    def settle(self, directories: Iterable[Path]) -> None:
        """Make durable what workers on other machines have written below directories."""
        if not self.local:
            client = self.connect()
            with reached(client):
                client.run(sync_all, [directory.absolute() for directory in directories])


@contextmanager
def reached(client: Client) -> Iterator[None]:
    """Turn what Dask raises when it is the scheduler or the way to it that is gone into one ClusterError."""
    try:
        yield
    except _LOST as error:
        running = client.status == "running"
        if isinstance(error, RelexioError) or (running and not isinstance(error, CommClosedError)):
            raise
        raise ClusterError(_CUT if running else _GONE) from error


@contextmanager
def _reports(client: Client, token: str) -> "Iterator[queue.SimpleQueue[str]]":
    """The keys of a pass's finished blocks, as workers report them. Nothing of the pass runs on when it ends."""
    reports: queue.SimpleQueue[str] = queue.SimpleQueue()
    client.subscribe_topic(TOPIC, lambda event: reports.put(event[1]))
    try:
        yield reports
    finally:
        with suppress(*_LOST):  # the cluster may be the very thing that is gone
            client.unsubscribe_topic(TOPIC)
            while client.status == "running" and sum(client.run(end_pass, token, on_error="ignore").values()):
                time.sleep(0.05)


def _compute(
    client: Client, tasks: list[Delayed], report: Callable[[], None], keep: Keep | None, first: int
) -> list[Any]:
    """Results in order, or handed to ``keep`` one by one; ``report`` is called again and again meanwhile."""
    with _submitted(client, tasks) as places:
        done = as_completed(list(places), loop=client.loop)
        while not done.is_empty():
            report()
            for future in done.next_batch(block=False):
                if keep is not None:
                    keep(first + places[future], future.result())
                    del places[future]  # the cluster need not hold it any more
                elif future.status != "finished":
                    future.result()  # raises what the task raised
        return client.gather(list(places)) if keep is None else [None] * len(tasks)


@contextmanager
def _submitted(client: Client, tasks: list[Delayed]) -> "Iterator[dict[Future[Any], int]]":
    """Tasks under way, and their places; taken back on an error, and where no worker has been there for a minute."""
    places = {future: place for place, future in enumerate(client.compute(tasks, optimize_graph=False))}
    loop: Any = client.loop
    guard = asyncio.run_coroutine_threadsafe(_cancel_without_workers(client, places), loop.asyncio_loop)
    try:
        yield places
    except BaseException as error:
        with suppress(*_LOST):
            client.cancel(list(places), force=True)
        if isinstance(error, CancelledError):  # with the scheduler all work is
            if client.status != "running":
                raise ClusterError(_GONE) from error
            raise ClusterError(_DROPPED if client.scheduler_info()["workers"] else _NO_WORKERS) from error
        if isinstance(error, KilledWorker):
            raise ClusterError(
                f"every worker that took one block died, the last at {error.last_worker.address}; usually they ran out of "
                f"memory: give workers more, or give a smaller --memory"
            ) from None
        raise
    finally:
        guard.cancel()


async def _cancel_without_workers(client: Client, places: "dict[Future[Any], int]") -> None:
    scheduler: Any = client.scheduler
    alone = time.monotonic()
    while time.monotonic() - alone < _ALONE:
        await asyncio.sleep(1.0)
        if (await scheduler.identity())["workers"]:
            alone = time.monotonic()
    await client.cancel(list(places), force=True)
