"""Every method is its formula in weight space: curves by NumPy, directions by LAPACK; and what it does not use is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relexio.errors import RequestError
from relexio.methods import METHODS, Recipe, Window
from relexio.methods.curves import read_off
from relexio.methods.roles import Choice, layer_of, part_of
from relexio.store.opening import open_store
from tests.support.command import Relexio
from tests.support.make import BF16, FP8, Run, base_tensors, differing, load_checkpoint, make_run, move
from tests.support.make import deltas as deltas_of
from tests.support.steps import fit_run, predict_run, store_run

STEPS = np.array([3, 4, 8, 15, 16, 30, 31, 40])
TARGETS = [55, 100]


@pytest.fixture(scope="module")
def deltas() -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.outer(STEPS, rng.standard_normal(60)) + np.cumsum(rng.standard_normal((len(STEPS), 60)), axis=0)


def predicted(deltas: np.ndarray, recipe: Recipe, targets: list[int] = TARGETS) -> np.ndarray:
    return recipe.weights(Window(deltas @ deltas.T, STEPS), targets).T @ deltas


def curve(deltas: np.ndarray, rank: int, degree: int, at: int) -> np.ndarray:
    """A polynomial through the coefficients of the top directions, as the paper writes it, with NumPy alone."""
    u, sigma, v = np.linalg.svd(deltas, full_matrices=False)
    ahead = [np.polyval(np.polyfit(STEPS, sigma[i] * u[:, i], degree), at) for i in range(rank)]
    return np.array(ahead) @ v[:rank]


@pytest.mark.parametrize(("fit", "degree"), [("line", 1), ("poly2", 2), ("poly3", 3)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_relex_and_pinned_with_any_polynomial(deltas: np.ndarray, fit: str, degree: int, rank: int) -> None:
    whole = predicted(deltas, Recipe("relex", rank, 0.7, fit))
    on_top = predicted(deltas, Recipe("pinned", rank, 0.7, fit))
    for i, target in enumerate(TARGETS):
        np.testing.assert_allclose(whole[i], 0.7 * curve(deltas, rank, degree, target), rtol=1e-6, atol=1e-7)
        ahead = curve(deltas, rank, degree, target) - curve(deltas, rank, degree, STEPS[-1])
        np.testing.assert_allclose(on_top[i], deltas[-1] + 0.7 * ahead, rtol=1e-6, atol=1e-7)


def test_methods_without_a_direction(deltas: np.ndarray) -> None:
    first, last = deltas[0], deltas[-1]
    for i, s in enumerate(TARGETS):
        chord = (s - 40) / (40 - 3) * (last - first)
        want = {
            Recipe("secant", strength=0.5): last + 0.5 * chord,
            Recipe("two-point"): first + (s - 3) / (40 - 3) * (last - first),
            Recipe("scaled-last", strength=0.5): 0.5 * s / 40 * last,
            Recipe("scaled-first"): s / 3 * first,
            Recipe("mean", last=3): deltas[-3:].mean(axis=0),
            Recipe("mean"): deltas.mean(axis=0),
            Recipe("ema", last=1): last,
            Recipe("ema", last=3): 0.5 ** np.arange(8)[::-1] @ deltas / (0.5 ** np.arange(8)).sum(),
        }
        for recipe, truth in want.items():
            np.testing.assert_allclose(predicted(deltas, recipe)[i], truth, rtol=1e-10, err_msg=str(recipe))


def test_a_sinusoid_is_found_again() -> None:
    steps, at = np.arange(1, 41), np.array([50.0, 61.0])
    values = np.stack([3 * np.sin(2 * np.pi * 0.03 * steps + 0.4) + 7, 1e-9 * np.cos(2 * np.pi * 0.11 * steps)], axis=1)
    want = np.stack([3 * np.sin(2 * np.pi * 0.03 * at + 0.4) + 7, 1e-9 * np.cos(2 * np.pi * 0.11 * at)], axis=1)
    np.testing.assert_allclose(read_off("sinusoid", steps, values, at) / want, 1, rtol=1e-4)


@settings(deadline=None, max_examples=50)
@given(scale=st.floats(1e-9, 1e9), seed=st.integers(0, 5), fit=st.sampled_from(["line", "poly2", "poly3", "sinusoid"]))
def test_curves_scale_with_their_values(scale: float, seed: int, fit: str) -> None:
    """What makes it right to fit u and not sigma u."""
    values, at = np.random.default_rng(seed).standard_normal((len(STEPS), 1)), np.array([47, 90])
    once, scaled = read_off(fit, STEPS, values, at), read_off(fit, STEPS, scale * values, at)
    np.testing.assert_allclose(scaled, scale * once, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_refits_are_fits_one_after_the_other(every: int) -> None:
    """By hand: read off, add, drop the first, fit again. With all kept a line would never bend; with a window it does."""
    rng = np.random.default_rng(1)
    values = np.sqrt(STEPS)[:, None] + 0.1 * rng.standard_normal((len(STEPS), 1))
    known, seen, gap = list(STEPS.astype(float)), list(values[:, 0]), float(np.median(np.diff(STEPS)))
    target = 70.0
    while target > known[-1] + gap * every:
        slope, intercept = np.polyfit(known[-8:], seen[-8:], 1)
        ahead = [known[-1] + gap * (i + 1) for i in range(every)]
        seen += [slope * s + intercept for s in ahead]
        known += ahead
    slope, intercept = np.polyfit(known[-8:], seen[-8:], 1)
    found = Recipe(refit=every).read_off(STEPS, values, np.array([target]))
    np.testing.assert_allclose(found[0, 0], slope * target + intercept, rtol=1e-9)
    assert abs(found[0, 0] - Recipe().read_off(STEPS, values, np.array([target]))[0, 0]) > 1e-3


def test_targets_do_not_depend_on_each_other(deltas: np.ndarray) -> None:
    for method in METHODS.values():
        if method.extrapolates:
            recipe = Recipe(method.name, refit=1 if "refit" in method.uses else None)
            both = predicted(deltas, recipe, [100, 55])
            np.testing.assert_allclose(both[1], predicted(deltas, recipe, [55])[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe("nothing"), "known are relex"),
        (Recipe("secant", rank=2), "--method secant does not use --rank; only relex, pinned, reconstruct do"),
        (Recipe("mean", curve="poly2"), "--method mean does not use --fit"),
        (Recipe("relex", last=2), "does not use --last"),
        (Recipe("relex", 9), "give 1 to 8"),
        (Recipe("mean", last=9), "give 1 to 8"),
        (Recipe("relex", curve="spline"), "known are line"),
        (Recipe("relex", refit=0), "give 1 to 8"),
        (Recipe("relex", refit=9), "give 1 to 8"),
        (Recipe("relex", strength=float("nan")), "out of range"),
    ],
)
def test_what_cannot_be_is_refused(recipe: Recipe, said: str) -> None:
    with pytest.raises(RequestError, match=said.replace("?", ".")):
        recipe.check(STEPS, [])


@pytest.mark.parametrize(("fit", "least"), [("poly2", 3), ("poly3", 4), ("sinusoid", 5)])
def test_a_window_too_short_for_a_curve_names_the_limit(fit: str, least: int) -> None:
    Recipe(curve=fit).check(STEPS[:least], [])
    with pytest.raises(RequestError, match=f"at least {least} steps"):
        Recipe(curve=fit).check(STEPS[: least - 1], [])


def test_refits_without_end_are_refused() -> None:
    with pytest.raises(RequestError, match="larger --refit"):
        Recipe(refit=1).check(STEPS, [10**9])


def test_parts_of_a_model() -> None:
    assert [part_of(f"model.layers.3.{name}.weight") for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")] == [
        "q", "down", "norm",
    ]  # fmt: skip
    assert (part_of("lm_head.weight"), part_of("model.embed_tokens.weight"), part_of("x")) == (
        "head",
        "embedding",
        "other",
    )
    assert (layer_of("model.layers.31.mlp.up_proj.weight"), layer_of("model.norm.weight")) == (31, None)


def limit(deltas: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Reduced rank extrapolation, of the shortest weights, by least squares over the elements."""
    speeds = np.diff(deltas, axis=0) / np.diff(steps)[:, None]
    even = np.full(len(speeds), 1 / len(speeds))
    rest = np.linalg.svd(even[None])[2][1:]  # a basis of what adds up to 0
    gamma = even + rest.T @ np.linalg.lstsq((rest @ speeds).T, -even @ speeds, rcond=1e-6)[0]
    return gamma @ deltas[1:]


@settings(deadline=None, max_examples=100)
@given(
    moves=st.integers(2, 9).flatmap(
        lambda n: st.lists(st.sampled_from([0, 0, 1, -2, 3]), min_size=5 * n, max_size=5 * n)
    ),
    gaps=st.lists(st.sampled_from([1, 2, 10]), min_size=11, max_size=11),
)
def test_the_limit_is_that_of_least_squares_over_the_elements(moves: list[int], gaps: list[int]) -> None:
    """More elements than steps or fewer, whatever repeats, or did not move but once."""
    deltas = np.cumsum(np.array(moves, dtype=float).reshape(-1, len(moves) // 5).T, axis=0)
    deltas = np.concatenate([deltas, deltas[-1:] + 1])  # so that something moved
    steps = np.cumsum([3, *gaps])[: len(deltas)]
    weights = Recipe("rre").weights(Window(deltas @ deltas.T, steps), [500, 9000])
    np.testing.assert_allclose(weights[:, 0].sum(), 1, rtol=1e-9)
    np.testing.assert_allclose(weights.T @ deltas, np.tile(limit(deltas, steps), (2, 1)), rtol=1e-5, atol=1e-5)


def test_geometric_ways_end_at_their_limit() -> None:
    rng, steps = np.random.default_rng(0), np.arange(10, 60, 10)
    end, a, b = rng.standard_normal((3, 40))
    deltas = end + 0.8 ** np.arange(5)[:, None] * a + (-0.5) ** np.arange(5)[:, None] * b
    found = Recipe("rre", strength=0.5).weights(Window(deltas @ deltas.T, steps), [70])[:, 0] @ deltas
    np.testing.assert_allclose(found, (end + deltas[-1]) / 2, rtol=1e-6, atol=1e-6)  # half of the way there


@pytest.mark.parametrize(
    ("moved", "gamma"),
    [([1, 2, 3, 4, 5], [1 / 4] * 4), ([0, 0, 1, 1, 1], [1 / 3, 0, 1 / 3, 1 / 3])],
    ids=["line", "once"],
)
def test_a_way_without_a_limit_gets_a_mean(moved: list[int], gamma: list[float]) -> None:
    """All that could be divided by is rounding."""
    direction = np.random.default_rng(2).standard_normal(1000)
    deltas = np.outer(moved, direction) / 3
    weights = Recipe("rre").weights(Window(deltas @ deltas.T, np.arange(1, 6) * 7), [70])[:, 0]
    np.testing.assert_allclose(weights, [0, *gamma], atol=1e-9)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(10, 20, 30, 40, 50))


def truth(run: Run, recipe: Recipe, target: int) -> dict[str, np.ndarray]:
    """A prediction by its definition, in weight space: SVD and polyfit in float64 (rank 1)."""
    times = np.array(sorted(run.steps))
    found = {}
    for name, base in run.base.items():
        m = deltas_of(base, [run.steps[s][name] for s in times])
        u, sigma, v = np.linalg.svd(m, full_matrices=False)
        degree = {"line": 1, "poly2": 2}[recipe.curve]
        line = np.polyfit(times, sigma[0] * u[:, 0], degree)
        chord = (target - times[-1]) / (times[-1] - times[0]) * (m[-1] - m[0])
        kept = (1 - 2 / (recipe.last + 1)) ** np.arange(len(m))[::-1] if recipe.last else np.ones(len(m))
        ahead = {
            "relex": np.polyval(line, target) * v[0],
            "pinned": m[-1] + (np.polyval(line, target) - np.polyval(line, times[-1])) * v[0],
            "secant": m[-1] + chord,
            "two-point": m[-1] + (0 if "norm" in name else 1) * chord,
            "scaled-last": target / times[-1] * m[-1],
            "scaled-first": target / times[0] * m[0],
            "mean": m[-(recipe.last or len(m)) :].mean(axis=0),
            "ema": kept @ m / kept.sum(),
            "rre": limit(m, times),
        }[recipe.method]
        found[name] = base.astype(np.float64) + ahead.reshape(base.shape)
    return found


@pytest.mark.parametrize("solver", ["gram", "blocks"])
@pytest.mark.parametrize(
    "recipe",
    [
        *(Recipe(name) for name in METHODS if METHODS[name].extrapolates and name not in ("mean", "ema")),
        *(Recipe("mean", last=2), Recipe("mean"), Recipe("ema", last=3), Recipe("relex", curve="poly2")),
        Recipe("pinned", curve="poly2"),
    ],
    ids=str,
)
def test_what_is_written_is_the_truth(tmp_path: Path, recipe: Recipe, solver: str) -> None:
    run = make_run(tmp_path, BF16, (3, 10, 20, 21, 50), shapes={"a": (60, 170), "b": (23,), "model.norm.weight": (50,)})
    store = store_run(run, tmp_path / "run.zarr")
    if recipe.way.whole and solver == "blocks":
        with pytest.raises(
            RequestError, match=f"--method {recipe} uses the whole Gram matrix, .* or give --solver gram"
        ):
            fit_run(store, recipe, solver=solver)
        return
    found = load_checkpoint(predict_run(fit_run(store, recipe, solver=solver), 120, tmp_path / "out"))
    assert differing(found, truth(run, recipe, 120))[0] == 0


@pytest.mark.parametrize("others", ["last", "base"])
def test_chosen_tensors_alone_are_predicted(run: Run, tmp_path: Path, others: str, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr")
    out = tmp_path / "out"
    command = (
        "predict",
        tmp_path / "run.zarr",
        "--method",
        "relex",
        "--step",
        100,
        "--exclude",
        "*norm*",
        "--others",
        others,
        "-o",
        out,
    )
    done = relexio(*command)
    assert done.code == 0 and "2 of 3; the others are as in" in done.out
    found, whole = (
        load_checkpoint(out),
        load_checkpoint(predict_run(fit_run(open_store(tmp_path / "run.zarr")), 100, tmp_path / "all")),
    )
    norm = "model.norm.weight"
    want = run.steps[50] if others == "last" else run.base
    assert found[norm].tobytes() == want[norm].tobytes()
    assert all((found[name] == whole[name]).all() for name in found if name != norm)
    assert json.loads((out / "relexio.json").read_text())["exclude"] == ["*norm*"]


def test_chosen_tensors_that_never_moved(tmp_path: Path, relexio: Relexio) -> None:
    base = base_tensors(BF16)
    steps = move(base, [1, 2, 3, 4, 5, 6], still=("model.norm.weight",))
    run = Run(tmp_path, base, steps)
    store_run(run, tmp_path / "run.zarr")
    done = relexio(
        "predict",
        tmp_path / "run.zarr",
        "--method",
        "relex",
        "--step",
        8,
        "--include",
        "*norm*",
        "-o",
        tmp_path / "out",
    )
    assert done.code == 0 and "none of the chosen tensors changed" in done.err and "same as" not in done.err
    assert "verdict  none" in done.out


def test_two_point_keeps_norms_and_secant_does_not(run: Run, tmp_path: Path) -> None:
    store, norm = store_run(run, tmp_path / "run.zarr"), "model.norm.weight"
    two_point = load_checkpoint(predict_run(fit_run(store, Recipe("two-point")), 400, tmp_path / "two"))
    secant = load_checkpoint(predict_run(fit_run(store, Recipe("secant")), 400, tmp_path / "secant"))
    assert two_point[norm].tobytes() == run.steps[50][norm].tobytes() != secant[norm].tobytes()
    assert all((two_point[name] == secant[name]).all() for name in secant if name != norm)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (
            Choice(include=("*.nothing",)),
            "--include '\\*.nothing' matches none of the 3 tensors; their names look like",
        ),
        (Choice(exclude=("q",)), "--exclude 'q' matches none"),
        (Choice(exclude=("*",)), "leave no tensor"),
        (Choice(others="first"), "give base or last"),
        (Choice(others="base"), "has no effect without --include or --exclude"),
    ],
)
def test_a_choice_of_nothing_is_refused(choice: Choice, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        choice.of(["model.embed_tokens.weight", "model.layers.0.q_proj.weight", "model.norm.weight"])


def test_a_tensor_that_cannot_be_predicted_can_be_left_out(tmp_path: Path, relexio: Relexio) -> None:
    """fp8 that changed is refused, unless it is excluded; then it is as it was, in the last step or the base."""
    base = base_tensors(BF16, shapes={"w": (20, 30)})
    steps = move(base, [1, 2, 3])
    for step, tensors in {0: base, **steps}.items():
        tensors["fp8"] = (np.arange(8, dtype=np.uint8) + np.uint8(step)).view(FP8)
    store_run(Run(tmp_path, base, steps, pattern="step_{}"), tmp_path / "run.zarr")
    command = ("predict", tmp_path / "run.zarr", "--method", "relex", "--step", 9)
    refused = relexio(*command, "-o", tmp_path / "no")
    assert refused.code == 1 and "fp8" in refused.err and "--exclude" in refused.err
    for others, want in (("last", steps[3]), ("base", base)):
        out = tmp_path / f"kept-{others}"
        assert relexio(*command, "--exclude", "fp8", "--others", others, "-o", out).code == 0
        assert load_checkpoint(out)["fp8"].tobytes() == want["fp8"].tobytes()
