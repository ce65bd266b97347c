"""The backtest is what brute force finds in weight space; and its verdict is right where the truth is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from relexio.engine.resources import Resources
from relexio.errors import BudgetError, RequestError
from relexio.methods import METHODS, Recipe, Window
from relexio.methods.advice_words import words
from relexio.methods.backtest import Backtest, backtest
from relexio.methods.line_tests import random_walk, signs, split_half, straightness
from relexio.methods.roles import part_of
from relexio.methods.skill import errors, ratio
from relexio.methods.spectrum import alike, find, left_over, thrown_away
from relexio.methods.trials import HORIZONS, STRENGTHS, Trial, make_folds, make_trials
from relexio.methods.verdict import advise, caveat, outlook
from relexio.progress import silent
from relexio.verbs.backtest import judge
from tests.support.command import Relexio
from tests.support.make import BF16, Run, deltas, make_run
from tests.support.steps import CPU, fit_run, store_run

LINE = np.arange(1, 41)


def model(steps: np.ndarray, drift: float, noise: float, seed: int = 0, tensors: int = 4) -> dict[str, np.ndarray]:
    """Deltas [T, d] of some tensors: a straight way at a speed, and a random walk."""
    rng, found = np.random.default_rng(seed), {}
    gaps = np.sqrt(np.diff(np.concatenate([[0], steps])))[:, None]
    for i in range(tensors):
        walk = np.cumsum(gaps * rng.standard_normal((len(steps), 3000)), axis=0)
        found[f"model.layers.{i}.mlp.up_proj.weight"] = (
            drift * np.outer(steps, rng.standard_normal(3000)) + noise * walk
        )
    return found


def backtested(moved: dict[str, np.ndarray], steps: np.ndarray = LINE, trials: list[Trial] | None = None) -> Backtest:
    pairs = [(name, m @ m.T) for name, m in moved.items()]
    return backtest(pairs, len(pairs), steps, trials or make_trials(len(steps)), make_folds(steps), STRENGTHS)


def skills(test: Backtest, trial: Trial, strength: float) -> np.ndarray:
    """Skill of every prediction, over all tensors."""
    return ratio(*errors(test.pooled(trial), strength))


def test_every_figure_is_that_of_weight_space() -> None:
    """Whatever the method, window, rank, strength and horizon: predict in weight space, subtract, square, add up."""
    steps = np.array([1, 2, 4, 7, 8, 12, 13, 20, 31, 32, 40, 44, 60, 90])
    moved = model(steps, 0.3, 1.0, tensors=2)
    moved["model.norm.weight"] = model(steps, 1.0, 0.5, seed=9, tensors=1).popitem()[1][:, :50]
    moved["model.layers.9.mlp.up_proj.weight"] = np.zeros((len(steps), 30))
    test = backtested(moved, steps)
    columns = [(fold.known, index) for fold in test.folds for index in fold.held_out]
    for trial in test.trials:
        if np.isnan(test.pooled(trial)).any():
            assert any(trial.window(fold.known) is None for fold in test.folds)
            continue
        for strength in (0.25, 1.0):
            want = {key: np.zeros((len(columns), len(moved))) for key in ("error", "kept", "dot", "moved")}
            for column, (known, index) in enumerate(columns):
                count = trial.window(known)
                for row, (name, m) in enumerate(moved.items()):
                    inside = m[known - (count or 0) : known]
                    window = Window(inside @ inside.T, steps[known - (count or 0) : known])
                    recipe = replace(trial.recipe, strength=strength)
                    kept_norm = recipe.way.keeps_norms and part_of(name) == "norm"
                    ahead = m[known - 1] if kept_norm else recipe.weights(window, [int(steps[index])])[:, 0] @ inside
                    real, went = m[index] - m[known - 1], ahead - m[known - 1]
                    want["error"][column, row] = ((ahead - m[index]) ** 2).sum()
                    want["kept"][column, row] = (real**2).sum()
                    want["dot"][column, row], want["moved"][column, row] = real @ went, went @ went
            kept = want["kept"].sum(axis=1)
            np.testing.assert_allclose(
                skills(test, trial, strength), 1 - want["error"].sum(axis=1) / kept, rtol=1e-6, atol=1e-7
            )
            with np.errstate(invalid="ignore"):  # of what stays where it is
                cosine = want["dot"].sum(axis=1) / np.sqrt(want["moved"].sum(axis=1) * kept)
            np.testing.assert_allclose(test.cosines(trial, strength), cosine, rtol=1e-6, atol=1e-7)
            each = 1 - want["error"][:, :3] / want["kept"][:, :3]  # the last tensor never moved
            np.testing.assert_allclose(test.medians(trial, strength), np.median(each, axis=1), rtol=1e-6, atol=1e-7)
            for h in range(len(HORIZONS)):
                inside = test.horizons == h
                pooled = 1 - want["error"][inside].sum() / want["kept"][inside].sum() if inside.any() else np.nan
                np.testing.assert_allclose(test.by_horizon(trial, strength)[h], pooled, rtol=1e-6, atol=1e-7)
            norms = errors(test.pooled(trial, "norm"), strength)
            np.testing.assert_allclose(norms, (want["error"][:, 2], want["kept"][:, 2]), rtol=1e-6, atol=1e-7)


def test_no_prediction_sees_what_it_is_judged_by() -> None:
    """Other steps after a cut-off, and the fits before it are the same."""
    moved = model(LINE, 0.3, 1.0)
    trial = Trial(Recipe("pinned"))
    first = backtested(moved, LINE, [trial])
    known = first.folds[0].known
    for m in moved.values():
        m[known:] += 5.0  # all that comes later is elsewhere
    again = backtested(moved, LINE, [trial])
    columns = len(first.folds[0].held_out)
    np.testing.assert_allclose(
        again.pooled(trial)[:columns, 2], first.pooled(trial)[:columns, 2], rtol=1e-12
    )  # |update|^2


def test_a_run_that_is_stored_from_step_0_on() -> None:
    """Methods that count from step 0 cannot be tried; the others can, without a word from NumPy."""
    steps = np.arange(40)
    test = backtested(model(steps, 1.0, 0.3), steps)
    verdict = advise(test)
    assert verdict is not None and verdict.sure == "high"
    for trial in test.trials:
        counts = trial.recipe.way.from_zero
        assert np.isnan(test.pooled(trial)).all() if counts else not np.isnan(test.pooled(trial)).any(), trial


def test_a_straight_run_is_believed() -> None:
    test = backtested(model(LINE, 1.0, 0.3))
    verdict = advise(test)
    assert verdict is not None and verdict.sure == "high" and verdict.pick.score > 0.8
    assert verdict.reach is not None and verdict.reach[1] == verdict.tested > 3
    assert all(one.skill > 0.5 for one in verdict.history) and len(verdict.history) >= 4
    assert any("Confidence (in weights): high" in line for line in words(test, verdict))


@pytest.mark.parametrize(
    ("skills", "reach", "said"),
    [
        ((0.3, np.nan, 0.1), (1.1, 4.0), "up to step 65, 25 steps ahead; nothing farther was tested."),
        ((0.3, 0.1, -0.2), (1.1, 2.0), "up to step 65, 25 steps ahead, but not farther."),
        (
            (np.nan, -0.1, 0.2),
            (1.27, 4.0),
            "up to step 65, 25 steps ahead; nothing farther was tested. "
            "Nearer than 1.27 times the last known step it does not.",
        ),
    ],
)
def test_how_far_in_words(skills: tuple[float, ...], reach: tuple[float, float], said: str) -> None:
    test = backtested(model(LINE, 1.0, 0.3))
    verdict = advise(test)
    assert verdict is not None
    verdict = replace(verdict, skills=np.array(skills), reach=reach, tested=4.0, farthest=65)
    begin = f"In weights it beats keeping the last checkpoint (mean skill {verdict.pick.score:+.2f}) "
    assert words(test, verdict)[1] == begin + said


@pytest.mark.parametrize("seed", range(3))
def test_a_random_walk_is_not(seed: int) -> None:
    """Energy .8 and r_squared .96, and nothing to be predicted."""
    moved = model(LINE, 0.0, 1.0, seed)
    verdict = advise(backtested(moved))
    assert verdict is not None and verdict.sure == "none" and verdict.pick.score < 0.02
    straight = straightness((m @ m.T for m in moved.values()), LINE)
    assert straight is not None and straight.energy > 0.75 and straight.r_squared > 0.9
    assert straight.split_half is not None and straight.split_half < 0.1


def test_noise_about_one_place_is_told_from_a_direction() -> None:
    """Going back to the middle beats the last checkpoint, by far and always; but nothing is to be extrapolated."""
    rng = np.random.default_rng(0)
    moved = {f"model.layers.{i}.mlp.up_proj.weight": rng.standard_normal((40, 3000)) for i in range(2)}
    test = backtested(moved)
    verdict = advise(test)
    assert verdict is not None and verdict.pick.score > 0.4 and verdict.sure == "none"
    advice = words(test, verdict)[0]
    assert advice.startswith("Do not extrapolate this run: averaging") and "noise" in advice
    gram = np.sum([m @ m.T for m in moved.values()], axis=0)
    half = split_half(gram)
    assert half is not None and half < -0.9 and "undo each other" in signs(gram, LINE)[0]


def test_a_run_that_stopped_is_not_to_be_extrapolated() -> None:
    moved = model(LINE, 1.0, 0.3)
    for m in moved.values():
        m[20:] = m[19]
    test = backtested(moved)
    verdict = advise(test)
    assert (
        verdict is not None
        and verdict.sure == "none"
        and "Train on instead of extrapolating" in words(test, verdict)[1]
    )
    found = signs(sum(m @ m.T for m in moved.values()), LINE)
    assert len(found) == 1 and "step 21 is the same as step 20, and 19 more" in found[0]


def test_a_pick_that_leaves_most_tensors_worse_says_so() -> None:
    moved = {
        **model(LINE, 0.0, 1.0, tensors=4),
        "model.layers.9.mlp.up_proj.weight": 20 * np.outer(LINE, np.ones(3000)),
    }
    test = backtested(moved)
    verdict = advise(test)
    assert verdict is not None and verdict.pick.score > 0.5
    assert any("most tensors end farther away" in line for line in words(test, verdict))


def test_advice_that_failed_before_is_not_sure() -> None:
    """A run that turned round: what had been right was wrong from there on."""
    moved = model(LINE, 1.0, 0.3)
    for m in moved.values():
        m[20:] = 2 * m[19] - m[20:]
    verdict = advise(backtested(moved))
    assert verdict is not None and verdict.sure in ("none", "low", "moderate")
    assert any(one.skill < 0 for one in verdict.history)


def test_outlook_of_near_far_and_farther_targets() -> None:
    test = backtested(model(LINE, 1.0, 0.3), LINE, [Trial(Recipe("pinned"))])
    test = replace(test, strengths=(1.0,))
    near, beyond = outlook(test, 60, 40), outlook(test, 400, 40)
    assert near.skill is not None and near.skill > 0.5 and near.won == near.cut_offs > 1 and "beat" in str(near)
    assert beyond.skill is None and "no test covers it" in str(beyond) and beyond.farthest < 80


def test_a_random_walk_by_formula_is_one_by_lot() -> None:
    energy, r_squared = random_walk(np.arange(1, 76))
    assert round(energy, 2) == 0.81 and round(r_squared, 2) == 0.96
    rng = np.random.default_rng(0)
    steps = np.array([1, 5, 6, 20, 50, 51, 80])
    m = np.cumsum(np.sqrt(np.diff([0, *steps]))[:, None] * rng.standard_normal((7, 200_000)), axis=0)
    found = straightness([m @ m.T], steps)
    assert found is not None
    np.testing.assert_allclose([found.energy, found.r_squared], [found.walk_energy, found.walk_r_squared], atol=0.01)


def test_split_half_by_brute_force() -> None:
    m = model(LINE[:9], 0.3, 1.0, tensors=1).popitem()[1]
    increments = np.diff(np.vstack([np.zeros_like(m[:1]), m]), axis=0)
    halves = [np.linalg.svd(np.cumsum(increments[i::2], axis=0), full_matrices=False)[2][0] for i in (0, 1)]
    found = split_half(m @ m.T)
    assert found is not None
    np.testing.assert_allclose(found, abs(halves[0] @ halves[1]), rtol=1e-8)  # both point where they end
    assert split_half(np.eye(3)) is None


@pytest.mark.parametrize("cadence", [1, 10])
def test_signs_of_a_run_that_is_not_one_line(cadence: int) -> None:
    steps = cadence * LINE
    for drift, noise in ((1.0, 0.3), (0.0, 1.0), (0.3, 1.0)):
        m = model(steps, drift, noise, tensors=1).popitem()[1]
        assert signs(m @ m.T, steps) == []
    m = model(steps, 1.0, 0.3, tensors=1).popitem()[1]
    repeated, jumped, broken = m.copy(), m.copy(), m.copy()
    repeated[-1] = repeated[-2]
    assert [s for s in signs(repeated @ repeated.T, steps) if f"step {steps[-1]} is the same as step {steps[-2]}" in s]
    jumped[25:] += 30 * cadence * np.random.default_rng(1).standard_normal(m.shape[1])
    assert [s for s in signs(jumped @ jumped.T, steps) if f"a jump from step {steps[24]} to step {steps[25]}" in s]
    broken[20:] = broken[19] + 0.1 * (m[20:] - m[19])
    assert [s for s in signs(broken @ broken.T, steps) if "the slope breaks at step" in s]


def test_a_gap_in_the_steps_is_no_jump() -> None:
    steps = np.array([*range(1, 31), 100, 150, 200])
    for drift, noise in ((1.0, 0.3), (0.0, 1.0), (0.3, 1.0)):
        m = model(steps, drift, noise, tensors=1).popitem()[1]
        assert not [s for s in signs(m @ m.T, steps) if "jump" in s]


def test_what_rank_r_throws_away_by_brute_force() -> None:
    m = model(LINE[:12], 0.3, 1.0, tensors=1).popitem()[1]
    u, sigma, v = np.linalg.svd(m, full_matrices=False)
    window = Window(m @ m.T, LINE[:12])
    found, left = find(window, 2), left_over(window, 2)
    rest = m - (u[:, :2] * sigma[:2]) @ v[:2]
    np.testing.assert_allclose(thrown_away(left, np.diag(window.gram)), (rest**2).sum(1) / (m**2).sum(1), rtol=1e-8)
    steps = np.diff(rest, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    np.testing.assert_allclose(alike(left), (steps[1:] * steps[:-1]).sum(1) / (lengths[1:] * lengths[:-1]), atol=1e-8)
    np.testing.assert_allclose(found.energy, (sigma[:2] ** 2).sum() / (sigma**2).sum(), rtol=1e-8)
    np.testing.assert_allclose(found.sigma2, (sigma**2).sum(), rtol=1e-8)
    np.testing.assert_allclose(found.spectrum, (sigma**2 / (sigma**2).sum())[:10], rtol=1e-8)
    np.testing.assert_allclose(np.abs(found.coefficients), sigma[0] * np.abs(u[:, 0]), rtol=1e-8)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, BF16, tuple(range(2, 34, 2)), noise=0.05)


def test_of_a_store_it_is_the_same(run: Run, tmp_path: Path) -> None:
    store = store_run(run, tmp_path / "run.zarr", "2:20")
    store = store_run(run, tmp_path / "run.zarr")
    judged = judge(store, store.steps, CPU, silent)
    moved = {name: deltas(base, [run.steps[s][name] for s in store.steps]) for name, base in run.base.items()}
    want = backtested(moved, np.array(store.steps))
    np.testing.assert_allclose(judged.test.totals, want.totals, rtol=1e-9)
    assert judged.words() == [*judged.sentences(), caveat()]
    assert caveat().startswith("Skill is a distance between weights") and caveat().endswith("(relexio sweep).")
    assert not any("task accuracy" in sentence for sentence in judged.sentences())


def test_a_fit_is_judged_by_its_own_recipe(run: Run, tmp_path: Path) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    fitted = fit_run(store, Recipe("pinned", strength=0.5), "18:32")
    assert fitted.backtest is not None and fitted.backtest.trials == [Trial(Recipe("pinned", strength=0.5), 0.5)]
    judged = judge(store, store.steps, CPU, silent)
    own, same = fitted.backtest.trials[0], Trial(Recipe("pinned"), 0.5)
    np.testing.assert_allclose(skills(fitted.backtest, own, 0.5), skills(judged.test, same, 0.5), rtol=1e-9)


def test_command(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr")
    shown = relexio("backtest", tmp_path / "run.zarr")
    assert shown.code == 0, shown.err
    for word in (
        "random walk",
        "split-half",
        "skill up to",
        "verdict",
        "Use ",
        "not task accuracy",
        "relexio predict",
    ):
        assert word in shown.out
    everything = relexio("backtest", tmp_path / "run.zarr", "--all").out
    assert len(everything.splitlines()) > 2 * len(shown.out.splitlines())
    facts = json.loads(relexio("backtest", tmp_path / "run.zarr", "--json").out)
    assert "\n* " in shown.out  # the recommended row is marked
    assert facts["verdict"]["method"] in ("relex", "pinned") and facts["verdict"]["sure"] == "high"
    assert {recipe["method"] for recipe in facts["recipes"]} == set(METHODS) - {"reconstruct", "mix"}
    assert facts["recipes"][0]["score"] >= facts["recipes"][-1]["score"]
    # what it recommends can be run as it is printed
    command = shown.out.strip().splitlines()[-2].split()
    done = relexio(*command[1:], "-o", tmp_path / "out")
    assert done.code == 0 and "beat keeping the last checkpoint" in done.out and "beyond" not in done.err


def test_predict_warns(tmp_path: Path, relexio: Relexio) -> None:
    run = make_run(tmp_path, BF16, tuple(range(1, 9)))
    there_and_back = {step: run.steps[step if step < 6 else 11 - step] for step in range(1, 10)}
    run = Run(tmp_path / "turned", run.base, {**there_and_back, 10: there_and_back[9]})
    store_run(run, tmp_path / "run.zarr")
    done = relexio(
        "predict", tmp_path / "run.zarr", "--method", "relex", "--step", 11, "--step", 500, "-o", tmp_path / "{step}"
    )
    assert done.code == 0, done.err
    assert "step 6 is the same as step 5, and 4 more repeat one before them" in done.err
    assert "predictions this far ahead had no skill" in done.err and "step 500 is beyond step " in done.err
    assert done.out.count("verdict") == 2


def test_parts_that_end_farther_away_are_named_by_their_globs(tmp_path: Path, relexio: Relexio) -> None:
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("mlp.up_proj", "self_attn.k_proj")]
    base = {name: rng.standard_normal((60, 30)).astype(np.float32) for name in names}
    lines = {name: rng.standard_normal((60, 30)) for name in names}
    walks = {name: np.cumsum(rng.standard_normal((17, 60, 30)), axis=0) for name in names}

    def at(step: int, name: str) -> np.ndarray:
        moved = walks[name][step] if "k_proj" in name else step * lines[name]
        return (base[name] + 1e-3 * moved).astype(np.float32)

    run = Run(tmp_path / "run", base, {step: {name: at(step, name) for name in names} for step in range(1, 17)})
    store_run(run, tmp_path / "run.zarr")
    done = relexio("backtest", tmp_path / "run.zarr")
    option = "--exclude 'model.layers.*.self_attn.k_proj.weight'"
    assert f"parts that end farther away at every horizon are better left as they are: {option}\n" in done.out
    predicted = relexio("predict", tmp_path / "run.zarr", *option.replace("'", "").split(), "-o", tmp_path / "out")
    assert predicted.code == 0 and "2 of 4; the others are as in step 16" in predicted.out


def test_findings_and_reconstruct_commands(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr")
    shown = relexio("findings", tmp_path / "run.zarr", "--rank", 2)
    assert shown.code == 0, shown.err
    for word in (
        "Finding 1",
        "Finding 2",
        "Ablations",
        "What rank 2 throws away",
        "relex, rank 3",
        "poly2",
        "sinusoid",
    ):
        assert word in shown.out
    facts = json.loads(relexio("findings", tmp_path / "run.zarr", "--json").out)
    assert len(facts["tensors"][0]["coefficients"]) == 16 and facts["spectrum"][0] > 0.9
    out = tmp_path / "out"
    done = relexio("reconstruct", tmp_path / "run.zarr", "--step", 20, "--rank", 1, "-o", out)
    assert done.code == 0 and "is kept" in done.out
    other = tmp_path / "other"
    assert relexio("predict", tmp_path / "run.zarr", "--method", "reconstruct", "--step", 20, "-o", other).code == 0
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    facts = json.loads(relexio("reconstruct", tmp_path / "run.zarr", "--step", 20, "-o", tmp_path / "j", "--json").out)
    whole = {n: deltas(b, [run.steps[s][n] for s in sorted(run.steps)]) for n, b in run.base.items()}
    lost = total = 0.0
    for m in whole.values():
        u, sigma, v = np.linalg.svd(m, full_matrices=False)
        lost += ((m[9] - sigma[0] * u[9, 0] * v[0]) ** 2).sum()
        total += (m[9] ** 2).sum()
    np.testing.assert_allclose(facts["thrown_away"], lost / total, rtol=1e-6)


@pytest.mark.parametrize(
    ("drift", "held"), [(True, "It holds here: {} is more"), (False, "It does not hold here: {} is no more")]
)
def test_findings_says_whether_they_hold(tmp_path: Path, relexio: Relexio, drift: bool, held: str) -> None:
    """Beside a random walk over the same steps, and only what is seen to be above its figures."""
    run, rng = make_run(tmp_path / "line", BF16, tuple(range(2, 34, 2)), noise=0.05), np.random.default_rng(0)
    if not drift:  # noise about one place
        noise = {s: {n: rng.standard_normal(b.shape).astype(BF16) for n, b in run.base.items()} for s in run.steps}
        run = Run(tmp_path / "noise", run.base, noise)
    store = store_run(run, tmp_path / "run.zarr")
    facts = json.loads(relexio("findings", tmp_path / "run.zarr", "--json").out)
    walk = random_walk(np.array(store.steps))
    assert tuple(facts["random_walk"].values()) == walk
    assert facts["r_squared"] == np.median([tensor["r_squared"] for tensor in facts["tensors"]])
    shown = relexio("findings", tmp_path / "run.zarr").out
    for share, beside in (
        (f"{facts['spectrum'][0]:.1%}", f"{walk[0]:.1%}"),
        (f"{facts['r_squared']:.3f}", f"{walk[1]:.3f}"),
    ):
        assert f"\n{held.format(share)} than a random walk over the same steps has ({beside}).\n" in shown
    two = relexio("findings", tmp_path / "run.zarr", "--window", "2:4").out
    assert two.count("a line through two steps is always straight") == 2


def test_methods_command(relexio: Relexio) -> None:
    shown = relexio("methods")
    assert shown.code == 0 and all(name in shown.out for name in METHODS)
    assert {entry["name"] for entry in json.loads(relexio("methods", "--json").out)} == set(METHODS)


def test_too_little_is_refused(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    with pytest.raises(RequestError, match="at least 3"):
        judge(store, (2, 4), CPU, silent)
    with pytest.raises(BudgetError):
        judge(store, store.steps, Resources(memory=1_000_000), silent)
    said = relexio("findings", tmp_path / "run.zarr", "--rank", 99)
    assert said.code == 1 and "give 1 to 16" in said.err
