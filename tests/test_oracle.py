"""Every prediction agrees with the float64 oracle, whatever the dtype, blocks, workers, solver, cadence, or groups."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from relexio.engine.resources import Resources
from relexio.methods import Recipe
from tests.support.make import BF16, Run, base_tensors, load_checkpoint, make_run, move, oracle
from tests.support.oracle import DTYPES, agree
from tests.support.steps import fit_run, predict_run, small_blocks, store_run


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("solver", ["gram", "blocks"])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_million_elements(tmp_path: Path, dtype: np.dtype, solver: str, pinned: bool) -> None:
    run = make_run(tmp_path, dtype, steps=(1, 4, 6, 7, 15, 20), shapes={"w": (1000, 700), "e": (300, 999)})
    recipe = Recipe("pinned" if pinned else "relex")
    out = predict_run(fit_run(store_run(run, tmp_path / "run.zarr"), recipe, solver=solver), 100, tmp_path / "out")
    agree(out, oracle(run.base, run.steps, 100, pinned=pinned))


@settings(
    deadline=None,
    max_examples=20,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    dtype=st.sampled_from(DTYPES),
    steps=st.sets(st.integers(1, 400), min_size=2, max_size=12),
    block=st.sampled_from([64, 512, 4096]),
    chunk=st.sampled_from([16, 512, 1 << 18]),
    workers=st.integers(1, 4),
    solver=st.sampled_from(["gram", "blocks"]),
    rank=st.integers(1, 3),
    pinned=st.booleans(),
    appended=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_any_shape_of_the_work(
    monkeypatch: pytest.MonkeyPatch,
    dtype: np.dtype,
    steps: set[int],
    block: int,
    chunk: int,
    workers: int,
    solver: str,
    rank: int,
    pinned: bool,
    appended: int,
    seed: int,
) -> None:
    small_blocks(monkeypatch, block, chunk)
    order = sorted(steps)
    rank = min(rank, len(order))
    target = order[-1] * 3 + 7
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run = make_run(root, dtype, tuple(order), seed=seed, shapes={"a": (61, 17), "b": (23,), "c": ()})
        resources = Resources(device="cpu", workers=workers)
        shuffled = list(np.random.default_rng(seed).permutation(order))
        parts = np.array_split(shuffled, min(appended + 1, len(order)))
        for part in parts:  # later additions may hold earlier steps
            store = store_run(run, root / "run.zarr", ",".join(map(str, part)), resources)
        recipe = Recipe("pinned" if pinned else "relex", rank)
        out = predict_run(fit_run(store, recipe, solver=solver, resources=resources), target, root / "out", resources)
        agree(out, oracle(run.base, run.steps, target, rank, pinned))


def test_bytes_do_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 64)
    run = make_run(tmp_path, steps=tuple(range(1, 12)))
    outputs = []
    for workers in (1, 2, 5):
        resources = Resources(device="cpu", workers=workers)
        store = store_run(run, tmp_path / f"run{workers}.zarr", resources=resources)
        out = predict_run(fit_run(store, resources=resources), 60, tmp_path / f"out{workers}", resources)
        outputs.append((out / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


def test_time_is_the_step_number(tmp_path: Path) -> None:
    """Every tenth step of a run predicts what the whole run predicts: on row numbers it would overshoot tenfold."""
    run = make_run(tmp_path, np.dtype("float32"), tuple(range(1, 41)), noise=0.0)
    store = store_run(run, tmp_path / "run.zarr")
    every = load_checkpoint(predict_run(fit_run(store), 100, tmp_path / "every"))
    tenth = load_checkpoint(predict_run(fit_run(store, window="10:40:10"), 100, tmp_path / "tenth"))
    for name, array in every.items():
        moved = np.abs(array - run.base[name]).max()
        assert np.abs(array - tenth[name]).max() < 1e-3 * moved


def test_full_rank_reconstruction_is_the_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=(1, 2, 5, 9))
    store = store_run(run, tmp_path / "run.zarr")
    out = predict_run(fit_run(store, Recipe("reconstruct", rank=4)), 5, tmp_path / "out")
    found = load_checkpoint(out)
    assert all((found[name] == array).all() for name, array in run.steps[5].items())


@pytest.mark.parametrize(("method", "start"), [("relex", "base"), ("pinned", "last")])
def test_strength_zero_goes_nowhere(tmp_path: Path, method: str, start: str) -> None:
    run = make_run(tmp_path, steps=(1, 2, 5, 9))
    out = predict_run(
        fit_run(store_run(run, tmp_path / "run.zarr"), Recipe(method, strength=0.0)), 50, tmp_path / "out"
    )
    want = run.base if start == "base" else run.steps[9]
    assert all((load_checkpoint(out)[name] == array).all() for name, array in want.items())


def test_strength_scales_the_update(tmp_path: Path) -> None:
    run = make_run(tmp_path, np.dtype("float32"), steps=(1, 2, 5, 9))
    store = store_run(run, tmp_path / "run.zarr")
    whole = load_checkpoint(predict_run(fit_run(store), 50, tmp_path / "whole"))
    half = load_checkpoint(predict_run(fit_run(store, Recipe(strength=0.5)), 50, tmp_path / "half"))
    for name, base in run.base.items():
        np.testing.assert_allclose(half[name] - base, (whole[name] - base) / 2, atol=1e-8)


def test_several_targets_in_one_pass_are_what_each_is_alone(tmp_path: Path) -> None:
    from relexio.progress import silent
    from relexio.verbs.output import Target
    from relexio.verbs.predict import predict

    run = make_run(tmp_path, steps=(1, 2, 5, 9))
    fitted = fit_run(store_run(run, tmp_path / "run.zarr"))
    targets = [Target(step, tmp_path / f"all-{step}") for step in (20, 50, 90)]
    predict(fitted, targets, Resources(device="cpu"), silent)
    for target in targets:
        alone = predict_run(fitted, target.step, tmp_path / f"one-{target.step}")
        assert (alone / "model.safetensors").read_bytes() == (target.out / "model.safetensors").read_bytes()


def test_t_of_300_and_a_tensor_that_never_moves(tmp_path: Path) -> None:
    base = base_tensors(BF16, shapes={"w": (50, 60), "norm": (30,)})
    steps = move(base, list(range(2, 602, 2)), still=("norm",), size=1e-5)
    store = store_run(Run(tmp_path, base, steps, pattern="checkpoint-{}"), tmp_path / "run.zarr")
    agree(predict_run(fit_run(store), 900, tmp_path / "out"), oracle(base, steps, 900))
    assert (load_checkpoint(tmp_path / "out")["norm"] == base["norm"]).all()
