"""Blocks that several tensors share, of different kinds and sizes, and models of very many tensors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from relexio.progress import silent
from relexio.store.schema import PIECES
from relexio.verbs.restore import restore
from relexio.verbs.verify import find_originals, verify
from tests.support.command import snapshot
from tests.support.make import BF16, FP8, Run, Tensors, load_checkpoint, oracle
from tests.support.oracle import agree
from tests.support.steps import CPU, fit_run, predict_run, small_blocks, store_run

DTYPES = [BF16, np.dtype("float32"), np.dtype("float16"), np.dtype("int64"), FP8, np.dtype("bool")]


def mixed(seed: int, count: int, steps: list[int], largest: int) -> tuple[Tensors, dict[int, Tensors]]:
    """Tensors of all kinds, from empty to some larger than a block, of which about half move at each step."""
    rng = np.random.default_rng(seed)
    base: Tensors = {}
    for number in range(count):
        dtype = DTYPES[int(rng.integers(len(DTYPES)))]
        size = int(rng.choice([0, 1, 2, 7, 40, largest], p=[0.1, 0.2, 0.2, 0.3, 0.15, 0.05]))
        shape = (size,) if rng.random() < 0.8 or not size else (1, size, 1)
        base[f"t.{number:03}"] = (0.02 * rng.standard_normal(shape)).astype(np.float32).astype(dtype)
    base["scalar"] = np.array(0.5, np.float32)
    found, now = {}, dict(base)
    for step in steps:
        for name, array in now.items():
            if array.dtype in (BF16, np.dtype("float32"), np.dtype("float16")) and rng.random() < 0.6:
                change = 1e-3 * rng.standard_normal(array.shape) * (rng.random(array.shape) < 0.5)
                now[name] = (array.astype(np.float64) + change).astype(np.float32).astype(array.dtype)
            elif array.dtype == np.int64 and array.size:
                now[name] = array + 1
        found[step] = dict(now)
    return base, found


@pytest.mark.parametrize("block", [pytest.param(8, marks=pytest.mark.slow), 64, 256])
@pytest.mark.parametrize("seed", [0, 1])
def test_tensors_that_share_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, block: int) -> None:
    """Of all kinds, empty ones among them, and some across the borders of blocks: every byte comes back."""
    small_blocks(monkeypatch, block, 32)
    base, steps = mixed(seed, 150, [1, 2, 4, 5], 600)
    run = Run(tmp_path, base, steps, shards=2)
    store_run(run, tmp_path / "run.zarr", "1:2")
    store = store_run(run, tmp_path / "run.zarr")
    assert max(len(b.pieces) for b in store.blocks) > 4 and any(len(parts) > 2 for parts in store.parts.values())
    found = verify(store, find_originals(store, run.steps_path, run.base_path), CPU, silent)
    assert not found.problems and found.base_compared and found.compared == (1, 2, 4, 5)
    for step in (1, 5, None):
        restore(store, step, tmp_path / f"back-{step}", CPU, silent)
        want = run.base_path if step is None else run.steps_path / f"global_step_{step}"
        assert snapshot(tmp_path / f"back-{step}") == snapshot(want)
    counts = store.changed_counts((1, 5))
    for tensor, row in zip(store.tensors, counts, strict=True):
        if tensor.kind.is_float:
            wanted = [np.count_nonzero(steps[s][tensor.name] != base[tensor.name]) for s in (1, 5)]
            assert list(row) == wanted, tensor
    out = load_checkpoint(predict_run(fit_run(store), 12, tmp_path / "out"))
    floats = {n: a for n, a in base.items() if a.size and a.dtype in (BF16, np.dtype("float32"), np.dtype("float16"))}
    truth = oracle(floats, {s: {n: tensors[n] for n in floats} for s, tensors in steps.items()}, 12)
    (tmp_path / "floats").mkdir()
    for name, array in out.items():
        if name not in floats:
            assert array.tobytes() == steps[5][name].tobytes(), name
        else:
            assert array.shape == base[name].shape
            np.testing.assert_allclose(array.astype(np.float64), truth[name], rtol=2.0**-7, atol=1e-6)


def test_a_prediction_is_the_same_whatever_shares_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, steps = mixed(3, 120, [1, 2, 4, 5, 7], 300)
    run, found = Run(tmp_path, base, steps), []
    for block in (16, 1 << 16):
        small_blocks(monkeypatch, block)
        store = store_run(run, tmp_path / f"{block}.zarr")
        for solver in ("gram", "blocks"):
            found.append(
                load_checkpoint(predict_run(fit_run(store, solver=solver), 20, tmp_path / f"{block}-{solver}"))
            )
    wrong = sum(np.count_nonzero(found[0][n] != other[n]) for other in found[1:] for n in base)
    assert wrong <= 2, f"{wrong} elements differ, more than float64 noise explains"


def test_the_oracle_where_blocks_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 64, 32)
    rng = np.random.default_rng(5)
    base = {f"t{i}": (0.02 * rng.standard_normal(int(n))).astype(BF16) for i, n in enumerate(rng.integers(1, 90, 40))}
    steps = {
        s: {n: (a.astype(float) + 1e-4 * s * rng.standard_normal(a.shape)).astype(np.float32).astype(BF16) for n, a in base.items()}
        for s in (1, 2, 5)
    }  # fmt: skip
    store = store_run(Run(tmp_path, base, steps), tmp_path / "run.zarr")
    agree(predict_run(fit_run(store), 20, tmp_path / "out"), oracle(base, steps, 20))


@pytest.mark.slow
def test_twenty_thousand_small_tensors_are_few_files(tmp_path: Path) -> None:
    """A file for each would be slow anywhere, and dear on object storage."""
    rng = np.random.default_rng(0)
    base = {
        f"model.layers.{i}.w": rng.standard_normal(int(n)).astype(BF16)
        for i, n in enumerate(rng.integers(1, 9, 20_000))
    }
    steps = {s: {n: (a + a.dtype.type(0.125 * s)) for n, a in base.items()} for s in (1, 2)}
    run = Run(tmp_path, base, steps)
    store = store_run(run, tmp_path / "run.zarr")
    assert max(len(block.pieces) for block in store.blocks) <= PIECES
    files = [path for path in (tmp_path / "run.zarr").rglob("*") if path.is_file()]
    assert len(files) < 2000
    restore(store, 2, tmp_path / "back", CPU, silent)
    assert snapshot(tmp_path / "back") == snapshot(run.steps_path / "global_step_2")


def test_few_files_may_be_open(tmp_path: Path) -> None:
    """Fewer than a block has tensors and steps, and no more can be had."""
    base, steps = mixed(2, 60, list(range(1, 21)), 600)
    run = Run(tmp_path, base, steps)
    few = ["sh", "-c", 'ulimit -n 128 && exec "$@"', "sh", sys.executable, "-m", "relexio"]
    store, given = tmp_path / "run.zarr", ["--base", run.base_path, "--workers", 2]
    for words in (["convert", run.steps_path, *given, "-o", store], ["verify", store, run.steps_path, *given]):
        done = subprocess.run([*few, *map(str, words)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
