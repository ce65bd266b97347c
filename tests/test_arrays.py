"""A source that is no safetensors file goes the same way: arrays in memory through every verb."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from relexio.api import open
from relexio.checkpoints.layout import Source, open_checkpoint
from relexio.checkpoints.record import CheckpointRecord
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError
from relexio.progress import silent
from relexio.store.store import Store
from relexio.sweep.candidates import Request as SweepRequest
from relexio.sweep.plan import prepare as prepare_sweep
from relexio.sweep.run import sweep
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.convert.before import refuse_base_among
from relexio.verbs.inspect import sizes
from relexio.verbs.restore import restore
from relexio.verbs.verify import find_originals, verify
from tests.support.arrays import Arrays, arrays_of
from tests.support.command import Relexio, snapshot
from tests.support.make import BF16, FP8, Run, Tensors, base_tensors, load_checkpoint, make_run, move
from tests.support.steps import CPU, fit_run, predict_run, small_blocks, store_run

SIDE = {"config.json": b'{"architectures": []}\n', "code/model.py": b"pass\n"}


def store_arrays(out: Path, base: Source | None, steps: Mapping[int, Source], resources: Resources = CPU) -> Store:
    return convert(prepare(Request(out, base, named=steps), resources, silent), silent).store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on disk, in whose words the same arrays are checked."""
    small_blocks(monkeypatch, 256, 128)
    made = make_run(tmp_path / "made", steps=(1, 2, 4, 7))
    more = {"counter": np.array([3]), "empty": np.zeros((0, 7), BF16), "fp8": np.arange(16).astype(FP8)}
    base = {**made.base, **more}
    return Run(tmp_path / "run", base, {step: {**tensors, **more} for step, tensors in made.steps.items()})


@pytest.fixture
def stored(tmp_path: Path, run: Run) -> Store:
    """The run's arrays, converted and added to."""
    base, steps = arrays_of(run, SIDE)
    store_arrays(tmp_path / "run.zarr", base, {step: steps[step] for step in (1, 2)})
    return store_arrays(tmp_path / "run.zarr", base, steps)


def same(found: Tensors, tensors: Tensors) -> None:
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name


def test_the_store_holds_what_one_from_files_holds(tmp_path: Path, run: Run, stored: Store) -> None:
    files = store_run(run, tmp_path / "files.zarr", "1:2")
    files = store_run(run, tmp_path / "files.zarr")
    assert [segment.steps for segment in stored.segments] == [(1, 2), (4, 7)]
    assert stored.contents == files.contents
    assert (stored.base_content, stored.tensors) == (files.base_content, files.tensors)
    record = json.loads((tmp_path / "run.zarr/segments/0001/zarr.json").read_text())["attributes"]["sources"][0]
    assert list(record) == ["step", "source", "shards", "index", "side"]
    assert (record["source"], record["shards"], record["index"]) == ("arrays in memory", [], None)
    assert record["side"].keys() == SIDE.keys()


def test_it_comes_back_as_one_safetensors_file(tmp_path: Path, run: Run, stored: Store, relexio: Relexio) -> None:
    for step, tensors in ((4, run.steps[4]), ("base", run.base)):
        done = relexio("restore", tmp_path / "run.zarr", "--step", step, "-o", tmp_path / f"back-{step}")
        assert done.code == 0, done.err
        assert ", as safetensors\n" in done.out
        files = snapshot(tmp_path / f"back-{step}")
        assert {name: data for name, data in files.items() if name != "model.safetensors"} == SIDE
        same(load_checkpoint(tmp_path / f"back-{step}"), tensors)
        raw = files["model.safetensors"]
        (length,) = struct.unpack("<Q", raw[:8])
        assert length % 8 == 0 and json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}
        assert len(raw) == stored.record(None).nbytes(stored.table)
    assert sizes(stored).checkpoints == 4 * len(raw)


def test_the_python_api_reads_and_writes_them(tmp_path: Path, run: Run, stored: Store) -> None:
    trajectory = open(tmp_path / "run.zarr")
    name = "model.norm.weight"
    assert (trajectory.checkpoint(7)[name].compute() == run.steps[7][name].astype(np.float32)).all()
    trajectory.checkpoint(7).save(tmp_path / "saved")
    same(load_checkpoint(tmp_path / "saved"), run.steps[7])
    trajectory.fit(method="relex").predict(20).save(tmp_path / "predicted")
    assert list(load_checkpoint(tmp_path / "predicted")) == list(run.base)


def test_a_prediction_is_that_of_the_same_files(tmp_path: Path, run: Run, stored: Store) -> None:
    files = store_run(run, tmp_path / "files.zarr")
    one, other = (
        load_checkpoint(predict_run(fit_run(store), 20, tmp_path / name))
        for name, store in (("from-arrays", stored), ("from-files", files))
    )
    same(one, other)
    assert (tmp_path / "from-arrays/code/model.py").read_bytes() == SIDE["code/model.py"]


def test_verify_compares_every_bit_and_side_file(tmp_path: Path, run: Run, stored: Store) -> None:
    base, steps = arrays_of(run, SIDE)
    whole = verify(stored, find_originals(stored, None, base, steps), CPU, silent)
    assert not whole.problems and whole.compared == (1, 2, 4, 7) and whole.base_compared
    other = {**run.steps[4], "model.norm.weight": run.steps[4]["model.norm.weight"][::-1].copy()}
    steps[4] = Arrays(4, other, SIDE)
    steps[7] = Arrays(7, run.steps[7], {**SIDE, "config.json": b"{}", "new": b""})
    problems = verify(stored, find_originals(stored, None, None, steps), CPU, silent).problems
    assert [text.split(" holds")[0].split("differs")[0].strip() for text in problems] == [
        "step 4 (arrays): tensor model.norm.weight:",
        "step 7 (arrays): config.json:",
        f"step 7 (arrays): new: is not among what {stored.shown}",
    ]


def test_what_was_restored_is_the_original_of_what_is_stored(tmp_path: Path, stored: Store) -> None:
    """Files and arrays are compared by what both have: tensors and side files."""
    restore(stored, 4, tmp_path / "back", CPU, silent)
    assert not verify(stored, find_originals(stored, None, None, {4: tmp_path / "back"}), CPU, silent).problems
    (tmp_path / "back/config.json").unlink()
    (problem,) = verify(stored, find_originals(stored, None, None, {4: tmp_path / "back"}), CPU, silent).problems
    assert "config.json: differs from what" in problem


def test_arrays_and_directories_go_together(tmp_path: Path, run: Run) -> None:
    _, steps = arrays_of(run, SIDE)
    store = store_arrays(tmp_path / "run.zarr", run.base_path, {1: steps[1], 2: run.steps_path / "global_step_2"})
    store = store_arrays(tmp_path / "run.zarr", arrays_of(run)[0], {4: steps[4]})
    restore(store, 2, tmp_path / "files", CPU, silent)
    assert snapshot(tmp_path / "files") == snapshot(run.steps_path / "global_step_2")
    restore(store, 4, tmp_path / "arrays", CPU, silent)
    same(load_checkpoint(tmp_path / "arrays"), run.steps[4])
    assert [store.record(step).from_safetensors for step in (None, 1, 2, 4)] == [True, False, True, False]


@pytest.mark.parametrize("written_twice", [False, True])
def test_tied_heads(tmp_path: Path, written_twice: bool) -> None:
    base = base_tensors(BF16)
    steps = move(base, [1, 2, 3])
    with_head = [{**t, "lm_head.weight": t["model.embed_tokens.weight"]} for t in (base, *steps.values())]
    if written_twice:
        first, rest = base, dict(zip(steps, with_head[1:], strict=True))
    else:
        first, rest = with_head[0], steps
    arrays = {step: Arrays(step, tensors) for step, tensors in rest.items()}
    store = store_arrays(tmp_path / "run.zarr", Arrays(None, first), arrays)
    restore(store, 2, tmp_path / "back", CPU, silent)
    found = load_checkpoint(tmp_path / "back")
    same(found, {name: found[name] if name == "lm_head.weight" else rest[2][name] for name in first})
    if written_twice:
        bad = {**with_head[2], "lm_head.weight": with_head[1]["lm_head.weight"]}
        with pytest.raises(CheckpointError, match=r"step 9 \(arrays\): its lm_head\.weight differs"):
            store_arrays(tmp_path / "run.zarr", None, {9: Arrays(9, bad)})


def test_a_step_is_told_from_the_base_by_the_beginnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor that training leaves as it is is not read to its end for that; a late difference is still seen."""
    monkeypatch.setattr("relexio.verbs.convert.before._COMPARED", 64)
    base = {"large": np.zeros(5000, "f4"), "small": np.zeros(100, "f4")}
    reads: list[tuple[str, int]] = []

    class Counted(Arrays):
        def read(self, name: str, first_byte: int, out: memoryview) -> None:
            reads.append((name, first_byte))
            super().read(name, first_byte, out)

    step = {**base, "small": np.eye(1, 100, 3, dtype="f4")[0]}
    refuse_base_among([Counted(1, step)], Arrays(None, base))
    assert reads == [("large", 0), ("small", 0)]
    for name, size in (("large", 5000), ("small", 100)):
        refuse_base_among([Arrays(1, {**base, name: np.eye(1, size, size - 1, dtype="f4")[0]})], Arrays(None, base))
    with pytest.raises(CheckpointError, match=r"step 1 \(arrays\): is the base itself \(bit for bit\)"):
        refuse_base_among([Arrays(1, base)], Arrays(None, base))


def test_the_same_questions_are_asked(tmp_path: Path, run: Run, stored: Store) -> None:
    """A wrong base, a step that is the base, one that is no number, one written again, one under another number."""
    out, (base, steps) = tmp_path / "new.zarr", arrays_of(run)
    wrong = Arrays(None, {**run.base, **base_tensors(BF16, seed=99)})
    assert any(
        "times farther from the base" in note for note in prepare(Request(out, wrong, named=steps), CPU, silent).notes
    )
    with pytest.raises(CheckpointError, match=r"step 1 \(arrays\): is the base itself \(bit for bit\)"):
        store_arrays(out, base, {1: Arrays(1, run.base)})
    nan = {**run.steps[1], "model.norm.weight": np.full(24, np.nan).astype(BF16)}
    with pytest.raises(CheckpointError, match=r"step 1 \(arrays\): tensor model\.norm\.weight: NaN"):
        store_arrays(out, base, {1: Arrays(1, nan)})
    with pytest.raises(CheckpointError, match=r"step 2 \(arrays\): was given as step 1"):
        store_arrays(out, base, {1: steps[2]})
    with pytest.raises(CheckpointError, match=r"a side file is named model\.safetensors"):
        store_arrays(out, base, {1: Arrays(1, run.steps[1], {"model.safetensors": b""})})
    with pytest.raises(CheckpointError, match=r"\(arrays\): its __metadata__ does not map strings"):
        reserved = {"__metadata__": run.base["model.norm.weight"]}
        moved = {"__metadata__": run.steps[1]["model.norm.weight"]}
        store_arrays(out, Arrays(None, reserved), {1: Arrays(1, moved)})
    with pytest.raises(CheckpointError, match=r"tensor model\.\S+ differs from the base"):
        store_arrays(tmp_path / "run.zarr", wrong, {9: Arrays(9, run.steps[7])})
    again = prepare(Request(tmp_path / "run.zarr", None, named={**steps, 4: Arrays(4, run.steps[7])}), CPU, silent)
    assert [note[:6] for note in again.notes if "written again since" in note] == ["step 4"]
    assert not out.exists()


@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_conversion_of_other_arrays_is_not_gone_on_with(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """The record of arrays has no sizes and times: what an earlier run left may be of other tensors."""
    out, (base, steps) = tmp_path / "run.zarr", arrays_of(run)
    if not fresh:
        store_arrays(out, base, {1: steps[1]})
    with monkeypatch.context() as patched:
        patched.setattr("relexio.verbs.convert.write._commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store_arrays(out, base, {2: Arrays(2, run.steps[7])})
    store = store_arrays(out, base, {2: steps[2]})
    restore(store, 2, tmp_path / "back", CPU, silent)
    same(load_checkpoint(tmp_path / "back"), run.steps[2])


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_read_opens_what_it_needs_and_closes_it(tmp_path: Path, run: Run) -> None:
    checkpoint = open_checkpoint(run.base_path)
    name, tensor = "model.norm.weight", run.base["model.norm.weight"]
    before = len(list(Path("/proc/self/fd").iterdir()))
    out = bytearray(6)
    checkpoint.read(name, 4, memoryview(out))
    with checkpoint.held(name, 0, tensor.nbytes) as read:
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
        again = bytearray(6)
        read(4, memoryview(again))
    assert out == again == tensor.tobytes()[4:10]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_other_processes_read_them(tmp_path: Path, run: Run, stored: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 256)  # chunks as large as other processes know them
    base, steps = arrays_of(run, SIDE)
    with Resources(workers=1, device="cpu", scheduler="processes") as resources:
        store = store_arrays(tmp_path / "there.zarr", base, steps, resources)
        assert not verify(store, find_originals(store, None, base, steps), resources, silent).problems
    assert store.base_content == stored.base_content


def test_a_sweep_evaluates_observed_arrays(tmp_path: Path, stored: Store) -> None:
    command = "test -f {checkpoint}/model.safetensors && test -f {checkpoint}/config.json && echo {step}"
    request = SweepRequest((1, 2, 4), command, tmp_path / "sweep", (7, 9), methods=("relex",))
    table = sweep(prepare_sweep(stored, request, CPU, silent), silent, lambda *_: None, lambda _: None)
    assert {result.candidate.method for result in table.results} == {"base", "observed", "relex"}
    assert all(result.score is not None for result in table.results)


@pytest.mark.parametrize("name", ["model.safetensors", "../x"])
def test_a_record_without_shards_is_checked(name: str) -> None:
    array = f"files/{'0' * 32}"
    record = {"step": 1, "source": "/x", "shards": [], "index": None, "side": {"x": array}}
    assert CheckpointRecord.from_json(record).to_json() == record
    with pytest.raises(ValueError):
        CheckpointRecord.from_json({**record, "side": {name: array}})
