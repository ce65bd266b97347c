"""A graph on a cluster: tasks sent, news of them followed, results fetched, and nothing left running."""

import queue
import socket
import time
from asyncio import run_coroutine_threadsafe
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dask.delayed import Delayed
from distributed import Client, Future, KilledWorker
from distributed.comm.core import CommClosedError

from relexio.engine.cluster.worker import TOPIC, Settings, end_pass, seen, sync_all, unlike, work
from relexio.engine.executor import Executor, Keep, Pass, Progress, batches
from relexio.errors import ClusterError, RelexioError

if TYPE_CHECKING:
    from relexio.engine.cluster.link import Link

#: The name of local worker processes in place of a scheduler's address.
PROCESSES = "processes"
_GONE = "the Dask scheduler is gone; start it and its workers, and run the same command again"
_CUT = (
    "the connection to the Dask cluster was cut; see that its scheduler and workers run, and run the same command again"
)
_DROPPED = "the Dask cluster dropped this work; see the scheduler's log, and run the same command again"
_PATIENCE = 8.0  # seconds for a scheduler to answer, and for workers to be there
_ALONE = 60.0  # seconds without any worker, in the middle of a pass, after which none is expected any more


@dataclass(frozen=True)
class _ClusterPass(Pass):
    settings: Callable[[str], Settings] = field(kw_only=True)

    def block(self, function: Callable[..., Any], *parts: Any, key: str, size: int) -> Delayed:
        """One node that works on a block of ``size`` bytes, and says so when it is done."""
        within = partial(work, self.settings(self.token), f"{key}-{self.token}", function)
        return super().block(within, *parts, key=key, size=size)


@dataclass(frozen=True)
class ClusterExecutor(Executor):
    """Where a graph runs: worker processes of a Dask cluster, each inside the plan."""

    link: "Link" = field(kw_only=True)

    @property
    def _client(self) -> Client:
        return self.link.client(self.plan.workers)

    def begin(self) -> Pass:
        """A new pass, whose tasks ``run`` takes."""
        threads = 1 if self.link.scheduler == PROCESSES else self.plan.workers
        return _ClusterPass(
            settings=partial(Settings, threads=threads, device=self.device, device_memory=self.device_memory)
        )

    def run(self, made: Pass, tasks: Iterable[Delayed], progress: Progress, keep: Keep | None = None) -> list[Any]:
        """As the executor of threads does it. Raises ClusterError where the cluster is lost."""
        client = self._client
        results: list[Any] = []
        with reached(client), _watched(client, made.token) as news:
            for batch in batches(made, tasks):
                results += _Batch(client, batch, made.sizes, news).run(progress, keep, len(results))
                made.sizes.clear()
        return results

    def require(self, paths: Iterable[Path]) -> None:
        """Raise ClusterError unless every worker sees these files as this process does."""
        expected = {path.absolute(): seen(path) for path in paths}
        deadline = time.monotonic() + _PATIENCE
        client = self._client
        while True:  # a file system shared over a network may take a moment to show a new file
            with reached(client):
                found = {name: path for name, path in client.run(unlike, expected).items() if path is not None}
            if not found:
                return
            if time.monotonic() > deadline or self.link.scheduler == PROCESSES:
                name, path = next(iter(found.items()))
                raise ClusterError(
                    f"worker {name}: does not see {path} as it is on {socket.gethostname()}; "
                    f"checkpoints, trajectory and outputs must be on storage that all workers share, under one path"
                )
            time.sleep(0.5)

    def settle(self, directories: Iterable[Path]) -> None:
        """Make durable what workers on other machines have written below directories."""
        if self.link.scheduler != PROCESSES:
            client = self._client
            with reached(client):
                client.run(sync_all, [directory.absolute() for directory in directories])


@contextmanager
def reached(client: Client) -> Iterator[None]:
    """Turn what Dask raises when it is the scheduler or the way to it that is gone into one ClusterError."""
    try:
        yield
    except RelexioError:
        raise
    except CommClosedError as error:
        raise ClusterError(_GONE if client.status != "running" else _CUT) from error
    except (OSError, ValueError, RuntimeError, TimeoutError) as error:
        if client.status == "running":
            raise
        raise ClusterError(_GONE) from error


def _dropped(client: Client) -> ClusterError:
    """Why work was dropped: with the scheduler all of it is."""
    return ClusterError(_DROPPED if client.status == "running" else _GONE)


@contextmanager
def _watched(client: Client, token: str) -> "Iterator[queue.SimpleQueue[Any]]":
    """What the cluster tells of a pass: keys of finished blocks, and finished futures. Nothing of it runs on when it ends."""
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.subscribe_topic(TOPIC, lambda event: news.put(event[1]))
    try:
        yield news
    finally:
        with suppress(OSError, ValueError, RuntimeError):  # the cluster may be the very thing that is gone
            client.unsubscribe_topic(TOPIC)
            while client.status == "running" and sum(client.run(end_pass, token, on_error="ignore").values()):
                time.sleep(0.05)


class _Batch:
    """Some tasks under way: their futures, and what is told of them."""

    def __init__(
        self, client: Client, tasks: list[Delayed], sizes: dict[str, int], news: "queue.SimpleQueue[Any]"
    ) -> None:
        self._client, self._sizes, self._news = client, sizes, news
        self._futures: list[Any] = client.compute(tasks, optimize_graph=False)
        self._alone: float | None = None

    def run(self, progress: Progress, keep: Keep | None, first: int) -> list[Any]:
        """Wait for all; results in order, or handed to ``keep`` one by one."""
        futures = self._futures
        places = {future.key: place for place, future in enumerate(futures)}
        try:
            for future in futures:
                future.add_done_callback(self._news.put)
            waiting = set(places)
            while waiting:
                told = self._next()
                if isinstance(told, Future) and told.status == "lost":
                    told.add_done_callback(self._news.put)  # its worker died just now: it is made again
                elif isinstance(told, Future) and told.key in waiting:
                    _raise_error(told, self._client)
                    waiting.remove(told.key)
                    if keep is not None:
                        place = places[told.key]
                        keep(first + place, self._fetch([told])[0])
                        futures[place] = None  # the cluster need not hold it any more
                elif isinstance(told, str):
                    progress(self._sizes.pop(told, 0))
            progress(sum(self._sizes.values()))  # told of by workers that died since, or not yet
            return self._fetch(futures) if keep is None else [None] * len(futures)
        except BaseException:
            with suppress(OSError, ValueError, RuntimeError):
                self._client.cancel([future for future in futures if future is not None], force=True)
            raise

    def _fetch(self, futures: list[Any]) -> list[Any]:
        """Results as they lie in the workers. Raises ClusterError where they are lost and cannot be made again."""
        loop: Any = self._client.loop
        found = run_coroutine_threadsafe(self._client.gather(futures, asynchronous=True), loop.asyncio_loop)
        while True:
            try:
                return list(found.result(timeout=1.0))
            except TimeoutError:
                self._check_alive()
            except CancelledError as error:
                raise _dropped(self._client) from error

    def _next(self) -> Any:
        """The next news. Raises ClusterError where there will be none."""
        while True:
            try:
                return self._news.get(timeout=1.0)
            except queue.Empty:
                self._check_alive()

    def _check_alive(self) -> None:
        if self._client.status != "running":
            raise ClusterError(_GONE)
        if self._client.scheduler_info()["workers"]:
            self._alone = None
            return
        self._alone = self._alone or time.monotonic()
        if time.monotonic() - self._alone > _ALONE:
            raise ClusterError("all workers of the cluster are gone; start some, and run the same command again")


def _raise_error(future: Any, client: Client) -> None:
    """Raise what a task raised, as if it had run here. Raises ClusterError where its workers died."""
    if future.status == "finished":
        return
    if future.status != "error":
        raise _dropped(client)
    error = future.exception()
    if isinstance(error, KilledWorker):
        raise ClusterError(
            f"a block's workers died one after the other, the last was {error.last_worker.address}; mostly memory is at "
            f"an end: give workers more of it, or a smaller --memory"
        ) from None
    if isinstance(error, RelexioError | OSError):
        raise error from None
    raise error.with_traceback(future.traceback())
