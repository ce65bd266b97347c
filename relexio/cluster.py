"""The same graphs on a Dask cluster: one that is there, or worker processes of this machine. Imported only when asked for.

Every task writes whole blocks at fixed places, so that Dask may run one again when its worker has died. A task that
raises is not tried again: what it says is true the next time too. Nothing of Dask's own is unpickled from a file.
"""

import hashlib
import logging
import queue
import socket
import sys
import threading
import time
import weakref
from asyncio import run_coroutine_threadsafe
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import dask
from dask.delayed import Delayed
from distributed import Client, Future, KilledWorker, LocalCluster, get_worker
from threadpoolctl import threadpool_limits

from relexio import atomic, backend, plan
from relexio.backend import limited, own_stream
from relexio.errors import ClusterError, DeviceError, RelexioError
from relexio.executor import Executor, Keep, Pass, Progress, batches
from relexio.plan import Plan
from relexio.trajectory.zarrs import limit_threads
from relexio.version import __version__

#: The name of local worker processes in place of a scheduler's address.
PROCESSES = "processes"
_DROPPED = "the Dask cluster dropped this work; see the scheduler's log, and run the same command again"
_TOPIC = "relexio"  # of the events by which workers tell of finished blocks
_PATIENCE = 8.0  # seconds for a scheduler to answer, and for workers to be there
_ALONE = 60.0  # seconds without any worker, in the middle of a pass, after which none is expected any more
_PIECE = 4096  # bytes of a file by which two machines see whether they mean the same one
_QUIET = ("distributed", "tornado", "asyncio")
#: How local worker processes are started: they say nothing, and their threads share one heap.
_FRESH = {
    "distributed.nanny.pre-spawn-environ.DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical",
    "distributed.nanny.pre-spawn-environ.MALLOC_ARENA_MAX": 1,
}


@dataclass(frozen=True)
class Worker:
    """What one worker process says of itself: bytes resident, threads, device (or why there is none), bytes to use of it."""

    held: int
    threads: int
    device: str
    problem: str
    free: int


class Link:
    """A connection to a cluster, made when it is first needed; for ``processes`` the cluster itself."""

    def __init__(self, scheduler: str) -> None:
        self.scheduler = scheduler
        self._client: Client | None = None
        self._local: LocalCluster | None = None
        self._workers: dict[str, dict[str, Worker]] = {}
        self._stack = ExitStack()
        weakref.finalize(self, self._stack.close)  # also at the end of the program, where nobody closes it

    def plan(
        self,
        need: plan.Need,
        memory: int,
        held: int,
        workers: int | None,
        shared: int,
        device_memory: int | None = None,
    ) -> Plan:
        """The plan of all processes together for ``processes``, else that of the largest worker. Raises BudgetError."""
        if self.scheduler == PROCESSES:
            return plan.make_processes(need, memory, held, workers, shared, device_memory)
        found = self._ask("cpu").values()
        threads = max(worker.threads for worker in found)
        held = max(worker.held for worker in found)
        return plan.make(need, memory, held, min(workers or threads, threads), shared, device_memory=device_memory)

    def device(self, wanted: str) -> str:
        """The device where the work is done. Raises DeviceError, naming the worker that has none."""
        if self.scheduler == PROCESSES:
            return backend.resolve(wanted)
        found = self._ask(wanted)
        for name, worker in found.items():
            if worker.problem:
                raise DeviceError(f"worker {name}: {worker.problem}")
        devices = {worker.device for worker in found.values()}
        if len(devices) > 1:
            raise DeviceError("some workers have a GPU and others none; choose with --device cpu or --device cuda")
        return devices.pop()

    def device_limit(self, wanted: int | None) -> int:
        """Bytes of device memory to stay under: of the one that ``processes`` share, else of each worker's."""
        if self.scheduler == PROCESSES:
            return backend.device_limit(wanted)
        free = min(worker.free for worker in self._ask("cuda").values())
        return min(wanted or free, free)

    def executor(self, made: Plan, device: str, device_memory: int) -> Executor:
        """An executor on this cluster."""
        if self.scheduler == PROCESSES:
            device_memory //= made.workers  # they share the one device
        return ClusterExecutor(made, device, device_memory, link=self)

    def client(self, processes: int) -> Client:
        """The connection; for ``processes`` to that many of them. Raises ClusterError."""
        if self._client is None:
            try:
                self._client = self._open(processes)
            except BaseException:
                self.close()
                raise
        elif self._local is not None and len(self._local.workers) != processes:
            with dask.config.set(_FRESH):
                self._local.scale(processes)
                self._client.wait_for_workers(processes, timeout=60)
        return self._client

    def close(self) -> None:
        """Leave the cluster; end local worker processes."""
        self._stack.close()
        self._client = self._local = None
        self._workers = {}

    def _open(self, processes: int) -> Client:
        self._stack.enter_context(_silenced())
        if self.scheduler == PROCESSES:
            # no limit that Dask would keep by writing to disk or killing: the plan has seen to the memory
            with dask.config.set(_FRESH):
                self._local = LocalCluster(
                    n_workers=processes,
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    memory_limit=0,
                )
            self._stack.callback(self._local.close)
        return self._connect()

    def _connect(self) -> Client:
        try:
            client = Client(self._local or self.scheduler, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{self.scheduler}: no Dask scheduler answers there; start one with dask scheduler, or check the address"
            ) from error
        self._stack.callback(client.close)
        try:
            client.wait_for_workers(1, timeout=_PATIENCE)
        except TimeoutError as error:
            raise ClusterError(
                f"{self.scheduler}: the cluster has no workers; start some (dask worker {self.scheduler}) and run again"
            ) from error
        _require_same_versions(client)
        client.run(plan.use_one_heap)
        return client

    def _ask(self, device: str) -> dict[str, Worker]:
        if device not in self._workers:
            self._workers[device] = self.client(0).run(_look, device)
        return self._workers[device]


@contextmanager
def _silenced() -> Iterator[None]:
    """Dask's own talk of lost connections and restarted workers is not for the user: what matters comes as one error."""
    with ExitStack() as stack:
        for name in _QUIET:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        yield


def _require_same_versions(client: Client) -> None:
    """Raise ClusterError, naming the worker, where relexio or Python is another: code and results travel pickled."""
    ours = (f"{sys.version_info[0]}.{sys.version_info[1]}", __version__)
    versions: Any = client.get_versions(packages=["relexio"])
    for address, found in versions["workers"].items():
        python = ".".join(str(found["host"]["python"]).split(".")[:2])
        theirs = (python, found["packages"].get("relexio"))
        if theirs != ours:
            has = f"relexio {theirs[1]}" if theirs[1] else "no relexio"
            raise ClusterError(
                f"worker {address}: has Python {theirs[0]} and {has}, here are Python {ours[0]} and relexio {ours[1]}; "
                f"they must be the same"
            )


def _look(device: str, dask_worker: Any) -> Worker:
    """Runs in a worker, which Dask hands over under that name: what it has."""
    problem, free = "", 0
    try:
        device = backend.resolve(device)
        free = backend.device_limit(None) if device == "cuda" else 0
    except DeviceError as error:
        problem = str(error)
    return Worker(plan.resident_bytes(), dask_worker.state.nthreads, device, problem, free)


def _seen(path: Path) -> tuple[int, str] | None:
    """Size of a file and a hash of how it begins; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return path.stat().st_size, hashlib.sha256(file.read(_PIECE)).hexdigest()
    except OSError:
        return None


def _unlike(expected: dict[Path, tuple[int, str] | None]) -> Path | None:
    """Runs in a worker: the first of some files that it does not see as the client does."""
    return next((path for path, seen in expected.items() if _seen(path) != seen), None)


def _sync_all(directories: list[Path]) -> None:
    """Runs in a worker: what this machine has written below directories is on the disk when it returns."""
    for directory in directories:
        atomic.sync_tree(directory)


@dataclass(frozen=True)
class _Settings:
    """What a worker process keeps to while it works on one pass."""

    token: str
    threads: int
    device: str
    device_memory: int


class _Turns:
    """One pass in one worker process: its settings, in force until it ends, and as many blocks at once as planned."""

    def __init__(self, settings: _Settings) -> None:
        self.running, self.ended = 0, False
        self._lock, self._turn = threading.Lock(), threading.Semaphore(settings.threads)
        self._stack = ExitStack()
        plan.use_one_heap()  # again: a worker that died may have been replaced
        limit_threads(settings.threads)
        self._stack.enter_context(threadpool_limits(1))
        self._stack.enter_context(limited(settings.device, settings.device_memory))

    @contextmanager
    def take(self) -> Iterator[bool]:
        """Wait for a turn; False if the pass has ended meanwhile."""
        with self._turn:
            with self._lock:
                go = not self.ended
                self.running += int(go)
            try:
                yield go
            finally:
                with self._lock:
                    self.running -= int(go)

    def end(self) -> int:
        """Start nothing any more; how many blocks are still being worked on, and once there is none, undo the settings."""
        with self._lock:
            self.ended = True
            if not self.running:
                self._stack.close()
            return self.running


_passes: dict[str, _Turns | None] = {}  # None for those that have ended: a task that comes late does nothing
_passes_lock = threading.Lock()


def _work(settings: _Settings, key: str, function: Callable[..., Any], *parts: Any) -> Any:
    """Runs in a worker: one block, within the settings; then tell of it."""
    with _passes_lock:
        if settings.token not in _passes:
            _passes[settings.token] = _Turns(settings)
        turns = _passes[settings.token]
    if turns is None:
        return None
    try:
        own_stream(settings.device)
        with turns.take() as go:
            result = function(*parts) if go else None
    except (RelexioError, OSError) as error:
        error.__cause__ = error.__context__ = None  # of Zarr's and the codecs' errors some cannot be pickled
        raise
    get_worker().log_event(_TOPIC, key)
    return result


def _end(token: str) -> int:
    """Runs in a worker: end a pass there; how many blocks are still being worked on."""
    with _passes_lock:
        turns = _passes.setdefault(token, None)
        left = turns.end() if turns is not None else 0
        if not left:
            _passes[token] = None
        return left


@dataclass(frozen=True)
class _ClusterPass(Pass):
    settings: Callable[[str], _Settings] = field(kw_only=True)

    def block(self, function: Callable[..., Any], *parts: Any, key: str, size: int) -> Delayed:
        """One node that works on a block of ``size`` bytes, and says so when it is done."""
        work = partial(_work, self.settings(self.token), f"{key}-{self.token}", function)
        return super().block(work, *parts, key=key, size=size)


@dataclass(frozen=True)
class ClusterExecutor(Executor):
    """Where a graph runs: worker processes of a Dask cluster, each inside the plan."""

    link: Link = field(kw_only=True)

    @property
    def _client(self) -> Client:
        return self.link.client(self.plan.workers)

    def begin(self) -> Pass:
        """A new pass, whose tasks ``run`` takes."""
        threads = 1 if self.link.scheduler == PROCESSES else self.plan.workers
        return _ClusterPass(
            settings=partial(_Settings, threads=threads, device=self.device, device_memory=self.device_memory)
        )

    def run(self, made: Pass, tasks: Iterable[Delayed], progress: Progress, keep: Keep | None = None) -> list[Any]:
        """As the executor of threads does it. Raises ClusterError where the cluster is lost."""
        client = self._client
        results: list[Any] = []
        with _watched(client, made.token) as news:
            for batch in batches(made, tasks):
                results += _Batch(client, batch, made.sizes, news).run(progress, keep, len(results))
                made.sizes.clear()
        return results

    def require(self, paths: Iterable[Path]) -> None:
        """Raise ClusterError unless every worker sees these files as this process does."""
        expected = {path.absolute(): _seen(path) for path in paths}
        deadline = time.monotonic() + _PATIENCE
        while True:  # a file system shared over a network may take a moment to show a new file
            found = {name: path for name, path in self._client.run(_unlike, expected).items() if path is not None}
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
            self._client.run(_sync_all, [directory.absolute() for directory in directories])


@contextmanager
def _watched(client: Client, token: str) -> "Iterator[queue.SimpleQueue[Any]]":
    """What the cluster tells of a pass: keys of finished blocks, and finished futures. Nothing of it runs on when it ends."""
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.subscribe_topic(_TOPIC, lambda event: news.put(event[1]))
    try:
        yield news
    finally:
        with suppress(OSError, ValueError, RuntimeError):  # the cluster may be the very thing that is gone
            client.unsubscribe_topic(_TOPIC)
            while client.status == "running" and sum(client.run(_end, token, on_error="ignore").values()):
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
                    _raise_error(told)
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
                raise ClusterError(_DROPPED) from error

    def _next(self) -> Any:
        """The next news. Raises ClusterError where there will be none."""
        while True:
            try:
                return self._news.get(timeout=1.0)
            except queue.Empty:
                self._check_alive()

    def _check_alive(self) -> None:
        if self._client.status != "running":
            raise ClusterError("the Dask scheduler is gone; start it and its workers, and run the same command again")
        if self._client.scheduler_info()["workers"]:
            self._alone = None
            return
        self._alone = self._alone or time.monotonic()
        if time.monotonic() - self._alone > _ALONE:
            raise ClusterError("all workers of the cluster are gone; start some, and run the same command again")


def _raise_error(future: Any) -> None:
    """Raise what a task raised, as if it had run here. Raises ClusterError where its workers died."""
    if future.status == "finished":
        return
    if future.status != "error":
        raise ClusterError(_DROPPED)
    error = future.exception()
    if isinstance(error, KilledWorker):
        raise ClusterError(
            f"a block's workers died one after the other, the last was {error.last_worker.address}; mostly memory is at "
            f"an end: give workers more of it, or a smaller --memory"
        ) from None
    if isinstance(error, RelexioError | OSError):
        raise error from None
    raise error.with_traceback(future.traceback())
