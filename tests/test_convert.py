"""The store is lossless, grows by appending, and an interrupted conversion goes on where it was."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from relexio.checkpoints.record import CheckpointRecord
from relexio.errors import BusyError, RequestError
from relexio.progress import silent
from relexio.store.blocks import Written
from relexio.store.opening import open_store
from relexio.store.schema import Block
from relexio.verbs.convert.encode import Job
from relexio.verbs.restore import restore
from tests.support.command import Relexio, in_process, snapshot
from tests.support.make import BF16, FP8, Run, base_tensors, load_checkpoint, make_run, move, save_checkpoint
from tests.support.steps import CPU, fit_run, predict_run, small_blocks, store_run


def same_files(one: Path, other: Path) -> None:
    assert snapshot(one) == snapshot(other)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [BF16, np.dtype("float16"), np.dtype("float32")], ids=lambda d: d.name)
@pytest.mark.parametrize("block", [64, 4096])
def test_every_step_comes_back_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: np.dtype, shards: int, block: int
) -> None:
    small_blocks(monkeypatch, block, 512)
    run = make_run(tmp_path, dtype, shards=shards)
    store = store_run(run, tmp_path / "run.zarr")
    for step in run.steps:
        restore(store, step, tmp_path / f"back-{step}", CPU, silent)
        same_files(tmp_path / f"back-{step}", run.steps_path / f"global_step_{step}")
    restore(store, None, tmp_path / "base-again", CPU, silent)
    same_files(tmp_path / "base-again", run.base_path)


def mixed() -> tuple[dict[str, np.ndarray], dict[int, dict[str, np.ndarray]]]:
    base = {
        "a": base_tensors(BF16)["model.norm.weight"],
        "b": base_tensors(np.dtype("float32"))["model.layers.0.q_proj.weight"],
        "c": base_tensors(np.dtype("float16"))["model.norm.weight"],
        "scalar": np.array(0.5, np.float32),
        "empty": np.zeros((0, 7), BF16),
        "counter": np.array([3], np.int64),
        "flags": np.array([True, False, True]),
        "quantised": np.arange(16).astype(FP8),
    }
    steps = move(base, [2, 4, 6])
    for step, tensors in steps.items():
        tensors["counter"] = np.array([step], np.int64)
    return base, steps


def test_mixed_dtypes_and_shapes(tmp_path: Path) -> None:
    base, steps = mixed()
    run = Run(tmp_path, base, steps)
    store = store_run(run, tmp_path / "run.zarr")
    restore(store, 4, tmp_path / "back", CPU, silent)
    same_files(tmp_path / "back", run.steps_path / "global_step_4")
    fitted = fit_run(store)
    assert any("counter" in note and "step 6" in note for note in fitted.notes)
    found = load_checkpoint(predict_run(fitted, 50, tmp_path / "out"))
    assert {name: (a.dtype, a.shape) for name, a in found.items()} == {n: (a.dtype, a.shape) for n, a in base.items()}
    assert found["counter"] == 6, "an integer is carried over from the last observed step"
    assert (found["quantised"] == base["quantised"]).all()
    assert found["scalar"] != base["scalar"]


def test_a_changed_fp8_tensor_is_stored_but_refused_by_name(tmp_path: Path) -> None:
    base, steps = mixed()
    steps[6]["quantised"] = np.arange(16)[::-1].astype(FP8)
    run = Run(tmp_path, base, steps)
    store = store_run(run, tmp_path / "run.zarr")
    restore(store, 6, tmp_path / "back", CPU, silent)
    same_files(tmp_path / "back", run.steps_path / "global_step_6")
    with pytest.raises(RequestError, match=r"quantised \(F8_E4M3\)"):
        fit_run(store)
    fit_run(store, window="2,4")  # it had not changed by then


def test_appending_rewrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 256)
    run = make_run(tmp_path, steps=(1, 2, 3, 5, 8))
    out = tmp_path / "run.zarr"
    store_run(run, out, "2,8")
    before = snapshot(out)
    store = store_run(run, out)
    after = snapshot(out)
    assert store.steps == (1, 2, 3, 5, 8)
    assert [segment.steps for segment in store.segments] == [(2, 8), (1, 3, 5)]
    assert all(after[name] == content for name, content in before.items() if name != "zarr.json")
    assert store_run(run, out).segments == store.segments
    assert snapshot(out) == after, "with nothing new, nothing is written"


def test_appending_checks_the_base_by_content(tmp_path: Path, relexio: Relexio) -> None:
    run = make_run(tmp_path, steps=(1, 2, 3))
    relexio("convert", run.steps_path, "--base", run.base_path, "--steps", "1", "-o", tmp_path / "run.zarr")
    copy = save_checkpoint(tmp_path / "copy", run.base)
    assert relexio("convert", run.steps_path, "--base", copy, "--steps", "2", "-o", tmp_path / "run.zarr").code == 0
    other = save_checkpoint(tmp_path / "other", base_tensors(BF16, seed=9))
    done = relexio("convert", run.steps_path, "--base", other, "-o", tmp_path / "run.zarr")
    assert done.code == 1 and "differs from the base" in done.err


def test_an_interrupted_conversion_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 128)
    run = make_run(tmp_path)
    store_run(run, tmp_path / "whole.zarr")
    import relexio.verbs.convert.write as module
    from relexio.verbs.convert.encode import encode_block

    calls: list[bool] = []

    def stumble(job: Job, block: Block) -> tuple[Written, Written | None]:
        calls.append(job.resumed)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return encode_block(job, block)

    monkeypatch.setattr(module, "encode_block", stumble)
    with pytest.raises(KeyboardInterrupt):
        store_run(run, tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()
    staged = tmp_path / "run.zarr.relexio-partial"
    written = {p: p.stat().st_mtime_ns for p in staged.rglob("c/*") if "files" not in p.parts}
    assert written
    monkeypatch.undo()
    small_blocks(monkeypatch, 128)
    store_run(run, tmp_path / "run.zarr")
    assert not staged.exists()
    moved = {tmp_path / "run.zarr" / p.relative_to(staged): at for p, at in written.items()}
    assert all(p.stat().st_mtime_ns == at for p, at in moved.items()), "what was whole is kept"
    same_files(tmp_path / "run.zarr", tmp_path / "whole.zarr")


def test_an_interrupted_conversion_goes_on_though_training_has_written_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import relexio.verbs.convert.write as module

    run = make_run(tmp_path, steps=(1, 2, 3))
    monkeypatch.setattr(module, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store_run(run, tmp_path / "run.zarr")
    monkeypatch.undo()
    save_checkpoint(run.steps_path / "global_step_4", move(run.base, [4])[4])
    store = store_run(run, tmp_path / "run.zarr")
    assert [segment.steps for segment in store.segments] == [(1, 2, 3), (4,)]
    restore(store, 4, tmp_path / "back", CPU, silent)
    same_files(tmp_path / "back", run.steps_path / "global_step_4")


def test_what_an_interrupted_run_left_damaged_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 128)
    run = make_run(tmp_path)
    store_run(run, tmp_path / "whole.zarr")
    import relexio.verbs.convert.write as module

    monkeypatch.setattr(module, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store_run(run, tmp_path / "run.zarr")
    victim = next((tmp_path / "run.zarr.relexio-partial").rglob("by/c/*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    monkeypatch.undo()
    small_blocks(monkeypatch, 128)
    store_run(run, tmp_path / "run.zarr")
    same_files(tmp_path / "run.zarr", tmp_path / "whole.zarr")


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import relexio.verbs.convert.write as module
    from relexio.errors import CheckpointError
    from relexio.verbs.convert.encode import encode_block

    run = make_run(tmp_path)
    shard = run.steps_path / "global_step_3" / "model.safetensors"

    def meddle(job: Job, block: Block) -> tuple[Written, Written | None]:
        os.utime(shard, ns=(1, 1))
        return encode_block(job, block)

    monkeypatch.setattr(module, "encode_block", meddle)
    with pytest.raises(CheckpointError, match=r"global_step_3.*changed while it was read"):
        store_run(run, tmp_path / "run.zarr")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "steps"]


@pytest.mark.parametrize("written_twice", [False, True])
def test_tied_heads(tmp_path: Path, written_twice: bool) -> None:
    """A head written beside the embedding, or left out by the steps: both are one model, and come back as they were."""
    base = base_tensors(BF16)
    steps = move(base, [1, 2, 3])
    tied = {
        step: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]} for step, tensors in steps.items()
    }
    both = {**base, "lm_head.weight": base["model.embed_tokens.weight"]}
    run = Run(tmp_path, base, tied) if written_twice else Run(tmp_path, both, steps)
    store = store_run(run, tmp_path / "run.zarr")
    restore(store, 2, tmp_path / "back", CPU, silent)
    same_files(tmp_path / "back", run.steps_path / "global_step_2")
    found = load_checkpoint(predict_run(fit_run(store), 20, tmp_path / "out"))
    assert list(found) == list(run.base)
    if not written_twice:
        assert (found["lm_head.weight"] == found["model.embed_tokens.weight"]).all()


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path: Path, relexio: Relexio) -> None:
    base = base_tensors(BF16)
    steps = move(base, [1, 2])
    for tensors in steps.values():
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * BF16.type(2)
    run = Run(tmp_path, base, steps)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr")
    assert done.code == 1 and "lm_head.weight differs" in done.err
    assert not list(tmp_path.glob("run.zarr*"))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    from relexio.atomic import locked

    run = make_run(tmp_path)
    store_run(run, tmp_path / "run.zarr", "1,2")
    with locked(tmp_path / "run.zarr"), pytest.raises(BusyError, match="is writing it"):
        store_run(run, tmp_path / "run.zarr")


def test_kept_fits_of_fewer_steps_go_when_new_ones_are_made(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=(1, 2, 3, 5))
    fit_run(store_run(run, tmp_path / "run.zarr", "1:3"))
    (tmp_path / "run.zarr" / "cache" / "gram-0001-killed.relexio-partial").mkdir()
    fit_run(store_run(run, tmp_path / "run.zarr"))
    assert [p.name for p in (tmp_path / "run.zarr" / "cache").glob("gram-*")] == ["gram-0004"]


@pytest.mark.parametrize("solver", ["gram", "blocks"])
def test_a_kept_fit_of_other_data_is_not_used(tmp_path: Path, relexio: Relexio, solver: str) -> None:
    """A sibling, or a backup, copied over a store brings steps that the kept fit does not know."""
    steps, store = (1, 2, 3, 5), tmp_path / "run.zarr"
    runs = [make_run(tmp_path / str(seed), steps=steps, seed=seed) for seed in (0, 1)]
    predict = ("--method", "relex", "--step", 9, "--solver", solver, "-o")
    for run in runs:
        store_run(run, run.steps_path.parent / "run.zarr")
    ours, theirs = (run.steps_path.parent / "run.zarr" for run in runs)
    assert relexio("predict", theirs, *predict, tmp_path / "right").code == 0
    (kept,) = (theirs / "cache").glob(f"{solver}-*")
    shutil.rmtree(theirs / "cache")
    assert relexio("predict", ours, *predict, tmp_path / "other").code == 0
    shutil.copytree(ours, store)
    shutil.copytree(theirs, store, dirs_exist_ok=True)
    verified = relexio("verify", store, runs[1].steps_path)
    assert verified.code == 0 and f"kept fits of other data, not read: cache/{kept.name};" in verified.err
    assert relexio("predict", store, *predict, tmp_path / "made").code == 0
    assert snapshot(tmp_path / "made") == snapshot(tmp_path / "right") != snapshot(tmp_path / "other")
    assert "kept fits" not in relexio("verify", store).err


def test_the_store_stands_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    store_run(run, tmp_path / "run.zarr")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run.zarr").rename(tmp_path / "elsewhere" / "moved.zarr")
    run.base_path.rename(tmp_path / "gone")
    out = predict_run(fit_run(open_store(tmp_path / "elsewhere" / "moved.zarr")), 40, tmp_path / "out")
    assert (out / "tokenizer.json").read_text() == (tmp_path / "gone" / "tokenizer.json").read_text()


def test_a_read_only_store_can_be_used(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    store_run(run, tmp_path / "run.zarr")
    before = snapshot(tmp_path / "run.zarr")
    (tmp_path / "run.zarr" / "cache").write_text("in the way of a directory")
    done = in_process("predict", tmp_path / "run.zarr", "--method", "relex", "--step", 40, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    (tmp_path / "run.zarr" / "cache").unlink()
    assert snapshot(tmp_path / "run.zarr") == before


@pytest.mark.parametrize("seconds", [-2_000_000_000, -1, 2**63 // 10**9 + 1, 12_000_000_000])
def test_a_time_before_1970_or_after_2262(tmp_path: Path, relexio: Relexio, seconds: int) -> None:
    """Data like any other: such times come from archives, wrong clocks, and tools that set them to hide when."""
    run, store = make_run(tmp_path, steps=(1, 2, 3)), tmp_path / "run.zarr"
    files = list(tmp_path.rglob("*.safetensors"))
    for path in files:
        os.utime(path, ns=(seconds * 10**9 + 7, seconds * 10**9 + 7))
    found = {path.stat().st_mtime_ns for path in files}
    if found != {seconds * 10**9 + 7}:
        pytest.skip(f"this file system keeps no such time: {found}")
    command = ["convert", run.steps_path, "--base", run.base_path, "-o", store]
    assert relexio(*command, "--steps", "1:2").code == 0
    assert relexio(*command).code == 0, "an append compares the base by its time"
    assert relexio("verify", store, run.steps_path, "--base", run.base_path).code == 0
    assert relexio("predict", store, "--method", "relex", "--step", 9, "-o", tmp_path / "out").code == 0
    assert relexio("restore", store, "--step", 3, "-o", tmp_path / "step").code == 0
    assert snapshot(tmp_path / "step") == snapshot(run.steps_path / "global_step_3")
    record = open_store(store).base()
    assert record.shards[0].mtime_ns == seconds * 10**9 + 7


@pytest.mark.parametrize("time", [2**94, -(2**94), 10**4000, 1.5, True, "1", None])
def test_a_time_that_no_file_has(time: object) -> None:
    shard = {"name": "model.safetensors", "size": 1, "mtime_ns": time, "header": f"files/{'0' * 32}"}
    with pytest.raises(ValueError, match="times are numbers"):
        CheckpointRecord.from_json({"step": 1, "source": "a", "shards": [shard], "index": None, "side": {}})
