"""``--delete-verified``: weight files go only when the store has given back every byte of them, and no step is lost by a kill."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relexio.errors import RequestError, StoreError
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.store import Store
from relexio.verbs.convert import delete as module
from relexio.verbs.convert.delete import Keep, delete_verified, parse_keep
from tests.support.command import Relexio, snapshot
from tests.support.make import Run, load_checkpoint, make_run, save_checkpoint, save_file
from tests.support.steps import CPU, small_blocks, store_run
from tests.support.striking import Killed

STEPS = (1, 2, 3, 5, 8)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of two shards a step, with a trainer's state beside the weights."""
    small_blocks(monkeypatch, 256, 128)
    made = make_run(tmp_path / "made", steps=STEPS, shards=2)
    for step in STEPS:
        (directory(made, step) / "optimizer.pt").write_bytes(b"state")
        (directory(made, step) / "notes").mkdir()
        (directory(made, step) / "notes" / "model.safetensors").write_bytes(b"a user's own")
    return made


@pytest.fixture
def store(run: Run, tmp_path: Path) -> Store:
    return store_run(run, tmp_path / "run.zarr")


def directory(run: Run, step: int) -> Path:
    return run.steps_path / f"global_step_{step}"


def weights(run: Run, step: int) -> list[str]:
    return sorted(p.name for p in directory(run, step).glob("model*"))


def delete(run: Run, store: Store, keep: Keep | None = None) -> list[str]:
    """Delete what can be deleted; why the rest stays."""
    directories = {step: directory(run, step) for step in STEPS}
    found = [*delete_verified(store, directories, directories, keep or Keep(), CPU, silent)]
    return [deleted.problem for deleted in found if deleted.problem]


def restored(store: Store, run: Run, step: int, out: Path, relexio: Relexio) -> None:
    done = relexio("restore", store.address, "--step", step, "-o", out)
    assert done.code == 0, done.err
    found = load_checkpoint(out)
    assert found.keys() == run.steps[step].keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in run.steps[step].items())


def test_weights_and_index_go_and_nothing_else(run: Run, store: Store, tmp_path: Path, relexio: Relexio) -> None:
    before = snapshot(directory(run, 3))
    assert delete(run, store) == []
    for step in STEPS:
        assert weights(run, step) == []
    gone = [name for name in before if name.startswith("model")]
    assert len(gone) == 3 and snapshot(directory(run, 3)) == {n: d for n, d in before.items() if n not in gone}
    assert snapshot(run.base_path)  # the base is no step
    restored(store, run, 5, tmp_path / "back", relexio)
    assert delete(run, store) == []  # nothing is left to do


def test_some_are_kept(run: Run, store: Store) -> None:
    assert delete(run, store, Keep(every=2, last=1)) == []
    assert [step for step in STEPS if weights(run, step)] == [2, 8]
    assert delete(run, store, Keep(last=9)) == []
    assert [step for step in STEPS if weights(run, step)] == [2, 8]


@given(st.integers(0, 12), st.integers(0, 12), st.sets(st.integers(1, 60), min_size=1))
def test_what_is_spared(every: int, last: int, steps: set[int]) -> None:
    ordered = tuple(sorted(steps))
    keep = parse_keep(f"last:{last},every:{every}")
    spared = {step for step in ordered if keep.spares(step, ordered)}
    assert spared == {s for s in ordered if every and s % every == 0} | set(ordered[::-1][:last])


@pytest.mark.parametrize("text", ["", "every", "every:x", "last:-1", "first:2", "last:1,last:2", "every:5;last:2"])
def test_what_to_keep_must_be_said_plainly(text: str) -> None:
    with pytest.raises(RequestError, match="write every:50, last:2 or every:50,last:2"):
        parse_keep(text)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def replace_by_link(file: Path) -> None:
    """The file lies elsewhere, and something that leads there in its place."""
    elsewhere = file.parent.parent.parent / f"elsewhere-{file.name}"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda d: flip(d / "model-00002-of-00002.safetensors", -1), "is not what"),
        (lambda d: flip(d / "model-00001-of-00002.safetensors", 12), "is not what"),
        (lambda d: flip(d / "model.safetensors.index.json", 4), "is not what"),
        (lambda d: os.truncate(d / "model-00001-of-00002.safetensors", 100), "is not what"),
        (lambda d: replace_by_link(d / "model-00001-of-00002.safetensors"), "is a link"),
        (lambda d: replace_by_link(d), "is a link"),
    ],
    ids=["a value", "a header", "the index", "cut off", "a link", "a linked directory"],
)
def test_what_is_not_what_was_stored_stays(run: Run, store: Store, spoil: Callable[[Path], None], why: str) -> None:
    spoil(directory(run, 3))
    before = snapshot(directory(run, 3))
    (problem,) = delete(run, store)
    assert problem.startswith(f"step 3 ({directory(run, 3)}) is not deleted: ") and why in problem
    assert snapshot(directory(run, 3)) == before
    assert [step for step in STEPS if weights(run, step)] == [3]


def test_a_file_that_changes_while_it_is_compared_stays(
    run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._unlike
    shard = directory(run, 1) / "model-00002-of-00002.safetensors"

    def compared(*given: object) -> object:
        found = real(*given)  # type: ignore[arg-type]
        if shard.stat().st_mtime_ns != 5:
            flip(shard, -1)
            os.utime(shard, ns=(5, 5))
        return found

    monkeypatch.setattr(module, "_unlike", compared)
    problems = delete(run, store)
    assert [text.split(" (")[0] for text in problems] == ["step 1"]
    assert shard.exists()


def test_a_link_inside_the_step_is_not_followed(tmp_path: Path, relexio: Relexio) -> None:
    made = make_run(tmp_path / "made", steps=(1,))
    save_checkpoint(tmp_path / "elsewhere" / "huggingface", made.steps[1])
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    command = (
        "convert",
        "--checkpoint",
        f"1={tmp_path / 'linked'}",
        "--base",
        made.base_path,
        "-o",
        tmp_path / "run.zarr",
    )
    done = relexio(*command, "--delete-verified")
    assert done.code == 0 and f"is not deleted: {tmp_path / 'linked'} is a link" in done.err
    assert (tmp_path / "elsewhere" / "huggingface" / "model.safetensors").exists()


@pytest.mark.parametrize("left", [[], ["model-00002-of-00002.safetensors"]])
def test_what_lay_beside_deleted_weights_is_no_model(
    run: Run, tmp_path: Path, relexio: Relexio, left: list[str]
) -> None:
    """A value head, or the average that another tool keeps, is not taken for the step; nor is a shard that a kill has left."""
    for step in STEPS:
        save_file(directory(run, step) / "ema.safetensors", run.steps[1])
        (directory(run, step) / "value_head.safetensors").write_bytes(b"head")
    out = tmp_path / "run.zarr"
    kept = {name: (directory(run, 3) / name).read_bytes() for name in left}
    times = {name: (directory(run, 3) / name).stat().st_mtime_ns for name in left}
    command = ("convert", run.steps_path, "--base", run.base_path, "-o", out)
    assert relexio(*command, "--delete-verified").code == 0
    for name, data in kept.items():
        (directory(run, 3) / name).write_bytes(data)
        os.utime(directory(run, 3) / name, ns=(times[name], times[name]))
    done = relexio(*command)
    assert done.code == 0 and "written again" not in done.err
    done = relexio("verify", out, run.steps_path)
    assert done.code == 0 and "weights deleted there: steps 1, 2, 3, 5, 8" in done.err
    done = relexio(*command, "--follow", "--delete-verified", "--idle", "0s", "--json")
    assert done.code == 0 and f'"deleted": {{"steps": {[3] if left else []}' in done.out


def test_what_may_not_be_deleted_stays(run: Run, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(directory(run, 3)):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert delete(run, store) == [f"step 3 ({directory(run, 3)}) is not deleted: Permission denied"]
    assert [step for step in STEPS if weights(run, step)] == [3]


def test_a_damaged_store_deletes_nothing(run: Run, store: Store) -> None:
    chunk = next(p for p in sorted(Path(store.address).glob("segments/0000/bf16/by/c/*")))
    flip(chunk, chunk.stat().st_size // 2)
    with pytest.raises(StoreError):
        delete(run, store)
    assert all(len(weights(run, step)) == 3 for step in STEPS)


def test_killed_at_every_removal_no_step_is_lost(
    run: Run, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relexio: Relexio
) -> None:
    """A kill leaves the shards that the store has anyway, and the same command removes them."""
    unlink = Path.unlink
    removed: list[Path] = []

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(run.steps_path):
            raise Killed
        unlink(path, missing_ok)

    def once(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.is_relative_to(run.steps_path):
            removed.append(path)
            monkeypatch.setattr(Path, "unlink", killed)

    for _ in range(3 * len(STEPS)):
        monkeypatch.setattr(Path, "unlink", once)
        with pytest.raises(Killed):
            delete(run, open_store(store.address))
            raise Killed  # the last has no other behind it
    monkeypatch.setattr(Path, "unlink", unlink)
    assert len(removed) == len(set(removed)) == 3 * len(STEPS)
    assert delete(run, open_store(store.address)) == []
    for step in STEPS:
        assert weights(run, step) == []
        restored(store, run, step, tmp_path / f"back-{step}", relexio)


def test_the_command(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    out = tmp_path / "run.zarr"
    command = ("convert", run.steps_path, "--base", run.base_path, "-o", out, "--delete-verified", "--keep", "last:1")
    flip(directory(run, 8) / "optimizer.pt", 0)
    done = relexio(*command)
    assert done.code == 0 and "deleted     weights of steps 1, 2, 3, 5, " in done.out
    assert [step for step in STEPS if weights(run, step)] == [8]
    done = relexio(*command, "--keep", "last:0", "--json")
    assert '"deleted": {"steps": [8], ' in done.out
    assert relexio("convert", run.steps_path, "-o", out, "--verify", "--delete-verified").code == 2
    done = relexio("verify", out, run.steps_path)
    assert (
        done.code == 0
        and "not compared, weights deleted there: steps 1, 2, 3, 5, 8" in done.err
        and "whole" in done.out
    )
    # what is gone is no unfinished step
    done = relexio("convert", run.steps_path, "-o", out)
    assert done.code == 0 and "not complete" not in done.err
