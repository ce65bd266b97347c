"""A step that was written again after it was stored, as by a run that resumed after a crash: ``convert`` says so."""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from relexio.verbs.convert import before
from tests.support.command import Relexio
from tests.support.make import Run, make_run, save_checkpoint
from tests.support.steps import small_blocks, store_run

AGAIN = "been written again since"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path, steps=(1, 2, 3, 5))
    store_run(run, tmp_path / "run.zarr")
    return run


def _at(run: Run, step: int) -> Path:
    return run.steps_path / run.pattern.format(step)


def _write(run: Run, step: int, seed: int = 7, shards: int = 1) -> None:
    tensors = make_run(run.root / f"again-{seed}", steps=(step,), seed=seed).steps[step]
    path = _at(run, step)
    shutil.rmtree(path)
    save_checkpoint(path, tensors, shards)


def _convert(run: Run, relexio: Relexio, *more: object) -> str:
    done = relexio("convert", run.steps_path, "-o", run.root / "run.zarr", *more)
    assert done.code == 0
    return done.err


def _stamp(path: Path) -> None:
    for file in path.rglob("*"):
        os.utime(file, ns=(10**18, 10**18))


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "open_checkpoint", lambda *_: pytest.fail("read though nothing has changed"))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_one_step(run: Run, relexio: Relexio, more: tuple[str, ...]) -> None:
    _write(run, 3)
    told = f"relexio convert {run.steps_path} -o {run.root / 'run.zarr'} --replace 3"
    assert (
        f"note: step 3 has been written again since it was stored: the store has the old one; to have the new one: {told}\n"
        in _convert(run, relexio, *more)
    )
    assert AGAIN in _convert(run, relexio)  # it stays so


def test_several_steps_are_one_note(run: Run, relexio: Relexio) -> None:
    _write(run, 3)
    _write(run, 5)
    said = _convert(run, relexio)
    assert "note: steps 3, 5 have been written again since they were stored: the store has the old ones; " in said
    assert said.splitlines()[0].endswith(" --replace 3:"), "from there on"


def test_the_command_that_is_told_takes_the_new_ones(run: Run, relexio: Relexio) -> None:
    for step in (2, 3):
        _write(run, step)
    (note,) = (line for line in _convert(run, relexio).splitlines() if AGAIN in line)
    command = shlex.split(note.split("new ones: ")[1])
    assert command[-2:] == ["--replace", "2,3"] and relexio(*command[1:]).code == 0
    assert AGAIN not in _convert(run, relexio)
    assert relexio("verify", run.root / "run.zarr", run.steps_path).code == 0


def test_a_step_given_by_name(run: Run, relexio: Relexio) -> None:
    _write(run, 3)
    done = relexio("convert", "--checkpoint", f"3={_at(run, 3)}", "-o", run.root / "run.zarr")
    assert "step 3 has been written again" in done.err
    command = shlex.split(done.err.splitlines()[0].split("new one: ")[1])
    assert relexio(*command[1:]).code == 0 and AGAIN not in _convert(run, relexio)


def test_other_shards(run: Run, relexio: Relexio) -> None:
    _write(run, 3, shards=2)
    assert "step 3 has been written again" in _convert(run, relexio)


@pytest.mark.usefixtures("no_reading")
def test_nothing_is_read_where_nothing_has_changed(run: Run, relexio: Relexio) -> None:
    assert AGAIN not in _convert(run, relexio)


def test_a_copy_with_other_times_is_the_same(run: Run, relexio: Relexio) -> None:
    shutil.copytree(run.steps_path, run.root / "moved")
    shutil.rmtree(run.steps_path)
    (run.root / "moved").rename(run.steps_path)
    _stamp(run.steps_path)
    assert AGAIN not in _convert(run, relexio)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_in_a_copy_a_single_tensor_that_differs_is_seen(run: Run, relexio: Relexio, name: str) -> None:
    tensors = run.steps[3]
    other = tensors[name].copy()
    other.flat[-1] = -other.flat[-1]
    save_checkpoint(_at(run, 3), {**tensors, name: other})
    _stamp(run.steps_path)
    said = _convert(run, relexio)
    assert "note: step 3 has been written again" in said


def test_only_some_blocks_of_a_copy_are_read(run: Run, relexio: Relexio, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 256)
    shutil.rmtree(run.root / "run.zarr")
    store_run(run, run.root / "run.zarr")
    _stamp(run.steps_path)
    read: list[str] = []
    monkeypatch.setattr(before, "_BLOCKS", 2)
    monkeypatch.setattr(before, "_differs", lambda store, checkpoint, block: read.append(block.pieces[-1].tensor.name))
    assert AGAIN not in _convert(run, relexio)
    assert read == ["model.layers.0.q_proj.weight", "model.embed_tokens.weight"] * 4


def test_what_cannot_be_read_says_nothing(run: Run, relexio: Relexio) -> None:
    """Weights that were deleted, or are being written at this moment, are no other weights."""
    (_at(run, 2) / "model.safetensors").unlink()
    (_at(run, 2) / "optimizer.pt").write_bytes(b"")
    weights = _at(run, 3) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    _stamp(_at(run, 3))
    assert AGAIN not in _convert(run, relexio)


def test_a_step_written_again_and_new_ones_are_told_apart(run: Run, relexio: Relexio) -> None:
    _write(run, 5)
    shutil.copytree(_at(run, 3), _at(run, 8))
    said = _convert(run, relexio)
    assert "step 5 has been written again" in said and "step 8" not in said.split("again")[0]
