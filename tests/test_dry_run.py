"""``convert --dry-run``: what it sees of a run, and how near its estimate comes to the store that is then written."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.trainers import parse_pattern
from relexio.progress import silent
from relexio.store.schema import Block
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.convert.encode import read_block
from relexio.verbs.convert.estimate import Estimate, estimate
from relexio.verbs.inspect import sizes
from relexio.words import parse_steps
from tests.support.command import Relexio, snapshot
from tests.support.make import BF16, Run, base_tensors, make_run, move, save_checkpoint
from tests.support.steps import CPU, small_blocks

SHAPES = {"model.embed_tokens.weight": (600, 200), **{f"layers.{i}.weight": (128, 200) for i in range(8)}, "n": (99,)}


def estimated(run: Run, out: Path, steps: str, dtype: str = "base") -> tuple[Estimate, float]:
    """What is estimated for some steps, and how many times what was then written that is."""
    request = Request(out, run.base_path, run.steps_path, {}, parse_steps(steps), dtype=dtype)
    conversion = prepare(request, CPU, silent)
    before = snapshot(out) if out.exists() else {}
    found = estimate(conversion)
    assert found is not None and (snapshot(out) if out.exists() else {}) == before
    old = sizes(conversion.store) if conversion.store else None
    new = sizes(convert(conversion, silent).store)
    written = new.steps + new.base - (old.steps + old.base if old else 0)
    return found, found.bytes / written


@pytest.mark.parametrize(
    ("steps", "dtype", "more"),
    [
        ((5,), BF16, {}),
        ((10, 20, 30, 40, 50, 60, 70), BF16, {}),
        (
            (200, 205, 210, 215, 220, 225),
            BF16,
            {},
        ),  # the first step is far from the base, and all others near each other
        ((10, 20, 30, 40), BF16, {"size": 2e-6}),  # few moves
        ((1, 2, 3, 5, 8), np.dtype("f4"), {}),  # every element moves
    ],
)
def test_an_estimate_is_near_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], dtype: np.dtype, more: dict[str, Any]
) -> None:
    small_blocks(monkeypatch, 1 << 13)
    run = make_run(tmp_path, dtype, steps, shapes=SHAPES, **more)
    found, ratio = estimated(run, tmp_path / "run.zarr", "1:")
    assert found.blocks == 8 and found.base and 0.5 < ratio < 2


def test_an_estimate_of_steps_that_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 1 << 13)
    run = make_run(tmp_path, steps=(200, 201, 202, 203, 500), shapes=SHAPES, noise=0)
    estimated(run, tmp_path / "run.zarr", "200")
    found, ratio = estimated(run, tmp_path / "run.zarr", "201")  # much nearer to step 200 than to the base
    assert (found.steps, found.base) == ((200, 201), False) and 0.5 < ratio < 2
    found, ratio = estimated(run, tmp_path / "run.zarr", "202:203")
    assert found.steps == (201, 202, 203) and 0.5 < ratio < 2
    found, ratio = estimated(run, tmp_path / "run.zarr", "500")
    assert found.steps == (203, 500) and 0.5 < ratio < 2


def test_an_estimate_counts_what_a_trainer_says_of_each_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=(10, 20, 30, 40, 50, 60), shapes={"w": (8, 8)})
    rng = np.random.default_rng(0)
    for step in run.steps:
        (run.steps_path / f"global_step_{step}" / "trainer_state.json").write_bytes(rng.bytes(100_000))
    assert 0.5 < estimated(run, tmp_path / "run.zarr", "1:")[1] < 2


def test_an_estimate_reads_some_blocks_of_some_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 1 << 10)
    run = make_run(tmp_path, steps=tuple(range(1, 31)), shapes=SHAPES)
    conversion = prepare(Request(tmp_path / "run.zarr", run.base_path, run.steps_path), CPU, silent)
    read: list[tuple[int | None, int]] = []

    def noted(checkpoint: Checkpoint, block: Block) -> np.ndarray:
        read.append((checkpoint.step, block.index))
        return read_block(checkpoint, block)

    monkeypatch.setattr("relexio.verbs.convert.estimate.read_block", noted)
    found = estimate(conversion)
    assert found is not None and found.steps == (1, 15, 16)
    assert {step for step, _ in read} == {None, 1, 15, 16} and len({index for _, index in read}) == 8
    first, *_, last = sorted({index for _, index in read})
    assert first < 25 < 290 < last, "they are spread over the 317 blocks"


def test_a_dry_run_says_what_it_sees(tmp_path: Path, relexio: Relexio) -> None:
    run = make_run(tmp_path, steps=(10,))
    for step, tensors in move(run.base, [5, 10, 15, 20]).items():
        path = save_checkpoint(tmp_path / "trl" / f"checkpoint-{step}", {n: a.astype("f4") for n, a in tensors.items()})
        if step != 20:
            (path / "trainer_state.json").write_text("{}")
    os.utime(path.parent / "checkpoint-15" / "trainer_state.json", ns=(1, 1))  # older than the weights: written again
    command = ("convert", tmp_path / "trl", "--base", run.base_path, "-o", tmp_path / "run.zarr", "--dry-run")
    done = relexio(*command)
    assert "from      directories named as by TRL, Trainer; F32 on disk, stored as BF16\n" in done.out
    assert "numbers   from the names of directories: checkpoint-5 is step 5\n" in done.out
    assert "markers   trainer_state.json for 2 of 4: --follow" in done.out
    assert "to write  about " in done.out and "(estimated from 1 block of the base and steps 5, 10, 15)\n" in done.out
    facts = json.loads(relexio(*command, "--json").out)
    assert (facts["from"], facts["types"]) == ("TRL, Trainer", "F32 on disk, stored as BF16")
    assert facts["numbers_from"] == {str(step): f"checkpoint-{step}" for step in (5, 10, 15, 20)}
    assert facts["markers"] == {"trainer_state.json": [5, 10]}
    about = facts["estimate"]
    assert (about["blocks"], about["steps"], about["base"]) == (1, [5, 10, 15], True) and about["bytes"] > 0
    assert not list(tmp_path.glob("run.zarr*"))


def test_a_marker_beside_the_steps_counts_up_to_its_number(tmp_path: Path, relexio: Relexio) -> None:
    base = base_tensors(BF16)
    save_checkpoint(tmp_path / "base", base)
    for step, tensors in move(base, [5, 10, 15]).items():
        save_checkpoint(tmp_path / "verl" / f"global_step_{step}" / "actor" / "huggingface", tensors)
    (tmp_path / "verl" / "latest_checkpointed_iteration.txt").write_text("10")
    command = ("convert", tmp_path / "verl", "--base", tmp_path / "base", "-o", tmp_path / "run.zarr", "--dry-run")
    facts = json.loads(relexio(*command, "--json").out)
    assert facts["from"] == "verl, FSDP" and facts["markers"] == {"latest_checkpointed_iteration.txt": [5, 10]}


def test_numbers_by_a_pattern_and_by_hand(tmp_path: Path, relexio: Relexio) -> None:
    base = base_tensors(BF16)
    save_checkpoint(tmp_path / "base", base)
    steps = move(base, [5, 10])
    save_checkpoint(tmp_path / "run" / "iter_0005_hf", steps[5])
    save_checkpoint(tmp_path / "other", steps[10])
    by_hand = ("--checkpoint", f"10={tmp_path / 'other'}", "--base", tmp_path / "base", "--dry-run")
    pattern = parse_pattern(r"iter_(\d+)_hf").pattern
    done = relexio("convert", tmp_path / "run", *by_hand, "--pattern", pattern, "-o", tmp_path / "run.zarr")
    says = f"from the names of directories, by --pattern {pattern}: iter_0005_hf is step 5; step 10 by --checkpoint\n"
    assert f"numbers   {says}" in done.out
    assert "from      a trainer that the names do not tell" in done.out
    assert "markers   none: --follow takes a step when" in done.out


def test_nothing_to_add_has_no_estimate(tmp_path: Path, relexio: Relexio) -> None:
    run = make_run(tmp_path)
    command = ("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr")
    assert relexio(*command).code == 0
    facts = json.loads(relexio(*command, "--dry-run", "--json").out)
    assert (facts["estimate"], facts["markers"], facts["numbers_from"]) == (None, {}, {})
