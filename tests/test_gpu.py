"""What a GPU has to do as the CPU does it. Each test runs on the stand-in for CuPy (device.py) and, marked ``gpu``, on a GPU."""

import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.dtypes import Kind
from relexio.engine import plan
from relexio.engine.blocks import combine_block, gram_block, operator_block
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, RelexioWarning
from relexio.progress import silent
from relexio.store.store import Store
from relexio.verbs.convert import Request, convert, prepare
from tests.support.device import StandIn, taken, taken_late
from tests.support.make import BF16, load_checkpoint, make_run, oracle, write_dense_run
from tests.support.moves import FLOATS, Case, as_loops_do, make_states
from tests.support.oracle import ALLOWED, DTYPES, agree
from tests.support.steps import CPU, fit_run, predict_run, small_blocks, store_run

MB = 10**6


@dataclass(frozen=True)
class Gpu:
    """CuPy or its stand-in, and how many times as much data it gets."""

    cupy: Any
    scale: int

    @property
    def pool(self) -> Any:
        return self.cupy.get_default_memory_pool()


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    cupy = pytest.importorskip("cupy", reason="needs CuPy and a GPU") if request.param == "real" else StandIn()
    if isinstance(cupy, StandIn):  # that of a rehearsal (tools/bench/gpu.py) has been used already
        cupy = StandIn()
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        return Gpu(cupy, 1)
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs a GPU: {error}")
    cupy.get_default_memory_pool().free_all_blocks()
    return Gpu(cupy, 16)


def dense(root: Path, elements: int, steps: int, dtype: np.dtype = BF16) -> Store:
    """The store of a run in which every element changes at every step."""
    write_dense_run(root, elements, steps, dtype)
    request = Request(root / "run.zarr", root / "base", root / "steps", {}, None)
    return convert(prepare(request, CPU, silent), silent).store


def as_on_the_cpu(store: Store, resources: Resources, out: Path) -> None:
    """Fit and predict with these resources and on the CPU: all elements have the same bits, but for two in a million."""
    checkpoints = []
    for where in (resources, CPU):
        shutil.rmtree(Path(store.address, "cache"), ignore_errors=True)  # where the other left its fit
        path = predict_run(fit_run(store, resources=where), 900, out / where.device, where)
        checkpoints.append(load_checkpoint(path)["w"].view("u2"))
    assert np.count_nonzero(np.not_equal(*checkpoints)) <= ALLOWED * checkpoints[0].size


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_what_kernels_give_are_the_bits_of_the_loops(gpu: Gpu, kind: Kind) -> None:
    with gpu.cupy.cuda.Stream(non_blocking=True):
        for seed in range(6):
            rng = np.random.default_rng(seed)
            columns, n = int(rng.choice([1, 9, 64, 130])), int(rng.integers(1, 150 * gpu.scale))
            density, wild = float(rng.choice([0, 0.001, 0.1, 0.6, 1])), bool(rng.integers(2))
            as_loops_do(gpu.cupy, Case(kind, make_states(kind, columns, n, density, wild, rng), seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("solver", ["gram", "blocks"])
def test_the_result_of_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, dtype: np.dtype, solver: str
) -> None:
    small_blocks(monkeypatch, 512 * gpu.scale)
    run = make_run(tmp_path, dtype, steps=(1, 3, 4, 9), shapes={"w": (80, 50 * gpu.scale), "norm": (7,)})
    resources = Resources(workers=3, device="cuda", device_memory=256 * MB)
    store_run(run, tmp_path / "run.zarr", "1,4")  # two segments, the second of which leaves some elements alone
    fitted = fit_run(store_run(run, tmp_path / "run.zarr"), solver=solver, resources=resources)
    agree(predict_run(fitted, 40, tmp_path / "out", resources), oracle(run.base, run.steps, 40))
    assert gpu.pool.used_bytes() == gpu.pool.total_bytes() == gpu.pool.get_limit() == 0, "given back as it was"
    if isinstance(gpu.cupy, StandIn):
        assert gpu.cupy.pool.peak, "the device was used"
        assert gpu.cupy.pool.limits == [0, *[256 * MB, 0] * (len(gpu.cupy.pool.limits) // 2)]


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_any_number_of_workers_predicts_what_the_cpu_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu, workers: int
) -> None:
    small_blocks(monkeypatch, 2048 * gpu.scale)
    run = make_run(tmp_path, steps=(1, 3, 4, 9), shapes={"w": (400, 100 * gpu.scale)})
    as_on_the_cpu(store_run(run, tmp_path / "run.zarr"), Resources(workers=workers, device="cuda"), tmp_path)


@pytest.mark.parametrize("dtype", [BF16, np.dtype("float32")], ids=lambda d: d.name)
@pytest.mark.parametrize(("steps", "targets"), [(2, 1), (2, 6), (12, 1), (12, 6)])
def test_no_tile_takes_more_of_a_device_than_planned(
    tmp_path: Path, gpu: Gpu, dtype: np.dtype, steps: int, targets: int
) -> None:
    """On dense data, the worst case."""
    store, tile = dense(tmp_path, 3_000_000 // steps, steps, dtype), 4 << 20
    block = store.blocks[0]
    weights = {"w": 1e-3 * np.ones((steps, targets))}
    x, shape = np.ones((steps, 3)), plan.Shape.of(store)
    for need, work in (
        (plan.fit_need(shape, steps, True), lambda: gram_block(store, store.steps, tile, "cuda", block)),
        (
            plan.fit_need(shape, steps, False),
            lambda: operator_block(store, store.steps, {"w": x}, tile, "cuda", block),
        ),
        (
            plan.combine_need(shape, steps, targets),
            lambda: combine_block(store, store.steps, weights, targets, tile, "cuda", block),
        ),
    ):
        gpu.pool.free_all_blocks()
        with gpu.cupy.cuda.Stream(non_blocking=True):
            work()
        assert 0 < gpu.pool.total_bytes() <= need.device_bytes(tile)
    gpu.pool.free_all_blocks()


def test_a_window_many_times_the_device_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    small_blocks(monkeypatch, gpu.scale << 11)
    store = dense(tmp_path, 500_000 * gpu.scale, 12)  # 48 MB as float64, or 768; a warning would be an error
    as_on_the_cpu(store, Resources(workers=2, device="cuda", device_memory=2 * MB * gpu.scale), tmp_path)
    if isinstance(gpu.cupy, StandIn):
        assert 0 < gpu.cupy.pool.peak <= 2 * MB and not gpu.cupy.pool.refused


def test_memory_that_runs_out_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    small_blocks(monkeypatch, gpu.scale << 18)
    store = dense(tmp_path, gpu.scale << 19, 12)  # a tile and its table take 31 MB, or 502
    resources = Resources(8000 * MB, workers=2, device="cuda", device_memory=5000 * MB)
    left = 30 * MB * gpu.scale  # on a GPU, the libraries take some of that too
    with warnings.catch_warnings(record=True) as said, taken_late(gpu.cupy, left):
        warnings.simplefilter("default")
        as_on_the_cpu(store, resources, tmp_path)
    assert [warning.category for warning in said] == [RelexioWarning]
    assert "smaller tiles" in str(said[0].message)


def test_no_memory_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> None:
    store = store_run(make_run(tmp_path), tmp_path / "run.zarr")
    with taken(gpu.cupy, 0), pytest.raises(BudgetError, match="device-memory"):
        fit_run(store, resources=Resources(device="cuda"))
    monkeypatch.setattr("relexio.engine.blocks._WAIT", 0.0)
    resources = Resources(device="cuda", device_memory=256 * MB)
    with warnings.catch_warnings(), taken_late(gpu.cupy, 0), pytest.raises(BudgetError, match="device-memory"):
        warnings.simplefilter("ignore", RelexioWarning)
        fit_run(store, resources=resources)
