"""The share of single elements that move on a line: counted densely, with NumPy alone; walks are drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.methods.linearity import LINEAR, VALUES, Linearity, null_shares, r_squared
from relexio.progress import silent
from relexio.verbs.findings import linearity
from tests.support.command import Relexio
from tests.support.make import BF16, Run, base_tensors, make_run, move
from tests.support.steps import CPU, small_blocks, store_run

STEPS = (3, 10, 20, 21, 50, 60, 61)


def counted(run: Run, steps: tuple[int, ...], names: list[str] | None = None) -> list[int]:
    """Elements that moved, linear ones, those with several values, linear ones among these; element by element."""
    found = [0, 0, 0, 0]
    for name in names or run.base:
        rows = np.stack([run.steps[step][name].astype(np.float64).ravel() for step in steps])
        for values in rows.T:
            if (values != values[0]).any():
                line = np.corrcoef(steps, values)[0, 1] ** 2 > LINEAR
                several = len(set(values.tolist())) >= VALUES
                found = [n + k for n, k in zip(found, (1, line, several, several and line), strict=True)]
    return found


def of(lines: Linearity | None) -> list[int]:
    assert lines is not None
    return [lines.moved, lines.linear, lines.several, lines.several_linear]


@pytest.mark.parametrize("dtype", [BF16, np.dtype("float16"), np.dtype("float32")], ids=str)
@pytest.mark.parametrize("window", [STEPS, STEPS[1:5]], ids=len)
def test_every_element_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, window: tuple[int, ...]
) -> None:
    """Whatever moved before or after the window does not count."""
    small_blocks(monkeypatch, 257)
    run = make_run(tmp_path, dtype, STEPS)
    store = store_run(run, tmp_path / "run.zarr")
    lines = linearity(store, window, CPU, silent)
    wanted = counted(run, window)
    assert of(lines) == wanted and wanted[0] > wanted[1] > 0 and wanted[0] >= wanted[2] > wanted[3] > 0
    assert lines is not None and lines.elements == sum(tensor.size for tensor in run.base.values())
    assert lines.share == wanted[1] / wanted[0] and lines.several_share == wanted[3] / wanted[2]


def test_of_many_blocks_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 64)
    base = base_tensors(BF16, shapes={f"w{i}": (64,) for i in range(9)})
    run = Run(tmp_path, base, move(base, list(STEPS)))
    store = store_run(run, tmp_path / "run.zarr")
    monkeypatch.setattr("relexio.verbs.findings._BLOCKS", 3)
    lines = linearity(store, STEPS, CPU, silent)
    assert lines is not None and (lines.blocks, lines.all_blocks, lines.elements) == (3, 9, 192)
    assert of(lines) == counted(run, STEPS, ["w0", "w4", "w8"])


@pytest.mark.parametrize(
    "steps", [(1, 2, 3), tuple(range(5, 55, 5)), (0, 1, 2, 4, 40, 41, 42, 43, 80), tuple(range(7, 47))]
)
def test_walks_are_those_that_are_drawn(steps: tuple[int, ...]) -> None:
    rng, count = np.random.default_rng(0), 40_000
    noise = rng.standard_normal((steps[-1] + 1, count))
    updates = [noise[0]]
    for row in noise[1:]:
        updates.append(0.9 * updates[-1] + np.sqrt(1 - 0.9**2) * row)
    for found, each in zip(null_shares(np.array(steps)), (noise, np.array(updates)), strict=True):
        linear = r_squared(np.array(steps), np.cumsum(each, axis=0)[list(steps)].T) > LINEAR
        assert abs(found - linear.mean()) < 4 * np.sqrt(0.25 / count)


def test_one_jump() -> None:
    """As docs/method.md has it."""
    count = 40
    jumps = np.tri(count).T[1:]  # row j - 1: 0 at j steps, then 1
    place = np.arange(1, count)
    found = r_squared(np.arange(count) * 5 + 100, jumps)
    np.testing.assert_allclose(found, 3 * place * (count - place) / (count**2 - 1), rtol=1e-12)


def test_what_findings_says(tmp_path: Path, relexio: Relexio) -> None:
    run = make_run(tmp_path, steps=STEPS)
    store_run(run, tmp_path / "run.zarr")
    moved, linear, several, straight = counted(run, STEPS)
    done = relexio("findings", tmp_path / "run.zarr")
    assert f"\n{linear / moved:.2f}  {moved:,} that moved of " in done.out
    assert f"\n{straight / several:.2f}  {several:,} with 4 values or more; " in done.out
    walk, momentum = null_shares(np.array(STEPS))
    assert f"\n{walk:.2f}  a random walk over the same steps\n{momentum:.2f}  a walk with momentum" in done.out
    facts = json.loads(relexio("findings", tmp_path / "run.zarr", "--json").out)["elements"]
    assert (facts["share"], facts["walk"], facts["blocks"]) == (linear / moved, walk, facts["all_blocks"])
    two = relexio("findings", tmp_path / "run.zarr", "--window", "3,10")
    assert two.code == 0 and "a line through two steps is always straight" in two.out
    assert json.loads(relexio("findings", tmp_path / "run.zarr", "--window", "3,10", "--json").out)["elements"] is None
