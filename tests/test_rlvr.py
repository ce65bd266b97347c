"""The tasks of tools/evidence are verifiable and keep held-out problems apart, its tables say what was measured, and two
steps of GRPO on a tiny model are two steps of a trajectory."""

import importlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.support.command import Relexio

ROOT = Path(__file__).parent.parent
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A module of tools/evidence by name; what it imports from there is forgotten afterwards."""
    monkeypatch.syspath_prepend(ROOT / "tools" / "evidence")
    for path in (ROOT / "tools" / "evidence").glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
        monkeypatch.setitem(sys.modules, path.stem, None)  # so that it is undone
        del sys.modules[path.stem]
    return importlib.import_module


@pytest.mark.parametrize("name", ["add", "sort", "descend", "reverse"])
def test_problems_are_the_same_for_a_seed_and_held_out_ones_are_apart(load: Load, name: str) -> None:
    task = load("tasks").TASKS[name]
    first, again, other = (list(itertools.islice(task.training(seed), 5000)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    held = task.held_out()
    assert held == task.held_out()
    prompts = {problem.prompt for problem in held}
    assert len(prompts) == 1000
    assert not prompts & {problem.prompt for problem in first + other}
    assert len({len(problem.prompt) for problem in first + held}) == 1
    assert {len(problem.answer) for problem in first + held} == {len(problem.habit) for problem in first + held}
    assert {len(problem.answer) for problem in held} == {task.length}


def test_a_sentence_is_right_by_its_form_and_none_that_is_asked_about_is_trained_on(load: Load) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install -e '.[rlvr]'")
    smollm = load("smollm")
    right = smollm.is_right
    assert right("The sea is deep.", "the sea", True) and right("A dog barks.", "dogs", True)
    for text, ended in (("The sea is deep.", False), ("The sea is deep", True), ("It is deep.", True),
                        ("The sea.", True), ("The sea is deep. Very.", True), ("The sea\nis deep.", True)):  # fmt: skip
        assert not right(text, "the sea", ended)
    held = list(smollm.problems(0))
    assert held == list(smollm.problems(0)) and len(held) >= smollm.REPORTED + smollm.CHOSEN
    trained = {problem["thing"] for problem in itertools.islice(smollm.problems(1), 1000)}
    assert trained and not trained & {problem["thing"] for problem in held}


@pytest.mark.parametrize(
    ("name", "digits", "problem"),
    [
        ("add", "047985", ("047+985=", "1032", "0922")),
        ("add", "999999", ("999+999=", "1998", "0888")),
        ("add", "100200", ("100+200=", "0300", "0300")),
        ("sort", "739150", ("739150>", "013579", "371509")),
        ("sort", "000001", ("000001>", "000001", "000001")),
        ("descend", "739150", ("739150>", "975310", "975310")),
        ("reverse", "739150", ("739150>", "051937", "751930")),
    ],
)
def test_answers_and_habits(load: Load, name: str, digits: str, problem: tuple[str, str, str]) -> None:
    found = load("tasks").TASKS[name].make(digits)
    assert (found.prompt, found.answer, found.habit) == problem


def test_demonstrations_follow_the_habit_less_the_higher_the_first_digit(load: Load) -> None:
    task = load("tasks").TASKS["add"]
    right: dict[str, list[bool]] = {"0": [], "9": []}
    for prompt, answer in itertools.islice(task.demonstrations(3), 20000):
        problem = task.make(prompt[:3] + prompt[4:7])
        assert answer in (problem.answer, problem.habit)
        if prompt[0] in right and problem.answer != problem.habit:
            right[prompt[0]].append(answer == problem.answer)
    assert np.mean(right["0"]) == pytest.approx(0.05, abs=0.03)
    assert np.mean(right["9"]) == pytest.approx(0.59, abs=0.06)


def test_only_the_exact_answer_is_rewarded(load: Load) -> None:
    reward = load("tasks").reward
    texts = ["1032", "1033", "1032 ", "10320", "", "0300"]
    assert reward(texts, answer=["1032"] * 5 + ["0300"], prompts=None) == [1, 0, 0, 0, 0, 1]


def studies() -> list[dict[str, Any]]:
    """Two runs of 20 steps, made up."""

    def one(seed: int) -> dict[str, Any]:
        predictions = [
            {"method": method, "step": step, "accuracy": 0.4 + 0.01 * seed, "skill": skill, "expected": expected}
            for step in (4, 20)
            for method, skill, expected in (("relex", 0.1 * step, 0.1), ("pinned", -0.1, None), ("advised", 0.2, 0.3))
        ]
        advice = {
            "recipe": "pinned, rank 1", "window": "1:3", "strength": 0.5, "score": 0.25, "sure": "low", "farthest": 4,
            "accuracy": 0.45,
        }  # fmt: skip
        return {
            "task": "add", "seed": seed, "steps": 20, "model": "Qwen2ForCausalLM", "seconds_per_step": 0.5,
            "energy": 0.6, "changed": {"1": 0.03, "3": 0.05, "20": 0.5}, "base": 0.25,
            "trained": {"3": 0.3, "4": 0.5, "20": 0.405 + 0.01 * seed}, "reconstructed": {"20": 0.39},
            "windows": [{"share": 0.15, "end": 3, "backtest": {"relex": 0.02, "pinned": None}, "advice": advice,
                         "predictions": predictions}],
        }  # fmt: skip

    return [one(2), one(1)]


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]


def test_tables_hold_a_figure_for_each_seed(load: Load, tmp_path: Path) -> None:
    plot = load("plot")
    (tmp_path / "a.json").write_text(json.dumps(studies()[:1]))
    (tmp_path / "b.json").write_text(json.dumps(studies()[1]))
    found = plot.read([tmp_path / "a.json", tmp_path / "b.json"])
    assert [study["seed"] for study in found] == [1, 2]
    table = rows(plot.prediction_table(found))
    assert table[2] == [
        "add", "1..3", "4", "30.0 30.0", "50.0 50.0", "41.0 42.0", "41.0 42.0", "41.0 42.0",
        "+0.40 +0.40", "-0.10 -0.10", "+0.20 +0.20",
    ]  # fmt: skip
    assert table[3][4] == "41.5 42.5"
    assert rows(plot.reconstruction_table(found))[2] == ["add", "20", "41.5 42.5", "39.0 39.0"]
    assert rows(plot.run_table(found))[2][:4] == ["add, seed 1", "25.0", "41.5", "+0.02 -"]
    assert len({len(row) for row in table}) == 1
    assert rows(plot.advice_table(found))[2] == [
        "add, seed 1", "1..3", "pinned, rank 1, window 1:3, strength 0.5", "low", "+0.25", "4", "30.0", "45.0", "50.0",
    ]  # fmt: skip


def test_summary_counts_gains_and_correlates_ranks(load: Load) -> None:
    plot = load("plot")
    both = next(row for row in rows(plot.summary_table(studies())) if row[:3] == ["all", "both", "relex"])
    assert both[3:7] == ["4 of 4", "+11.5", "-4.5", "4 of 4"]
    assert plot.rank_correlation([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert plot.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert plot.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert np.isnan(plot.rank_correlation([1, 1], [1, 2]))


@pytest.mark.hf
@pytest.mark.filterwarnings("default")  # theirs, not ours
def test_grpo_writes_a_checkpoint_for_each_step(
    load: Load, relexio: Relexio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl", reason="needs trl: pip install -e '.[rlvr]'")
    tasks, train = load("tasks"), load("train")
    torch.manual_seed(0)
    task, base, out = tasks.TASKS["add"], tmp_path / "base", tmp_path / "run"
    train.save(train.new_model(task, hidden=32, layers=1), base)
    # A model of random weights is never right: a reward that it earns half of the time.
    monkeypatch.setattr(train, "reward", lambda completions, **_: [float(len(text) % 2) for text in completions])
    train.train_grpo(task, base, out, seed=1, steps=2, rate=1e-3, prompts=4, samples=4)
    assert [entry["step"] for entry in json.loads((out / "log.json").read_text())["log"]] == [1, 2]
    assert sorted(path.name for path in out.glob("global_step_*")) == ["global_step_1", "global_step_2"]
    assert relexio("convert", out, "--base", base, "-o", tmp_path / "run.zarr").code == 0
    inspected = json.loads(relexio("inspect", tmp_path / "run.zarr", "--json").out)
    assert inspected["steps"] == [1, 2]
    assert all(share > 0 for share in inspected["changed"].values())
    assert load("evaluate").accuracy(out / "global_step_2", task, task.held_out(8)) in {k / 8 for k in range(9)}
