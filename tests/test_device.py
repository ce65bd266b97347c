"""The device path, with a strict stand-in for CuPy (device.py): plumbing, streams, plans, and what is refused.

What a real device has to do is in test_gpu.py.
"""

import importlib
import json
import operator
import os
import subprocess
import sys
import threading
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.engine import plan
from relexio.engine.device import failures, own_stream
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, DeviceError
from tests.support.command import Relexio
from tests.support.device import DeviceArray, StandIn
from tests.support.make import Run, load_checkpoint, make_run
from tests.support.steps import fit_run, predict_run, store_run

MB = 10**6
ROOT = Path(__file__).parents[1]


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return use(monkeypatch, StandIn())


def use(monkeypatch: pytest.MonkeyPatch, cupy: StandIn) -> StandIn:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(1, 3, 4, 9), shapes={"w": (80, 50), "norm": (7,)})


def test_every_worker_has_a_stream_of_its_own(run: Run, tmp_path: Path, cupy: StandIn) -> None:
    fit_run(store_run(run, tmp_path / "run.zarr"), resources=Resources(workers=3, device="cuda"))
    assert cupy.streams and len(set(map(id, cupy.streams))) == len(cupy.streams)
    assert not hasattr(cupy.current, "stream"), "the program's own stream is left alone"


@pytest.mark.filterwarnings("default::relexio.errors.RelexioWarning")
def test_the_command_line_says_it_as_a_note(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relexio: Relexio
) -> None:
    use(monkeypatch, StandIn(room=300_000))  # 28 kB too small for the only block
    store = store_run(run, tmp_path / "run.zarr").address
    done = relexio(
        "predict", store, "--method", "relex", "--step", 40, "-o", tmp_path / "out", "--device", "cuda", "--workers", 4
    )
    notes = [line for line in done.err.splitlines() if "out of memory" in line]
    assert done.code == 0 and len(notes) == 1 and notes[0].startswith("note: the device ")


def test_other_warnings_are_shown_as_python_does(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relexio: Relexio
) -> None:
    store = store_run(run, tmp_path / "run.zarr").address
    monkeypatch.setattr("relexio.engine.executor.limited", lambda *_: warnings.warn("of another kind", stacklevel=1))
    with pytest.raises(UserWarning, match="another kind"):  # pytest makes it an error: the filters are left alone
        relexio("predict", store, "--method", "relex", "--step", 40, "-o", tmp_path / "out", "--device", "cpu")


def test_memory_too_small_for_anything_is_an_error(run: Run, tmp_path: Path, cupy: StandIn) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    with pytest.raises(BudgetError, match="--device-memory 100 kB is too small"):
        fit_run(store, resources=Resources(device="cuda", device_memory=100_000))


def test_plans_for_a_device() -> None:
    need = plan.fit_need(plan.Shape(1 << 20, 2, 1, 3 << 20), 40, True)
    roomy = plan.make(need, 64_000 * MB, 200 * MB, 16, plan.CUDA, device_memory=64_000 * MB)
    assert (roomy.workers, roomy.tile_bytes) == (16, 512 << 20)
    small = plan.make(need, 64_000 * MB, 200 * MB, 16, plan.CUDA, device_memory=256 * MB)
    assert small.tile_bytes >= 8 << 20 and small.workers * need.device_bytes(small.tile_bytes) <= 256 * MB
    tiny = plan.make(need, 64_000 * MB, 200 * MB, 16, plan.CUDA, device_memory=30 * MB)
    assert tiny.workers * need.device_bytes(tiny.tile_bytes) <= 30 * MB
    host = plan.make(need, 1000 * MB, 200 * MB, 16, plan.CUDA, device_memory=64_000 * MB)
    assert host.projected <= 1000 * MB, "the host's memory bounds it too"
    assert plan.make(need, 64_000 * MB, 200 * MB, 16).tile_bytes <= 2 << 20, "the CPU's tiles stay in its caches"


def test_auto_takes_the_cpu_where_memory_is_too_small_for_cuda(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cupy: StandIn
) -> None:
    monkeypatch.setattr(plan, "WORTH_CUDA", -1)
    store = store_run(run, tmp_path / "run.zarr")
    little: dict[str, Any] = {"memory": 400 * MB, "held": 60 * MB, "workers": 1}
    assert Resources(device="auto", **little).for_gram(store, 4).device == "cpu"
    assert Resources(device="auto", workers=1).for_gram(store, 4).device == "cuda"
    with pytest.raises(BudgetError):
        Resources(device="cuda", **little).for_gram(store, 4)


def test_auto_takes_the_cpu_where_a_gpu_saves_little_and_does_not_even_look_for_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cupy: StandIn
) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    states = [run.base, *(run.steps[step] for step in sorted(run.steps))]
    moves = sum(int(np.count_nonzero(a[name] != b[name])) for a, b in pairwise(states) for name in a)
    assert store.moves() == moves
    seconds = plan.saved(moves, 80 * 50 + 7, 2)
    monkeypatch.setattr(plan, "WORTH_CUDA", 0.99 * seconds)
    assert Resources(device="auto", workers=2).for_gram(store, 4).device == "cuda"
    assert Resources(device="auto", workers=2).for_combine(store, 4, 1).device == "cpu"
    monkeypatch.setattr(plan, "WORTH_CUDA", 1.01 * seconds)
    monkeypatch.setattr("relexio.engine.device.resolve", lambda _: pytest.fail("CuPy would be imported"))
    assert Resources(device="auto", workers=2).for_gram(store, 4).device == "cpu"


def test_a_gpu_is_worth_it_for_long_windows_in_which_all_moves() -> None:
    """160 M elements, each of which RLVR moves 0.6 times in 40 steps, or which move at every one of 40 or 200."""
    assert plan.saved(98_000_000, 160_000_000, 8) < 0.01
    assert plan.saved(40 * 160_000_000, 160_000_000, 8) == pytest.approx(2.56)
    assert plan.saved(200 * 160_000_000, 160_000_000, 8) > 60


def test_threads_are_no_more_than_help_unless_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relexio.engine.resources.cores", lambda: 64)
    store = store_run(run, tmp_path / "run.zarr")
    assert Resources(device="cpu").for_gram(store, 4).plan.workers == plan.MOST_THREADS
    assert Resources(device="cpu", workers=20).for_gram(store, 4).plan.workers == 20


def test_what_only_the_cpu_does_imports_no_cupy(run: Run, tmp_path: Path) -> None:
    """Zarr would import it."""
    store = store_run(run, tmp_path / "run.zarr").address
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "cupy.py").write_text("import os\nos._exit(9)\n")
    words = ["predict", store, "--method", "relex", "--step", "40", "-o", str(tmp_path / "out"), "--device", "cpu"]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "there"), str(ROOT)])}
    command = [sys.executable, "-m", "relexio", *words]
    assert subprocess.run(command, env=variables, capture_output=True).returncode == 0
    script = "import relexio.store.zarrs as z, sys; z._zarr(); assert 'cupy' not in sys.modules; import cupy"
    assert subprocess.run([sys.executable, "-c", script], env=variables).returncode == 9, "it can be imported later"


def test_no_more_than_the_device_has_free(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, StandIn(free=100 * MB))
    executor = Resources(device="cuda", device_memory=256 * MB).for_gram(store_run(run, tmp_path / "run.zarr"), 4)
    assert executor.device_memory == 80 * MB


def test_cuda_without_cupy_is_refused_and_auto_takes_the_cpu(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    store = store_run(run, tmp_path / "run.zarr")
    with pytest.raises(DeviceError, match="CuPy"):
        fit_run(store, resources=Resources(device="cuda"))
    out = predict_run(fit_run(store, resources=Resources(device="auto")), 40, tmp_path / "out")
    assert load_checkpoint(out).keys() == run.base.keys()


def test_the_stand_in_is_strict(cupy: StandIn) -> None:
    own_stream("cuda")
    host: Any = np.ones((2, 2))
    there = cupy.asarray(host)
    for mix in (operator.add, operator.xor, operator.matmul, operator.iadd, np.add, np.matmul):
        for pair in ((host, there), (there, host), (there, 1.0)):
            with pytest.raises(TypeError):
                mix(*pair)
    for convert_ in (np.asarray, np.cumsum, list, np.sort):
        with pytest.raises(TypeError):
            convert_(there)
    kernel = cupy.RawModule("void f(double *x, long long n) { x[n] = 3; }", ("-fmad=false",)).get_function("f")
    kernel((1,), (1,), (there, np.int64(3)))
    assert there.get().tolist() == [[1, 1], [1, 3]]
    for wrong in ((host, np.int64(0)), (there, 0), (there, np.int32(0)), (there.T, np.int64(0))):
        with pytest.raises((TypeError, AssertionError)):
            kernel((1,), (1,), wrong)
    assert not np.isin(cupy.empty((2, 2), np.uint8).get(), (0, 1)).any(), "what is not written has no value"
    failed = []

    def elsewhere() -> None:
        own_stream("cuda")
        try:
            there.get()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failed, "another thread's stream does not wait for this one's"


def test_the_stand_in_has_nothing_that_cupy_lacks() -> None:
    cupy = pytest.importorskip("cupy", reason="needs CuPy, no GPU")
    names = (
        "zeros",
        "empty",
        "asarray",
        "cumsum",
        "RawModule",
        "get_default_memory_pool",
        "get_default_pinned_memory_pool",
    )
    missing = [name for name in names if not hasattr(cupy, name)]
    missing += [
        name
        for name in vars(DeviceArray)
        if not name.startswith("_") and name != "held" and not hasattr(cupy.ndarray, name)
    ]
    missing += [name for name in ("use", "synchronize") if not hasattr(cupy.cuda.Stream, name)]
    assert not missing
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError) and len(failures()) == 4


def bench(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """tools/bench/gpu.py, where CuPy cannot be imported unless the script brings a stand-in."""
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "cupy.py").write_text("raise ImportError('no CuPy')\n")
    command = [sys.executable, str(ROOT / "tools" / "bench" / "gpu.py"), str(tmp_path / "out"), *options]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path / "none")}
    return subprocess.run(command, capture_output=True, text=True, env=variables)


def test_the_gpu_benchmark_says_in_a_line_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = bench(tmp_path)
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "out").exists()
    assert done.stderr == "tools/bench/gpu.py needs CuPy and a GPU that works: ImportError: no CuPy\n"


def test_a_device_is_busy_once_while_two_things_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "bench"))
    device_times = importlib.import_module("gpu_profile").device_times
    copy = "Memcpy HtoD (Pinned -> Device)"
    events = [  # microseconds: a kernel and one that begins in it, a copy and a kernel in it, and what the host did
        *({"cat": "kernel", "name": name, "ts": at, "dur": took} for name, at, took in (("f", 5, 10), ("g", 21, 2), ("f", 0, 10))),
        {"cat": "gpu_memcpy", "name": copy, "ts": 20, "dur": 5},
        {"cat": "cuda_runtime", "name": "launch", "ts": 0, "dur": 100}, {"ph": "M", "name": "process"},
    ]  # fmt: skip
    (_, all_), *kernels = device_times(events)
    assert all_ == pytest.approx({"busy, s": 20e-6, "kernels, s": 22e-6, f"{copy}, s": 5e-6, "kernel calls": 3})
    assert [name for name, _ in kernels] == ["kernel f", "kernel g"] and kernels[0][1]["calls"] == 2


@pytest.mark.slow
def test_the_gpu_benchmark_can_be_rehearsed(tmp_path: Path) -> None:
    done = bench(tmp_path, "--rehearse")
    assert done.returncode == 0, (tmp_path / "out" / "gpu.log").read_text()
    heading, _, *rows = (tmp_path / "out" / "gpu.md").read_text().splitlines()
    assert "no figure is about" in heading and all(row.startswith("| (rehearsal) ") for row in rows[2:])
    stages = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"].values()
    assert all(stage["code"] == 0 and stage["rows"] for stage in stages)
