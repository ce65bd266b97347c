"""The same graphs on a Dask cluster of two worker processes: the same bytes, whoever dies, and errors as clean as ever."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import relexio as package
from relexio.engine import graph
from relexio.engine.plan import Need, make, make_processes
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError, ClusterError, RequestError, StoreError
from relexio.fit.fit import choose_window, fit
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.store.schema import Block
from relexio.verbs.inspect import inspect
from tests.support.command import Relexio, in_process, snapshot, without_progress
from tests.support.make import BF16, Run, make_run, save_checkpoint, write_dense_run
from tests.support.steps import CPU, fit_run, predict_run, small_blocks, store_run

if TYPE_CHECKING:
    import distributed
else:
    distributed = pytest.importorskip("distributed")

OPTIONS: dict[str, Any] = {"processes": True, "dashboard_address": "127.0.0.1:0", "memory_limit": 0, "silence_logs": 60}
SHAPES = {f"model.layers.{i}.w": (70, 60) for i in range(4)} | {"model.norm.weight": (24,)}


@contextmanager
def local_cluster(**options: Any) -> "Iterator[distributed.LocalCluster]":
    """One of worker processes. On a busy machine Dask may not see their end in time, which is no matter."""
    made = distributed.LocalCluster(**options, **OPTIONS)
    try:
        yield made
    finally:
        with suppress(TimeoutError):
            made.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[distributed.LocalCluster]":
    """Two worker processes of two threads, in a working directory that is not ours."""
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    with local_cluster(n_workers=2, threads_per_worker=2) as made:
        os.chdir(here)
        yield made


@pytest.fixture
def client(cluster: "distributed.LocalCluster") -> "Iterator[distributed.Client]":
    """Our own view of that cluster, to see what is left there."""
    with distributed.Client(cluster, set_as_default=False) as made:
        made.wait_for_workers(2, timeout=300)
        yield made


@pytest.fixture
def there(cluster: "distributed.LocalCluster") -> Iterator[Resources]:
    with Resources(device="cpu", scheduler=cluster.scheduler_address) as resources:
        yield resources


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    small_blocks(monkeypatch, 512, 1 << 12)
    return make_run(tmp_path, steps=(1, 2, 3, 5, 8, 9), shapes=SHAPES, shards=2)


def check_same(run: Run, place: Path, resources: Resources, solvers: tuple[str, ...] = ("gram", "blocks")) -> None:
    """Everything once with threads, once with these resources: the same bytes."""
    for name, where in (("here", CPU), ("there", resources)):
        trajectory = store_run(run, place / name / "run.zarr", "1:5", where)
        trajectory = store_run(run, place / name / "run.zarr", resources=where)
        for solver in solvers:
            fitted = fit_run(trajectory, Recipe(rank=2), solver=solver, resources=where)
            predict_run(fitted, 40, place / name / solver, where)
        if "gram" in solvers:
            found = inspect(trajectory, trajectory.steps, 1, where, silent).to_json()
            (place / name / "inspect.json").write_text(json.dumps({**found, "path": ""}))
    here, there = snapshot(place / "here"), snapshot(place / "there")
    assert all(any(f"cache/{solver}" in name for name in here) for solver in solvers)
    assert here == there


def test_the_same_bytes_on_a_cluster(
    run: Run, tmp_path: Path, there: Resources, client: "distributed.Client", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # paths relative to ours mean nothing to the workers
    run.base_path, run.steps_path = Path("base"), Path("steps")
    check_same(run, Path(), there)
    assert left_over(client) == []


def test_the_same_bytes_with_processes(run: Run, tmp_path: Path) -> None:
    with Resources(workers=2, device="cpu", scheduler="processes") as resources:
        check_same(run, tmp_path, resources)


def test_progress_is_told_block_by_block(run: Run, tmp_path: Path, there: Resources) -> None:
    told: dict[str, tuple[int, list[int]]] = {}

    @contextmanager
    def stages(name: str, total: int) -> Iterator[Callable[[int], None]]:
        told[name] = (total, [])
        yield told[name][1].append

    trajectory = store_run(run, tmp_path / "run.zarr", resources=there)
    fit(trajectory, choose_window(trajectory, None), Recipe(), "gram", there, stages)
    total, parts = told["fit: Gram matrices"]
    assert sum(parts) == total
    assert len([part for part in parts if part]) > 20, "not tensor by tensor"


# workers that die


def hang_once(module: str, name: str, marker: Path) -> None:
    """Runs in a worker: its next call of a function does its work, says so, and never returns.

    Of a function that is looked up when it is called: one bound in a kernel could travel to the other worker with it.
    """
    import importlib

    where = importlib.import_module(module)
    real = getattr(where, name)

    def hang(*arguments: Any) -> Any:
        real(*arguments)
        own = marker.with_name(f"{marker.name}-{threading.get_ident()}")
        own.write_text(str(os.getpid()))
        own.replace(marker)  # two threads may be here at once, and nobody must read half of it
        time.sleep(600)

    setattr(where, name, hang)


def kill_when_marked(marker: Path) -> None:
    while not marker.exists():
        time.sleep(0.01)
    os.kill(int(marker.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("module", "function", "solvers"),
    [
        ("relexio.verbs.convert.write", "encode_block", ()),
        ("relexio.engine.blocks", "to_host", ("gram",)),
        pytest.param("relexio.engine.blocks", "to_host", ("blocks",), marks=pytest.mark.slow),
        pytest.param("relexio.engine.graph", "combine_block", ("gram",), marks=pytest.mark.slow),
    ],
)
def test_a_worker_killed_at_work(
    run: Run,
    tmp_path: Path,
    module: str,
    function: str,
    solvers: tuple[str, ...],
) -> None:
    """Its block was written and never reported: it is written again, to the same bytes."""
    with (
        local_cluster(n_workers=2, threads_per_worker=2) as made,  # its own: when a new worker comes is Dask's affair
        distributed.Client(made, set_as_default=False) as client,
        Resources(device="cpu", scheduler=made.scheduler_address) as there,
    ):
        client.wait_for_workers(2, timeout=300)
        victim = next(iter(client.scheduler_info()["workers"]))
        client.run(hang_once, module, function, tmp_path / "marker", workers=[victim])
        killer = threading.Thread(target=kill_when_marked, args=(tmp_path / "marker",), daemon=True)
        killer.start()
        check_same(run, tmp_path, there, solvers)
        killer.join(timeout=300)
        assert not killer.is_alive(), "a worker did die"
        assert victim not in client.scheduler_info()["workers"]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def replace_function(module: str, name: str, new: Any) -> None:
    import importlib

    setattr(importlib.import_module(module), name, new)


def test_a_block_that_kills_its_workers_is_an_error(run: Run, tmp_path: Path) -> None:
    trajectory = store_run(run, tmp_path / "run.zarr")
    with (
        local_cluster(n_workers=1, threads_per_worker=1) as made,
        distributed.Client(made, set_as_default=False) as client,
        Resources(device="cpu", scheduler=made.scheduler_address) as there,
    ):
        assert made.scheduler is not None
        made.scheduler.allowed_failures = 0
        client.run(replace_function, "relexio.engine.blocks", "to_host", die)
        with pytest.raises(ClusterError, match=r"every worker that took one block died, .* memory"):
            fit_run(trajectory, resources=there)
    assert [path.name for path in (tmp_path / "run.zarr" / "cache").iterdir()] == ["zarr.json"]


# the end of a scheduler

#: A command that ends the scheduler itself, and goes on when the client has noticed: in a pass, between two, or at rest.
ENDING = """import os, signal, sys, time
from relexio.engine.cluster import link, run
when, scheduler = sys.argv[1], int(sys.argv[2])
places = {"pass": (run, "as_completed"), "between": (run.ClusterExecutor, "settle"), "rest": (link.Link, "close")}
clients, connect, real = [], link.Client, getattr(*places[when])
def client(*arguments, **options):
    clients.append(connect(*arguments, **options))
    return clients[-1]
def end(*arguments, **options):
    if clients and clients[0].status == "running":
        os.kill(scheduler, signal.SIGKILL)
        while clients[0].status == "running":
            time.sleep(0.01)
    return real(*arguments, **options)
link.Client = client
setattr(*places[when], end)
sys.argv[1:3] = []
from relexio.cli.main import main
main()"""


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """A scheduler and a worker as programs of their own: the scheduler's process id, and its address."""
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    options = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", file]
    first = subprocess.Popen([*dask, "scheduler", *map(str, options)], **quiet)
    worker = subprocess.Popen(
        [*dask, "worker", "--scheduler-file", str(file), "--no-nanny", "--nthreads", "1"], **quiet
    )
    try:
        while not file.exists() or not file.read_text().endswith("}"):
            assert first.poll() is None, "the scheduler did not start"
            time.sleep(0.01)
        address = json.loads(file.read_text())["address"]
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=300)
        yield first.pid, address
    finally:
        for process in (worker, first):
            process.kill()
            process.wait()


@pytest.mark.parametrize("when", ["pass", pytest.param("between", marks=pytest.mark.slow), "rest"])
def test_the_end_of_a_scheduler_is_one_line(run: Run, tmp_path: Path, scheduler: tuple[int, str], when: str) -> None:
    """And none where nothing was to be done any more. Nothing that distributed says of it is for the user."""
    store, out = tmp_path / "run.zarr", tmp_path / "out"
    store_run(run, store)
    pid, address = scheduler
    command = [
        "predict",
        store,
        "--method",
        "relex",
        "--step",
        40,
        "-o",
        out,
        "--scheduler",
        address,
        "--device",
        "cpu",
    ]
    ending = [sys.executable, "-c", ENDING, when, str(pid), *map(str, command)]
    done = subprocess.run(ending, capture_output=True, text=True)
    said = [line for line in without_progress(done.stderr).splitlines() if not line.startswith("note: ")]
    if when == "rest":
        assert (done.returncode, said) == (0, []) and out.exists()
    else:
        assert (done.returncode, len(said)) == (1, 1), done.stderr
        assert "the Dask scheduler is gone; start it" in said[0] and not out.exists()


# errors


def spoil(run: Run) -> None:
    """Put a NaN into the third step."""
    bad = {name: array.copy() for name, array in run.steps[3].items()}
    bad["model.layers.2.w"][5, 5] = np.nan
    save_checkpoint(run.steps_path / "global_step_3", bad, run.shards)


def left_over(client: "distributed.Client") -> list[str]:
    """Keys that the scheduler still knows, and passes that a worker has not ended."""
    from relexio.engine.cluster import worker

    def open_passes() -> list[str]:
        return list(worker._passes)

    deadline = time.monotonic() + 600
    while True:
        keys = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))
        found = [*keys, *(token for passes in client.run(open_passes).values() for token in passes)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def test_an_error_in_a_task_is_the_same_error(
    run: Run, tmp_path: Path, there: Resources, client: "distributed.Client"
) -> None:
    spoil(run)
    said = []
    for resources in (CPU, there):
        with pytest.raises(CheckpointError, match=r"step 3 .*model\.layers\.2\.w: NaN") as error:
            store_run(run, tmp_path / "run.zarr", resources=resources)
        said.append(str(error.value))
        assert not list(tmp_path.glob("run.zarr*")), "nothing is left behind"
    assert said[0] == said[1]
    assert left_over(client) == []


class UnpicklableError(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("as some of Zarr's")


def find_damage(block: Block) -> list[np.ndarray]:
    raise StoreError("a chunk is damaged") from UnpicklableError()


def test_an_error_arrives_whatever_caused_it(run: Run, tmp_path: Path, there: Resources) -> None:
    trajectory = store_run(run, tmp_path / "run.zarr")
    with pytest.raises(StoreError, match=r"^a chunk is damaged$"):
        graph.sums(trajectory, 1, find_damage, there.for_gram(trajectory, 1), lambda count: None, trajectory.tensors)


@pytest.mark.parametrize("where", [pytest.param("processes", marks=pytest.mark.slow), "tcp"])
def test_the_command_line(
    run: Run, tmp_path: Path, cluster: "distributed.LocalCluster", client: "distributed.Client", where: str
) -> None:
    scheduler = ["--scheduler", cluster.scheduler_address if where == "tcp" else where, "--workers", 2]
    for name, options in (("here", []), ("there", scheduler)):
        out = tmp_path / name
        for command in (
            ["convert", run.steps_path, "--base", run.base_path, "-o", out / "run.zarr"],
            ["predict", out / "run.zarr", "--method", "relex", "--step", 40, "-o", out / "predicted"],
        ):
            done = in_process(*command, *options)
            expected = ("note: step 40 is beyond", "convert: ", "predict: ", "fit: ")  # progress, where it takes long
            notes = [line for line in done.err.splitlines() if not line.startswith(expected)]
            assert (done.code, notes) == (0, [])
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")
    spoil(run)
    bad = in_process("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "bad.zarr", *scheduler)
    assert bad.code == 1
    assert bad.err.startswith("error: step 3") and bad.err.count("\n") == 1
    assert left_over(client) == []


def slow_down(seconds: float) -> None:
    """Runs in a worker: from now on every block of ``convert`` takes so long at least; 0 for as fast as it goes."""
    import relexio.verbs.convert.write
    from relexio.verbs.convert.encode import encode_block

    write: Any = relexio.verbs.convert.write

    def slowly(*arguments: Any) -> Any:
        time.sleep(seconds)
        return encode_block(*arguments)

    write.encode_block = slowly if seconds else encode_block


def test_ctrl_c_leaves_the_cluster_clean(
    run: Run, tmp_path: Path, cluster: "distributed.LocalCluster", client: "distributed.Client"
) -> None:
    client.run(slow_down, 1.0)
    command = ["convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr"]
    process = subprocess.Popen(
        [sys.executable, "-m", "relexio", *map(str, command), "--scheduler", cluster.scheduler_address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        partial = tmp_path / "run.zarr.relexio-partial"
        while not list(partial.glob("base/*/digest/c/*/0")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert (process.returncode, without_progress(err).strip().count("\n")) == (130, 0), err
        assert left_over(client) == []
    finally:
        client.run(slow_down, 0)


def test_a_scheduler_that_is_not_there(
    tmp_path: Path, run: Run, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relexio.engine.cluster.run import PATIENCE

    assert PATIENCE < 10
    monkeypatch.setattr("relexio.engine.cluster.link.PATIENCE", 1.0)
    where = ("--scheduler", "tcp://127.0.0.1:1")
    failed = relexio("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr", *where)
    assert failed.code == 1 and failed.err.count("\n") == 1
    assert "tcp://127.0.0.1:1" in failed.err and "dask scheduler" in failed.err


def test_a_cluster_without_workers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relexio.engine.cluster.link.PATIENCE", 0.5)
    with (
        local_cluster(n_workers=0) as made,
        Resources(scheduler=made.scheduler_address) as there,
        pytest.raises(ClusterError, match=r"tcp://.* no workers"),
    ):
        store_run(run, tmp_path / "run.zarr", resources=there)


def test_workers_of_another_version_are_refused(
    run: Run, tmp_path: Path, there: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relexio.engine.cluster.link.__version__", "0.0.1")
    with pytest.raises(ClusterError, match=r"worker tcp://.* relexio 0\.1.* relexio 0\.0\.1"):
        store_run(run, tmp_path / "run.zarr", resources=there)


def test_workers_that_do_not_see_the_files_are_refused(
    run: Run, tmp_path: Path, there: Resources, client: "distributed.Client", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relexio.engine.cluster.run.PATIENCE", 0.1)
    trajectory = store_run(run, tmp_path / "run.zarr")
    blind = next(iter(client.scheduler_info()["workers"]))
    client.run(blindfold, True, workers=[blind])
    try:
        with pytest.raises(ClusterError, match=rf"worker {blind}: .*zarr\.json .*share"):
            fit_run(trajectory, resources=there)
    finally:
        client.run(blindfold, False, workers=[blind])


def blindfold(on: bool) -> None:
    """Runs in a worker: from now on it sees no file, or those that there are."""
    import relexio.engine.cluster.worker

    worker: Any = relexio.engine.cluster.worker
    if on:
        worker.fingerprint, worker._real_fingerprint = lambda path: None, worker.fingerprint
    else:
        worker.fingerprint = worker._real_fingerprint


def test_without_dask_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    for name in [name for name in sys.modules if name.startswith("relexio.engine.cluster")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(package, "cluster", raising=False)
    with pytest.raises(ClusterError, match=r"pip install 'relexio\[distributed\]'"):
        Resources(scheduler="processes")


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(RequestError, match="tcp://HOST:PORT"):
        Resources(scheduler="localhost")


def test_python_api(run: Run, tmp_path: Path, cluster: "distributed.LocalCluster") -> None:
    store_run(run, tmp_path / "run.zarr")
    trajectory = package.open(tmp_path / "run.zarr")
    trajectory.fit(method="relex", scheduler=cluster.scheduler_address).predict(40).save(tmp_path / "there")
    trajectory.fit(method="relex").predict(40).save(tmp_path / "here")
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")


# memory


def test_processes_are_planned_with_a_base_of_their_own() -> None:
    need = Need(10_000_000, 4.0)
    threads, processes = make(need, 10**9, 50_000_000, 4), make_processes(need, 10**9, 50_000_000, 4, shared=1_000_000)
    assert (threads.workers, processes.workers) == (4, 4)
    assert processes.projected - threads.projected > 4 * 73_000_000
    assert make_processes(need, 500_000_000, 50_000_000, 4).workers < 4


def peaks(*arguments: object) -> dict[int, int]:
    """Bytes resident at most in each process of a command, the interpreter's tracker of resources too, by process id."""
    process = subprocess.Popen([sys.executable, "-m", "relexio", *map(str, arguments)], stdout=subprocess.DEVNULL)
    found: dict[int, int] = {}
    while process.poll() is None:
        for pid in (process.pid, *children(process.pid)):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                found[pid] = int(status.split("VmHWM:")[1].split()[0]) * 1024
            except (OSError, IndexError):
                continue
        time.sleep(0.01)
    assert process.returncode == 0
    return found


def children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_all_processes_together_stay_under_the_budget(tmp_path: Path) -> None:
    write_dense_run(tmp_path, 9_000_000, 40, BF16)
    options = ("--memory", "700MB", "--workers", 2, "--scheduler", "processes")
    run = tmp_path / "run.zarr"
    for command in (
        ("convert", tmp_path / "steps", "--base", tmp_path / "base", "-o", run),
        ("predict", run, "--method", "relex", "--step", 5000, "-o", tmp_path / "out"),
        ("predict", run, "--method", "relex", "--step", 5000, "--solver", "blocks", "-o", tmp_path / "again"),
    ):
        found = peaks(*command, *options)
        print(command[0], sorted(size // 10**6 for size in found.values()))
        assert len(found) >= 4, "the command, two workers, and the tracker of resources"
        assert sum(found.values()) <= 700_000_000, found
