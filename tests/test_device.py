"""The device path, with NumPy standing in for CuPy: plumbing, memory limit, and what happens when memory runs out.

The kernels on a real device are tested where there is one (marker ``gpu``).
"""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from make import Run, load_checkpoint, make_run, oracle
from steps import fit_run, predict_run, store_run
from test_oracle import agree

from relexio.errors import BudgetError, DeviceError
from relexio.resources import Resources


class OutOfMemoryError(MemoryError):
    pass


class StandIn(types.ModuleType):
    """As much of CuPy as the package uses; ``largest`` is the widest float64 array that fits."""

    def __init__(self, largest: int = 1 << 60) -> None:
        super().__init__("cupy")
        self.limits: list[int] = []
        self.refused = 0
        self.largest = largest
        memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
        runtime = types.SimpleNamespace(
            getDeviceCount=lambda: 1, memGetInfo=lambda: (10**9, 10**9), CUDARuntimeError=RuntimeError
        )
        self.cuda = types.SimpleNamespace(memory=memory, runtime=runtime)

    def get_default_memory_pool(self) -> object:
        return types.SimpleNamespace(
            get_limit=lambda: 0, set_limit=lambda size: self.limits.append(size), free_all_blocks=lambda: None
        )

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        if shape[0] > self.largest:
            self.refused += 1
            raise OutOfMemoryError
        return np.zeros(shape)

    asarray = staticmethod(np.asarray)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(1, 3, 4, 9), shapes={"w": (80, 50), "norm": (7,)})


@pytest.mark.parametrize("solver", ["gram", "blocks"])
def test_the_same_result_as_on_the_cpu(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    cupy = StandIn(largest=600)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    resources = Resources(device="cuda", device_memory=256_000_000)
    fitted = fit_run(store_run(run, tmp_path / "run.zarr"), solver=solver, resources=resources)
    agree(predict_run(fitted, 40, tmp_path / "out", resources), oracle(run.base, run.steps, 40))
    assert cupy.refused, "too wide a tile was tried, and a narrower one taken"
    assert 256_000_000 in cupy.limits and cupy.limits[-1] == 0, "the pool is limited, and given back as it was"


def test_memory_too_small_for_anything_is_an_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", StandIn(largest=3))
    with pytest.raises(BudgetError, match="device-memory"):
        fit_run(store_run(run, tmp_path / "run.zarr"), resources=Resources(device="cuda"))


def test_cuda_without_cupy_is_refused_and_auto_takes_the_cpu(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    store = store_run(run, tmp_path / "run.zarr")
    with pytest.raises(DeviceError, match="CuPy"):
        fit_run(store, resources=Resources(device="cuda"))
    out = predict_run(fit_run(store, resources=Resources(device="auto")), 40, tmp_path / "out")
    assert load_checkpoint(out).keys() == run.base.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["gram", "blocks"])
def test_on_a_real_device(run: Run, tmp_path: Path, solver: str) -> None:
    pytest.importorskip("cupy", reason="needs CuPy and a GPU")
    resources = Resources(device="cuda", device_memory=256_000_000)
    fitted = fit_run(store_run(run, tmp_path / "run.zarr"), solver=solver, resources=resources)
    agree(predict_run(fitted, 40, tmp_path / "out", resources), oracle(run.base, run.steps, 40))
