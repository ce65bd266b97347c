"""Steps in fp32 over a base in bf16, as TRL and verl write them: stored in the base's types, or in their own."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relexio.checkpoints.arrays import Arrays
from relexio.checkpoints.match import match
from relexio.dtypes import Table
from relexio.store.opening import open_store
from tests.support.command import Relexio, refused, snapshot
from tests.support.make import BF16, Tensors, load_checkpoint, make_run, save_checkpoint

F32 = np.dtype("float32")
STEPS = (1, 2, 4, 7)
NORM = "model.norm.weight"


@pytest.fixture
def run(tmp_path: Path) -> dict[int, Tensors]:
    """Steps in fp32, in two shards each, over a base in bf16 that keeps its norm in fp32; the truth in bf16 beside them."""
    made = make_run(tmp_path / "made", F32, STEPS)
    save_checkpoint(tmp_path / "base", as_base(made.base))
    for step, tensors in made.steps.items():
        save_checkpoint(tmp_path / "run" / f"checkpoint-{step}", tensors, shards=2)
        save_checkpoint(tmp_path / "cast" / f"checkpoint-{step}", as_base(tensors))
    return made.steps


def as_base(tensors: Tensors) -> Tensors:
    return {name: array if name == NORM else array.astype(BF16) for name, array in tensors.items()}


def test_steps_are_stored_in_the_types_of_the_base(tmp_path: Path, run: dict[int, Tensors], relexio: Relexio) -> None:
    out, truth = tmp_path / "run.zarr", tmp_path / "truth.zarr"
    done = relexio("convert", tmp_path / "run", "--base", tmp_path / "base", "-o", out, "--steps", "1:2", "--verify")
    assert done.code == 0 and "result      whole" in done.out
    assert (
        "note: steps have F32, and the base BF16, F32: stored in the base's types, rounded to nearest even; --dtype"
        in done.err
    )
    assert relexio("convert", tmp_path / "run", "-o", out).code == 0
    assert relexio("convert", tmp_path / "cast", "--base", tmp_path / "base", "-o", truth).code == 0
    found, wanted = open_store(out), open_store(truth)
    assert found.contents == wanted.contents and found.tensors == wanted.tensors
    assert [found.record(step).cast for step in (None, 1, 7)] == ["", "F32", "F32"]
    done = relexio("convert", tmp_path / "run", "-o", out)
    assert "written again" not in done.err
    assert relexio("verify", out, tmp_path / "run").code == 0
    for store in (out, truth):
        assert (
            relexio(
                "predict", store, "--method", "relex", "--step", 20, "-o", tmp_path / f"predicted-{store.stem}"
            ).code
            == 0
        )
    weights = [(tmp_path / f"predicted-{name}" / "model.safetensors").read_bytes() for name in ("run", "truth")]
    assert weights[0] == weights[1]


def test_verify_does_not_say_that_rounded_files_are_the_same(
    tmp_path: Path, run: dict[int, Tensors], relexio: Relexio
) -> None:
    """People delete what it says is the same."""
    out, base = tmp_path / "run.zarr", tmp_path / "base"
    told = "the weight files of steps 1, 2, 4, 7: restore writes them as safetensors, rounded from F32 to the trajectory's types"
    done = relexio("convert", tmp_path / "run", "--base", base, "-o", out, "--verify")
    for said in (done.out, relexio("verify", out, tmp_path / "run", "--base", base).out):
        assert "whole: every hash is right, and so is what is stored of the files compared\n" in said
        assert f"not stored  {told}\n" in said
    found = json.loads(relexio("verify", out, tmp_path / "run", "--json").out)
    assert found["restored_otherwise"] == [{"steps": [*STEPS], "base": False, "how": told.split("writes them ")[1]}]


def test_such_a_step_comes_back_as_it_was_stored(tmp_path: Path, run: dict[int, Tensors], relexio: Relexio) -> None:
    out = tmp_path / "run.zarr"
    relexio("convert", tmp_path / "run", "--base", tmp_path / "base", "-o", out)
    done = relexio("restore", out, "--step", 4, "-o", tmp_path / "back")
    assert "step 4, as safetensors, rounded from F32 to the trajectory's types\n" in done.out
    assert sorted(snapshot(tmp_path / "back")) == ["config.json", "model.safetensors", "tokenizer.json"]
    found, truth = load_checkpoint(tmp_path / "back"), as_base(run[4])
    assert all(
        found[name].dtype == truth[name].dtype and found[name].tobytes() == truth[name].tobytes() for name in truth
    )


def test_their_own_types_can_be_kept(tmp_path: Path, run: dict[int, Tensors], relexio: Relexio) -> None:
    out = tmp_path / "run.zarr"
    done = relexio(
        "convert",
        tmp_path / "run",
        "--base",
        tmp_path / "base",
        "-o",
        out,
        "--dtype",
        "stored",
        "--delete-verified",
        "--keep",
        "last:4",
    )
    assert done.code == 0 and "rounded" not in done.err
    store = open_store(out)
    assert {dtype for dtype, _ in store.table.values()} == {"F32"}
    assert [store.record(step).cast for step in (None, 4)] == ["BF16", ""]
    before = snapshot(tmp_path / "run" / "checkpoint-4")
    assert relexio("restore", out, "--step", 4, "-o", tmp_path / "back").code == 0
    assert snapshot(tmp_path / "back") == before
    done = relexio("restore", out, "--step", "base", "-o", tmp_path / "base-back")
    assert done.code == 0 and "the base, as safetensors, in wider types than its own (BF16)\n" in done.out
    base = load_checkpoint(tmp_path / "base")
    assert all((load_checkpoint(tmp_path / "base-back")[name] == base[name].astype(F32)).all() for name in base)
    done = relexio("verify", out, tmp_path / "run", "--base", tmp_path / "base")
    assert (
        done.code == 0
        and "the weight files of the base: restore writes them as safetensors, in wider types" in done.out
    )
    assert "the files compared are the same" in relexio("verify", out, tmp_path / "run").out


def test_what_was_rounded_is_not_deleted(tmp_path: Path, run: dict[int, Tensors], relexio: Relexio) -> None:
    out, before = tmp_path / "run.zarr", snapshot(tmp_path / "run")
    command = ("convert", tmp_path / "run", "--base", tmp_path / "base", "-o", out)
    refused(relexio(*command, "--delete-verified"), "step 1", "could not give these bytes back", "--dtype stored")
    assert not out.exists()
    done = relexio(*command, "--delete-verified", "--follow", "--idle", "60s")
    assert done.code == 1 and "could not give these bytes back" in done.err
    assert relexio(*command).code == 0
    done = relexio("convert", tmp_path / "run", "-o", out, "--delete-verified", "--json")
    assert len(json.loads(done.out)["deleted"]["left"]) == 4
    assert snapshot(tmp_path / "run") == before


def test_a_trajectory_keeps_its_types(tmp_path: Path, run: dict[int, Tensors], relexio: Relexio) -> None:
    out = tmp_path / "run.zarr"
    relexio("convert", tmp_path / "run", "--base", tmp_path / "base", "-o", out, "--steps", "1")
    done = relexio("convert", tmp_path / "run", "-o", out, "--dtype", "stored")
    refused(done, "has BF16, F32: --dtype stored is for a new trajectory; give another -o")


@given(st.data())
def test_any_range_is_that_of_the_whole(data: st.DataObject) -> None:
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": BF16}
    own, wanted = data.draw(st.sampled_from([(a, b) for a in kinds for b in kinds if a != b and b != "F64"]))
    count = data.draw(st.integers(1, 300))
    values = np.random.default_rng(count).standard_normal(count).astype(kinds[own])
    table: Table = {"a": (wanted, (count,))}
    found = match(Arrays(1, {"a": values}), table, "the base")
    exact = (
        values.astype(np.float64).astype(np.float32) if own == "F64" and wanted == "F32" else values.astype(np.float32)
    )
    whole = exact.astype(kinds[wanted]) if own != "F64" else Arrays(1, {"a": values}, like=table)
    raw = whole.tobytes() if isinstance(whole, np.ndarray) else bytes(whole._bytes["a"])
    size = len(raw) // count
    first = data.draw(st.integers(0, count - 1))
    out = bytearray(data.draw(st.integers(1, count - first)) * size)
    found.read("a", first * size, memoryview(out))
    assert bytes(out) == raw[first * size : first * size + len(out)] and found.cast == own
