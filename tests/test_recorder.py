"""Recording from memory: the store is that of a conversion of the same checkpoints, and what fails reaches the caller."""

import logging
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

import relexio
from relexio import Recorder
from relexio.checkpoints.arrays import Arrays
from relexio.dtypes import KINDS, from_float32, from_float64
from relexio.errors import CheckpointError, ExistsError, RequestError, StorageError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.storage.local import LocalStorage
from relexio.verbs.convert import convert
from relexio.verbs.restore import restore
from tests.support.make import BF16, Run, Tensors, load_checkpoint, make_run, move
from tests.support.steps import CPU, store_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", steps=(1, 2, 4, 7))


def as_torch(tensors: Tensors, dtype: str) -> dict[str, Any]:
    """Tensors of torch with the same bits, or widened to another type, which is exact."""
    torch = pytest.importorskip("torch")
    bits = {name: torch.from_numpy(np.ascontiguousarray(a).view(np.uint16).copy()) for name, a in tensors.items()}
    return {name: bits[name].view(torch.bfloat16).to(getattr(torch, dtype)) for name in tensors}


@pytest.mark.hf
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_a_recorded_run_is_the_converted_one(tmp_path: Path, run: Run, dtype: str) -> None:
    converted = store_run(run, tmp_path / "files.zarr")
    with Recorder(tmp_path / "run.zarr", run.base_path) as recorder:
        for step, tensors in run.steps.items():
            given = as_torch(tensors, dtype)
            recorder.add(step, given)
            for tensor in given.values():
                tensor.zero_()  # as the optimizer does: what was added is a copy
    recorded = open_store(tmp_path / "run.zarr")
    assert recorded.contents == converted.contents and recorded.base_content == converted.base_content
    assert recorder.steps == (1, 2, 4, 7)
    relexio.open(tmp_path / "run.zarr").fit(method="relex").predict(20).save(tmp_path / "predicted")
    restore(recorded, 2, tmp_path / "restored", CPU, silent)
    for out in ("predicted", "restored"):  # can be loaded, with what lies beside the base
        assert (tmp_path / out / "config.json").read_bytes() == (run.base_path / "config.json").read_bytes()
    for name, tensor in load_checkpoint(tmp_path / "restored").items():
        assert tensor.tobytes() == run.steps[2][name].tobytes()


def test_numpy_arrays_and_a_base_in_memory(tmp_path: Path, run: Run) -> None:
    converted = store_run(run, tmp_path / "files.zarr")
    recorder = Recorder(tmp_path / "run.zarr", run.base)
    for step, tensors in run.steps.items():
        recorder.add(
            step, {name: array.astype(np.float32 if step % 2 else np.float64) for name, array in tensors.items()}
        )
        recorder.flush()
        assert open_store(tmp_path / "run.zarr").steps[-1] == step  # durable, and there for others
    recorder.close()
    assert open_store(tmp_path / "run.zarr").contents == converted.contents


@pytest.mark.hf
def test_rounding_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.integers(0, 1 << 32, 200_000, np.uint32).view("f4"), np.array([0, -0.0, np.inf, 3.4e38], "f4")]
    )
    ties = (rng.integers(0, 1 << 16, 1000).astype(np.uint32) << 16 | 0x8000).view("f4")
    values = np.concatenate([values, ties])
    bits = {name: from_float32(values, KINDS[name]) for name in ("bf16", "f16", "f32")}
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        by_torch = torch.from_numpy(values).to(dtype)
        finite = ~np.isnan(values)
        assert (by_torch.view(torch.uint16).numpy() == bits[name])[finite].all()
        assert torch.from_numpy(bits[name]).view(dtype).isnan().numpy()[~finite].all()
        with np.errstate(invalid="ignore"):
            assert (from_float64(values.astype("f8"), KINDS[name]) == bits[name])[finite].all()
    assert (bits["f32"].view("f4").tobytes()) == values.tobytes()


@pytest.mark.hf
@pytest.mark.parametrize("dtype", ["int64", "bool", "uint8", "float16", "float32", "float64", "complex64"])
def test_types_of_numpy_and_torch_have_one_name(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    array = np.arange(6).reshape(2, 3).T.astype(dtype)  # not in one piece
    one, other = (Arrays(1, {"a": given}) for given in (array, torch.from_numpy(array.copy())))
    assert one.tensors == other.tensors
    found = bytearray(array.nbytes)
    other.read("a", 0, memoryview(found))
    assert found == array.tobytes() and one.nbytes == array.nbytes


def test_what_cannot_be_added_is_told_at_once(tmp_path: Path, run: Run) -> None:
    with pytest.raises(RequestError, match="a new trajectory needs a base"):
        Recorder(tmp_path / "run.zarr")
    (tmp_path / "other").mkdir()
    with pytest.raises(ExistsError, match="not a trajectory"):
        Recorder(tmp_path / "other", run.base_path)
    with Recorder(tmp_path / "run.zarr", run.base_path) as recorder:
        with pytest.raises(CheckpointError, match=r"step 1 .*lacks tensors of base .*: model.norm.weight"):
            recorder.add(1, {n: t for n, t in run.steps[1].items() if n != "model.norm.weight"})
        with pytest.raises(CheckpointError, match=r"step 1 \(arrays\): tensor model.norm.weight: a list is no tensor"):
            recorder.add(1, {**run.steps[1], "model.norm.weight": [1.0]})
        with pytest.raises(CheckpointError, match="shape"):
            recorder.add(1, {**run.steps[1], "model.norm.weight": np.zeros(3, BF16)})
        recorder.add(1, run.steps[1])
    with pytest.raises(RequestError, match="is closed"):
        recorder.add(2, run.steps[2])
    assert open_store(tmp_path / "run.zarr").steps == (1,)


@pytest.mark.hf
def test_a_tied_head_may_be_given_in_another_type(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", steps=(1, 2), shapes={"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,)}
    )
    converted = store_run(run, tmp_path / "files.zarr")
    with Recorder(tmp_path / "run.zarr", run.base_path) as recorder:
        for step, tensors in run.steps.items():
            given = as_torch(tensors, "float32")
            recorder.add(step, {**given, "lm_head.weight": given["model.embed_tokens.weight"]})  # as state_dict does
    assert open_store(tmp_path / "run.zarr").contents == converted.contents


def test_a_model_is_checked_by_names_and_shapes(tmp_path: Path, run: Run) -> None:
    with Recorder(tmp_path / "run.zarr", run.base_path) as recorder:
        shapes = {name: shape for name, (_, shape) in recorder.tensors.items()}
        assert shapes == {name: array.shape for name, array in run.base.items()}
        recorder.check(shapes)
        with pytest.raises(CheckpointError, match=r"the model: lacks tensors of base .*model.norm.weight"):
            recorder.check({name: shape for name, shape in shapes.items() if name != "model.norm.weight"})
        with pytest.raises(CheckpointError, match=r"the model: tensor model.norm.weight: shape \[3\]"):
            recorder.check({**shapes, "model.norm.weight": (3,)})
    assert not (tmp_path / "run.zarr").exists()


def test_what_fails_in_the_thread_reaches_the_caller(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path / "run.zarr", run.base_path)
    recorder.add(1, run.steps[1])
    recorder.flush()
    put = LocalStorage.put

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(LocalStorage, "put", full)
    recorder.add(2, run.steps[2])
    with pytest.raises(StorageError, match="free space on its disk"):
        recorder.flush()
    monkeypatch.setattr(LocalStorage, "put", put)
    recorder.add(4, run.steps[4])
    recorder.close()
    assert open_store(tmp_path / "run.zarr").steps == (1, 4)


def test_a_run_that_is_resumed(tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with Recorder(tmp_path / "run.zarr", run.base_path) as recorder:
        for step, tensors in run.steps.items():
            recorder.add(step, tensors)
    again = move(run.base, [4, 5], seed=3)
    with Recorder(tmp_path / "run.zarr") as recorder:
        assert recorder.steps == (1, 2, 4, 7)
        recorder.add(2, run.steps[2])  # the same bits
        recorder.add(4, again[4])
        with pytest.raises(CheckpointError, match=r"step 4 .*other bits than .* resumed=STEP"):
            recorder.flush()
    with caplog.at_level(logging.WARNING, "relexio"), Recorder(tmp_path / "run.zarr", resumed=2) as recorder:
        recorder.add(2, run.steps[2])
        recorder.add(4, again[4])
        recorder.add(5, again[5])
    assert "step 4 replaces steps 4, 7" in caplog.text
    assert open_store(tmp_path / "run.zarr").steps == (1, 2, 4, 5)
    relexio.open(tmp_path / "run.zarr").checkpoint(4).save(tmp_path / "back")
    found = load_checkpoint(tmp_path / "back")
    assert all(found[name].tobytes() == again[4][name].tobytes() for name in found)


def test_at_most_one_step_waits(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = Event(), Event()

    def slow(*given: Any) -> Any:
        begun.set()
        go.wait(60)
        return convert(*given)

    monkeypatch.setattr("relexio.recorder.convert", slow)
    recorder = Recorder(tmp_path / "run.zarr", run.base_path)
    recorder.add(1, run.steps[1])
    assert begun.wait(60)
    recorder.add(2, run.steps[2])
    third = Thread(target=recorder.add, args=(4, run.steps[4]))
    third.start()
    third.join(0.2)
    assert third.is_alive()  # it waits until the first is stored
    go.set()
    third.join(60)
    recorder.close()
    assert open_store(tmp_path / "run.zarr").steps == (1, 2, 4)


def test_a_step_that_is_the_base_is_left_out(tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with Recorder(tmp_path / "run.zarr", run.base_path) as recorder:
        recorder.add(1, run.base)
        recorder.add(2, run.steps[2])
        recorder.add(3, run.base)  # and when the base is the store's
    assert open_store(tmp_path / "run.zarr").steps == (2,)
    assert caplog.text.count("is the base itself") == 2


@pytest.mark.parametrize("step", [-1, 1.0, "3", None, 10**15])
def test_a_step_is_a_number(tmp_path: Path, run: Run, step: Any) -> None:
    with Recorder(tmp_path / "run.zarr", run.base_path) as recorder:
        with pytest.raises(RequestError, match="a whole number"):
            recorder.add(step, run.steps[1])
        recorder.add(np.int64(4), run.steps[4])  # type: ignore[arg-type]
    assert open_store(tmp_path / "run.zarr").steps == (4,)


def test_another_base_is_refused(tmp_path: Path, run: Run) -> None:
    with Recorder(tmp_path / "run.zarr", run.base) as recorder:
        recorder.add(1, run.steps[1])
    other = Recorder(tmp_path / "run.zarr", run.steps[7])
    other.add(2, run.steps[2])
    with pytest.raises(CheckpointError, match="differs from the base"):
        other.close()


def test_a_process_forked_meanwhile_ends(tmp_path: Path, run: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(run.base_path), str(tmp_path / "run.zarr")], capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


FORKS = """
import multiprocessing, os, sys
from pathlib import Path
from relexio import Recorder
from tests.support.make import load_checkpoint, move
base = load_checkpoint(Path(sys.argv[1]))
with Recorder(sys.argv[2], sys.argv[1]) as recorder:
    for step, tensors in move(base, [1, 2]).items():
        recorder.add(step, tensors)
    child = multiprocessing.get_context("fork").Process(target=print)
    child.start()
    child.join()
    assert child.exitcode == 0
"""

FAILS = """
import sys
from relexio import Recorder
from tests.support.make import move, load_checkpoint
from pathlib import Path
base = load_checkpoint(Path(sys.argv[1]))
recorder = Recorder(sys.argv[2], sys.argv[1])
for step, tensors in move(base, [1, 2, 3]).items():
    recorder.add(step, tensors)
raise SystemExit("training has failed")
"""


def test_a_script_that_fails_loses_no_step(tmp_path: Path, run: Run) -> None:
    command = [sys.executable, "-c", FAILS, str(run.base_path), str(tmp_path / "run.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (1, "training has failed\n")
    assert open_store(tmp_path / "run.zarr").steps == (1, 2, 3)


def test_what_somebody_else_has_stored_meanwhile_is_compared(tmp_path: Path, run: Run) -> None:
    with Recorder(tmp_path / "run.zarr", run.base_path) as recorder:
        recorder.add(1, run.steps[1])
        recorder.flush()
        store_run(run, tmp_path / "run.zarr", "2")
        recorder.add(2, run.steps[2])
        recorder.flush()
        recorder.add(2, run.steps[4])
        with pytest.raises(CheckpointError, match=r"step 2 .*other bits"):
            recorder.flush()
