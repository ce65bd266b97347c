"""The connection to a cluster, and what its workers have."""

import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import dask
from distributed import Client, LocalCluster

from relexio import backend, plan
from relexio.cluster.run import PROCESSES, ClusterExecutor, reached
from relexio.cluster.worker import Worker, look
from relexio.errors import ClusterError, DeviceError
from relexio.executor import Executor
from relexio.plan import Plan
from relexio.version import __version__

_PATIENCE = 8.0  # seconds for a scheduler to answer, and for workers to be there
_QUIET = ("distributed", "tornado", "asyncio")
#: How local worker processes are started: they say nothing, and their threads share one heap.
_FRESH = {
    "distributed.nanny.pre-spawn-environ.DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical",
    "distributed.nanny.pre-spawn-environ.MALLOC_ARENA_MAX": 1,
}


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
            self._stack.callback(_close, self._local)
        return self._connect()

    def _connect(self) -> Client:
        try:
            client = Client(self._local or self.scheduler, timeout=_PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{self.scheduler}: no Dask scheduler answers there; start one with dask scheduler, or check the address"
            ) from error
        self._stack.callback(_close, client)
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
            client = self.client(0)
            with reached(client):
                self._workers[device] = client.run(look, device)
        return self._workers[device]


def _close(made: Client | LocalCluster) -> None:
    """Leave or end it. That Dask has not seen its end in time, on a busy machine, is no error: the work is done."""
    with suppress(TimeoutError):
        made.close()


@contextmanager
def _silenced() -> Iterator[None]:
    """Dask's own talk of lost connections and restarted workers is not for the user: what matters comes as one error."""
    known = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in _QUIET]
    with ExitStack() as stack:
        for name in {*_QUIET, *known}:  # distributed gives some of its loggers a level of their own
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
