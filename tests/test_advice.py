"""What is left to the backtest is what ``relexio backtest`` says; where it advises nothing, nothing is written."""

import json
from pathlib import Path

import numpy as np
import pytest

import relexio as relexio_package
from relexio.errors import RequestError
from tests.support.command import Relexio, snapshot
from tests.support.make import BF16, Run, make_run
from tests.support.steps import store_run


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "made", BF16, tuple(range(2, 34, 2)), noise=0.05)
    store_run(run, tmp_path / "my run.zarr")
    return Path("my run.zarr")


def verdict(relexio: Relexio, stored: Path, *more: object) -> dict[str, object]:
    found: dict[str, object] = json.loads(relexio("backtest", stored, "--json", *more).out)["verdict"]
    return found


@pytest.mark.parametrize("more", [(), ("--window", "2:20"), ("--window", "2:32:4")])
def test_the_recipe_and_the_step_are_those_of_the_backtest(
    stored: Path, relexio: Relexio, more: tuple[object, ...]
) -> None:
    said = verdict(relexio, stored, *more)
    planned = relexio("predict", stored, *more, "--dry-run", "--json")
    done = relexio("predict", stored, *more)
    assert done.code == planned.code == 0, done.err
    step, strength = said["farthest"], said["strength"]
    out = Path(f"my run-{said['method']}-step-{step}-strength-{strength:g}")
    facts = json.loads((out / "relexio.json").read_text())
    assert {key: facts[key] for key in ("method", "rank", "fit", "refit", "last", "strength", "step")} == {
        **{key: said[key] for key in ("method", "rank", "fit", "refit", "last", "strength")},
        "step": step,
    }
    assert json.loads(planned.out)["outputs"] == {str(step): str(out)}
    assert f"step {step}, as far as it has skill: recommended by the backtest (mean skill " in done.err
    assert f"fitted to {said['window']};" in done.err
    # the same, said in full
    names = ("method", "rank", "strength", "window")
    options = [part for name in names for part in (f"--{name}", said[name])]
    full = relexio("predict", stored, *options, "--step", step, "-o", "again")
    assert full.code == 0 and snapshot(Path("again")) == snapshot(out)


def test_only_the_recipe_or_only_the_step(stored: Path, relexio: Relexio) -> None:
    said = verdict(relexio, stored)
    done = relexio("predict", stored, "--step", 500, "--step", "auto", "-o", "{step}")
    assert done.code == 0, done.err
    assert json.loads(Path("500", "relexio.json").read_text())["method"] == said["method"]
    assert json.loads(Path(str(said["farthest"]), "relexio.json").read_text())["strength"] == said["strength"]
    own = relexio("predict", stored, "--method", "secant", "--strength", 0.5, "--window", "18:32")
    assert own.code == 0, own.err
    (out,) = Path().glob("my run-secant-step-*-strength-0.5")
    step = json.loads((out / "relexio.json").read_text())["step"]
    assert step > 32 and f"note: step {step}, as far as it has skill: recommended by the backtest" in own.err


def test_a_part_of_a_recipe_goes_with_its_method(stored: Path, relexio: Relexio) -> None:
    for strength in (0.5, 1):  # the default too: what is asked for is not ignored
        done = relexio("predict", stored, "--strength", strength)
        assert done.code == 2 and "--strength goes with --method NAME" in done.err
    swept = relexio("sweep", stored, "--rank", 1, "--eval", "echo 1 {checkpoint}")
    assert swept.code == 2 and "--rank goes with --methods NAME" in swept.err
    same = relexio("predict", stored, "--step", 40, "--step", 50, "-o", "one")
    assert same.code == 2 and "{step}" in same.err


def walk(tmp_path: Path) -> Path:
    """A run that went nowhere: a random walk."""
    rng = np.random.default_rng(3)
    base = {"model.w.weight": rng.standard_normal((40, 30)).astype(np.float32)}
    moved = np.cumsum(1e-3 * rng.standard_normal((12, 40, 30)), axis=0)
    steps = {
        step: {"model.w.weight": (base["model.w.weight"] + moved[step - 1]).astype(np.float32)} for step in range(1, 13)
    }
    store_run(Run(tmp_path / "walked", base, steps), tmp_path / "walk.zarr")
    return tmp_path / "walk.zarr"


@pytest.mark.parametrize("asked", [(), ("--method", "relex"), ("--step", 20), ("--dry-run",)])
def test_where_nothing_is_recommended_nothing_is_written(
    tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch, asked: tuple[object, ...]
) -> None:
    stored = walk(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert verdict(relexio, stored)["sure"] == "none"
    before = sorted(path.name for path in tmp_path.iterdir())
    done = relexio("predict", stored, *asked)
    assert done.code == 1 and done.out == "" and done.err.count("\n") == 1, done.err
    said = "relex, strength 1 is not recommended at any step" if "relex" in asked else "nothing is recommended"
    assert said in done.err and done.err.endswith(f"relexio predict {stored} --method relex --step 18\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    command = done.err.rpartition(": relexio ")[2].split()
    assert relexio(*command).code == 0 and (tmp_path / "walk-relex-step-18-strength-1" / "config.json").is_file()


def test_too_few_steps_for_a_backtest(stored: Path, relexio: Relexio) -> None:
    done = relexio("predict", stored, "--window", "2:4")
    assert done.code == 1 and "A backtest needs at least 3 observed steps; there are 2" in done.err
    command = done.err.rstrip().rpartition(": relexio ")[2]
    assert command == "predict 'my run.zarr' --window 2:4 --method relex --step 6"
    assert relexio("predict", stored, "--window", "2:4", "--method", "relex", "--step", 40).code == 0
    swept = relexio("sweep", stored, "--window", "2:4", "--eval", "echo 1 {checkpoint}")
    assert swept.code == 1 and "A backtest needs at least 3 observed steps" in swept.err
    assert not Path("my run.sweep").exists()


@pytest.mark.parametrize("command", ["backtest", "predict", "findings", "inspect"])
def test_commands_end_with_what_to_run_next(stored: Path, relexio: Relexio, command: str) -> None:
    done = relexio(command, stored)
    last = done.out[done.out.index("\nnext\n") :].splitlines()[2:]
    assert last and all(line.startswith("  relexio ") and "'my run.zarr'" in line for line in last)


@pytest.mark.parametrize("window", ["2:20", "2:32", "12:24"])
def test_python_does_what_the_command_does(stored: Path, relexio: Relexio, window: str) -> None:
    done = relexio("predict", stored, "--window", window, "-o", "by-command")
    fit = relexio_package.open(stored).fit(window)
    fit.predict().save("in-python")
    assert done.code == 0 and snapshot(Path("in-python")) == snapshot(Path("by-command"))
    with pytest.raises(RequestError, match="takes rank, strength and the like from the backtest"):
        relexio_package.open(stored).fit(window, strength=0.5)
