"""A base that is not the model that training began from: every command asks, and nothing that rests on it is advised."""

import json
from pathlib import Path

import numpy as np
import pytest

from relexio.methods import METHODS, Recipe, Window
from relexio.methods.line_tests import base_doubt
from tests.support.command import Relexio
from tests.support.make import BF16, Run, Tensors, base_tensors, make_run, move, save_checkpoint
from tests.support.steps import fit_run, store_run

STEPS = (1, 2, 3, 5, 8, 13, 21, 34)
ASKED = "is this the model that training began from? If not, convert again with that model as --base"


@pytest.fixture
def wrong(tmp_path: Path) -> Run:
    """A run of which somebody gives random weights of the same shapes for the base."""
    run = make_run(tmp_path, steps=STEPS)
    run.base_path = save_checkpoint(tmp_path / "wrong", base_tensors(BF16, seed=99))
    return run


def test_convert_asks_before_it_works(wrong: Run, tmp_path: Path, relexio: Relexio) -> None:
    out = tmp_path / "run.zarr"
    for more in (("--dry-run",), ()):
        done = relexio("convert", wrong.steps_path, "--base", wrong.base_path, "-o", out, *more)
        assert done.code == 0
        assert "note: step 1 is about " in done.err and "times farther from the base than from step 2" in done.err
        assert ASKED in done.err
    first = int(done.err.split("about ")[1].split(" times")[0].replace(",", ""))
    far, near = ((_apart(wrong.steps[1], other)) for other in (base_tensors(BF16, seed=99), wrong.steps[2]))
    assert first == float(f"{far / near:.2g}")  # a small model is read whole


def test_convert_asks_when_the_second_step_comes(wrong: Run, tmp_path: Path, relexio: Relexio) -> None:
    """As beside a trainer: a step at a time."""
    convert = ("convert", wrong.steps_path, "--base", wrong.base_path, "-o", tmp_path / "run.zarr", "--steps")
    asked = [relexio(*convert, step).err for step in STEPS[:3]]
    assert asked[0] == asked[2] == ""
    assert "note: step 1 is about " in asked[1] and "than from step 2" in asked[1] and ASKED in asked[1]


def _apart(one: Tensors, other: Tensors) -> float:
    return float(np.sqrt(sum(((one[n].astype(float) - other[n].astype(float)) ** 2).sum() for n in one)))


def test_the_right_base_is_not_asked_about(tmp_path: Path, relexio: Relexio) -> None:
    run = make_run(tmp_path, steps=STEPS)
    done = relexio("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr")
    assert done.err == ""
    for command in ("backtest", "inspect", "findings"):
        shown = relexio(command, tmp_path / "run.zarr")
        assert "began" not in shown.out + shown.err


def test_every_command_asks(wrong: Run, tmp_path: Path, relexio: Relexio) -> None:
    store = store_run(wrong, tmp_path / "run.zarr")
    for command in ("inspect", "findings"):
        assert ASKED in relexio(command, store.address).err
    for window in ("1:34", "5:34"):  # whatever the window
        predicted = relexio(
            "predict", store.address, "--window", window, "--method", "relex", "--step", 60, "-o", tmp_path / window[:1]
        )
        assert predicted.code == 0 and f"{ASKED}\n" in predicted.err
    assert any(ASKED in text for text in fit_run(store).notes)
    assert ASKED in json.loads(relexio("backtest", store.address, "--json").out)["doubt"]
    assert ASKED in json.loads(relexio("inspect", store.address, "--json").out)["doubt"]


def test_what_needs_the_base_is_not_advised(wrong: Run, tmp_path: Path, relexio: Relexio) -> None:
    store = store_run(wrong, tmp_path / "run.zarr")
    shown = relexio("backtest", store.address)
    said = shown.out.partition("verdict\n")[2]
    assert said.startswith("Step 1 is about ") and ASKED in said
    assert "Confidence (in weights): low" in said or "Train on instead of extrapolating" in said
    found = json.loads(relexio("backtest", store.address, "--json").out)
    assert not METHODS[found["verdict"]["method"]].needs_base
    assert found["verdict"]["sure"] in ("low", "none")
    assert {row["method"] for row in found["recipes"]} == METHODS.keys() - {"reconstruct", "mix"}  # all are shown


def test_the_report_is_not_green(wrong: Run, tmp_path: Path, relexio: Relexio) -> None:
    pytest.importorskip("vl_convert")
    store = store_run(wrong, tmp_path / "run.zarr")
    page = tmp_path / "page.html"
    assert relexio("report", store.address, "-o", page).code == 0
    text = page.read_text()
    assert '<section class="verdict high"' not in text and '<section class="verdict moderate"' not in text
    assert '<p class="lead">Step 1 is about ' in text


@pytest.mark.parametrize("name", METHODS)
def test_which_methods_need_the_base(name: str) -> None:
    """Of those that do not, predictions are the same from any base."""
    rng = np.random.default_rng(0)
    steps, targets = np.array([1, 2, 4, 7, 8]), [8] if name == "reconstruct" else [9, 20]
    checkpoints, base = rng.standard_normal((5, 40)).cumsum(axis=0), 3 * rng.standard_normal(40)
    predicted = []
    for theta in (np.zeros(40), base):
        deltas = checkpoints - theta
        weights = Recipe(name, mix="0=-0.5,4=0.5,8=1").weights(Window(deltas @ deltas.T, steps), targets)
        predicted.append(theta[:, None] + deltas.T @ weights)
    assert np.allclose(*predicted) is not METHODS[name].needs_base


def _gram(theta: np.ndarray, checkpoints: np.ndarray) -> np.ndarray:
    deltas = checkpoints - theta
    return deltas @ deltas.T


@pytest.mark.parametrize("kind", ["line", "walk", "still"])
@pytest.mark.parametrize("first", [0, 1, 10, 1000])
@pytest.mark.parametrize("gap", [1, 10, 1000])
def test_no_right_base_is_asked_about(kind: str, first: int, gap: int) -> None:
    """Whether a run goes straight on, walks, or stays near a place: from whichever step it is stored, and how often."""
    rng = np.random.default_rng(1)
    steps = first + gap * np.arange(4)
    direction = rng.standard_normal(500)
    spread = np.sqrt(np.diff(steps, prepend=0).clip(1))[:, None] * rng.standard_normal((4, 500))
    moved = {
        "line": np.outer(steps.clip(1), direction),
        "walk": spread.cumsum(axis=0),
        "still": rng.normal(size=(4, 500)),
    }
    assert base_doubt(_gram(np.zeros(500), moved[kind]), steps) is None
    far = _gram(np.full(500, 1e6), moved[kind])
    assert base_doubt(far, steps) is not None


def test_repeated_steps_are_passed_over() -> None:
    checkpoints = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.01]])
    steps = np.array([1, 2, 3])
    asked = base_doubt(_gram(np.zeros(2), checkpoints), steps)
    assert asked is not None and asked.startswith("step 1 is about 100 times farther from the base than from step 3: ")
    assert base_doubt(_gram(np.zeros(2), checkpoints[:2]), steps[:2]) is None
    assert base_doubt(-np.eye(2), steps[:2]) is None  # as of a damaged kept fit


def test_the_first_step_can_stand_for_the_base(wrong: Run, tmp_path: Path, relexio: Relexio) -> None:
    first = wrong.steps_path / "global_step_1"
    done = relexio("convert", wrong.steps_path, "--base", first, "--steps", "2:", "-o", tmp_path / "run.zarr")
    assert done.code == 0 and done.err == ""


def test_an_earlier_stage_is_asked_about(tmp_path: Path, relexio: Relexio) -> None:
    """Fine-tuned before RL: the model before that is not the base."""
    base = base_tensors(BF16)
    tuned = move(base, [1], seed=5, size=3e-3)[1]
    run = Run(tmp_path, base, move(tuned, [10, 20, 30], size=1e-6 * 4))
    asked = relexio("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr").err
    assert ASKED in asked
