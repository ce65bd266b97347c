"""The connection to a cluster, and what its workers have."""

import logging
import sys
import weakref
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import dask
from distributed import Client, LocalCluster

from relexio.engine import device as backend
from relexio.engine.cluster.run import PATIENCE, ClusterExecutor, reached
from relexio.engine.cluster.worker import Worker, look
from relexio.engine.executor import Executor
from relexio.engine.plan import Need, Plan, make, make_processes
from relexio.engine.process import use_one_heap
from relexio.errors import ClusterError, DeviceError
from relexio.version import __version__

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
        self._own = scheduler == "processes"
        self._client: Client | None = None
        self._cluster: LocalCluster | None = None
        self._workers: dict[str, dict[str, Worker]] = {}
        self._stack = ExitStack()
        weakref.finalize(self, self._stack.close)  # also at the end of the program, where nobody closes it

    def plan(
        self, need: Need, memory: int, held: int, workers: int | None, shared: int, device_memory: int | None = None
    ) -> Plan:
        """The plan of all processes together for ``processes``, else that of the largest worker. Raises BudgetError."""
        if self._own:
            return make_processes(need, memory, held, workers, shared, device_memory)
        answers = self._ask("cpu").values()
        threads = max(worker.threads for worker in answers)
        held = max(worker.held for worker in answers)
        return make(need, memory, held, min(workers or threads, threads), shared, device_memory=device_memory)

    def device(self, wanted: str) -> str:
        """The device where the work is done. Raises DeviceError, naming the worker that has none."""
        if self._own:
            return backend.resolve(wanted)
        answers = self._ask(wanted)
        for name, worker in answers.items():
            if worker.problem:
                raise DeviceError(f"worker {name}: {worker.problem}")
        devices = {worker.device for worker in answers.values()}
        if len(devices) > 1:
            raise DeviceError("some workers have a GPU and others have none; choose with --device cpu or --device cuda")
        return devices.pop()

    def device_limit(self, wanted: int | None) -> int:
        """Bytes of device memory to stay under: of the one that ``processes`` share, else of each worker's."""
        if self._own:
            return backend.device_limit(wanted)
        free = min(worker.free for worker in self._ask("cuda").values())
        return min(wanted or free, free)

    def executor(self, plan: Plan, device: str, device_memory: int) -> Executor:
        """An executor on this cluster."""
        if self._own:
            device_memory //= plan.workers  # they share the one device
        connect = partial(self.client, plan.workers)
        return ClusterExecutor(plan, device, device_memory, connect=connect, local=self._own)

    def client(self, processes: int) -> Client:
        """The connection; for ``processes`` to that many of them. Raises ClusterError."""
        if self._client is None:
            try:
                self._client = self._connect(processes)
            except BaseException:
                self.close()
                raise
        elif self._cluster is not None and len(self._cluster.workers) != processes:
            with dask.config.set(_FRESH):
                self._cluster.scale(processes)
                self._client.wait_for_workers(processes, timeout=60)
        return self._client

    def close(self) -> None:
        """Leave the cluster; end local worker processes."""
        self._stack.close()
        self._client = self._cluster = None
        self._workers = {}

    def _connect(self, processes: int) -> Client:
        _silence(self._stack)
        if self._own:
            # no limit that Dask would keep by writing to disk or killing: the plan has seen to the memory
            with dask.config.set(_FRESH):
                self._cluster = LocalCluster(
                    n_workers=processes,
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    memory_limit=0,
                )
            self._stack.callback(_close, self._cluster)
        try:
            client = Client(self._cluster or self.scheduler, timeout=PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{self.scheduler}: no Dask scheduler answers there; start one with dask scheduler, or check the address"
            ) from error
        self._stack.callback(_close, client)
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise ClusterError(
                f"{self.scheduler}: the cluster has no workers; start some (dask worker {self.scheduler}) and run again"
            ) from error
        _require_same_versions(client)
        client.run(use_one_heap)
        return client

    def _ask(self, device: str) -> dict[str, Worker]:
        if device not in self._workers:
            client = self.client(0)
            with reached(client):
                self._workers[device] = client.run(look, device)
        return self._workers[device]


def _close(cluster: Client | LocalCluster) -> None:
    """Leave or end it. That Dask has not seen its end in time, on a busy machine, is no error: the work is done."""
    with suppress(TimeoutError):
        cluster.close()


def _silence(stack: ExitStack) -> None:
    """Dask's own talk of lost connections and restarted workers is not for the user: what matters comes as one error."""
    known = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in _QUIET]
    for name in {*_QUIET, *known}:  # distributed gives some of its loggers a level of their own
        logger = logging.getLogger(name)
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL + 1)


def _require_same_versions(client: Client) -> None:
    """Raise ClusterError, naming the worker, where relexio or Python is another: code and results travel pickled."""
    ours = (f"{sys.version_info[0]}.{sys.version_info[1]}", __version__)
    versions: Any = client.get_versions(packages=["relexio"])
    for address, worker in versions["workers"].items():
        python = ".".join(str(worker["host"]["python"]).split(".")[:2])
        theirs = (python, worker["packages"].get("relexio"))
        if theirs != ours:
            has = f"relexio {theirs[1]}" if theirs[1] else "no relexio"
            raise ClusterError(
                f"worker {address}: has Python {theirs[0]} and {has}, this machine has Python {ours[0]} and relexio "
                f"{ours[1]}; install the same versions"
            )
