"""A mix is what its weights say, element for element; it has no step, is not judged, and is written down."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import relexio as package
from relexio.errors import RequestError
from relexio.methods import Recipe, Window
from relexio.methods.mix import delta_weights, parse_mix
from relexio.methods.trials import make_trials
from tests.support.command import Relexio
from tests.support.make import Run, differing, load_checkpoint, make_run
from tests.support.steps import fit_run, store_run

STEPS = np.array([3, 10, 300])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(10, 20, 300))


@settings(deadline=None)
@given(weights=st.lists(st.integers(-3000, 3000), min_size=3, max_size=3), strength=st.sampled_from([1.0, 0.25]))
def test_it_is_the_sum_of_whole_checkpoints(weights: list[int], strength: float) -> None:
    rng = np.random.default_rng(1)
    base, checkpoints = rng.standard_normal(20), rng.standard_normal((3, 20))
    of_base = 1000 - sum(weights)
    text = ",".join(f"{s}={w / 1000}" for s, w in zip([0, *STEPS], [of_base, *weights], strict=True))
    deltas = checkpoints - base
    recipe = Recipe("mix", strength=strength, mix=text)
    recipe.check(STEPS, [None])
    found = base + recipe.weights(Window(deltas @ deltas.T, STEPS), [None])[:, 0] @ deltas
    whole = (of_base * base + weights @ checkpoints) / 1000
    np.testing.assert_allclose(found, strength * whole + (1 - strength) * base, atol=1e-9)


def test_what_is_written(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr")
    command = ("predict", tmp_path / "run.zarr", "--method", "mix", "--weights", "0=-0.5,10=.25,300=1.25")
    planned = json.loads(relexio(*command, "-o", tmp_path / "out", "--dry-run", "--json").out)
    assert planned["outputs"] == {"mix": str(tmp_path / "out")}
    done = relexio(*command, "-o", tmp_path / "out")
    assert done.code == 0 and done.err == ""
    assert "method   mix, 0=-0.5,10=.25,300=1.25, strength 1\n" in done.out
    assert f"{tmp_path / 'out'}: a mix\nverdict  not judged: " in done.out
    truth = {
        name: -0.5 * base.astype(float)
        + 0.25 * run.steps[10][name].astype(float)
        + 1.25 * run.steps[300][name].astype(float)
        for name, base in run.base.items()
    }
    assert differing(load_checkpoint(tmp_path / "out"), truth)[0] == 0
    facts = json.loads((tmp_path / "out" / "relexio.json").read_text())
    assert (facts["step"], facts["weights"], facts["backtest"]) == (None, "0=-0.5,10=.25,300=1.25", None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Mixed checkpoint\n" in card and " mixed them from observed checkpoints" in card
    assert Recipe("mix", mix=facts["weights"]).arguments() == ["--method mix", "--weights 0=-0.5,10=.25,300=1.25"]


def test_in_python(run: Run, tmp_path: Path) -> None:
    store_run(run, tmp_path / "run.zarr")
    fit = package.open(tmp_path / "run.zarr").fit(method="mix", weights="300=1")
    assert fit.backtest is None and fit.outlook(None) is None
    found = fit.predict()
    for name, tensor in run.steps[300].items():
        assert (found[name].compute() == tensor.astype(np.float32)).all()
    with pytest.raises(RequestError, match="of no step"):
        fit.predict(400)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0=-0.5,300=1.4", "add up to 0.9, and must to 1; give the base what is missing: --weights 0=-0.4,300=1.4"),
        ("300=1.5,10=-1e-3", "add up to 1.499, .*: --weights 0=-0.499,300=1.5,10=-0.001"),
        ("300", "'300' is not STEP=WEIGHT; write 0=-0.5,300=1.5, where 0 is the base"),
        ("300=nan", "is not STEP=WEIGHT"),
        ("-1=1", "is not STEP=WEIGHT"),
        ("", "is not STEP=WEIGHT"),
        ("300=0.5,300=0.5", "step 300 is given twice"),
        ("20=1", "step 20 is not among the 3 steps of the window, 3 to 300"),
    ],
)
def test_what_is_no_mix_is_refused(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        delta_weights(text, STEPS)
    with pytest.raises(RequestError, match=said):
        Recipe("mix", mix=text).check(STEPS, [None])


def test_what_is_suggested_is_a_mix() -> None:
    with pytest.raises(RequestError) as refused:
        parse_mix("3=0.1,10=0.00001,300=123456.789")
    weights = parse_mix(str(refused.value).rpartition(" ")[2])
    assert {step: weights[step] for step in (3, 10, 300)} == {3: 0.1, 10: 1e-05, 300: 123456.789}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "mix"), "error: --method mix needs --weights, as in --weights 0=-0.5,300=1.5"),
        (("--method", "mix", "--weights", "300=1", "--step", "400"), "makes one checkpoint, of no step"),
        (("--method", "relex", "--weights", "300=1"), "--method relex does not use --weights; only mix does"),
        (("--step", "400", "--weights", "300=1"), "--weights goes with --method mix"),
    ],
)
def test_what_does_not_go_together(
    run: Run, tmp_path: Path, relexio: Relexio, options: tuple[str, ...], said: str
) -> None:
    store_run(run, tmp_path / "run.zarr")
    refused = relexio("predict", tmp_path / "run.zarr", *options, "-o", tmp_path / "out")
    assert refused.code and said in refused.err and not (tmp_path / "out").exists()


def test_a_step_in_the_name_of_a_mix_is_refused(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr")
    command = ("predict", tmp_path / "run.zarr", "--method", "mix", "--weights", "300=1", "-o", tmp_path / "{step}")
    refused = relexio(*command)
    assert refused.code == 2 and "leave {step} out of -o" in refused.err


def test_nothing_else_tries_it(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    assert all(trial.recipe.method != "mix" for trial in make_trials(50))
    assert fit_run(store, Recipe("mix", mix="300=1")).backtest is None
    swept = relexio("sweep", tmp_path / "run.zarr", "--methods", "mix", "--steps", 400, "--eval", "true {checkpoint}")
    assert swept.code == 1 and "give no step, and do not sweep it" in swept.err
