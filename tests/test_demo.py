"""The demo: its model agrees with transformers, its commands do what they say, and it says what it found."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relexio.cli import demo as command
from relexio.errors import CheckpointError
from relexio.methods import METHODS, Recipe
from relexio.methods.verdict import Outlook
from relexio.progress import silent
from relexio.verbs import backtest
from relexio.verbs.demo import run as demo
from relexio.verbs.demo.accuracy import accuracy
from relexio.verbs.demo.data import TARGET, Run, unpack
from relexio.verbs.demo.model import load, logits
from relexio.verbs.demo.run import Measured, Outcome
from relexio.verbs.demo.words import bars, head, sentences
from tests.support.command import Relexio, in_process, snapshot

#: The command line where neither torch nor what draws a report can be imported.
BARE = """import sys
for name in ("torch", "transformers", "altair"): sys.modules[name] = None
from relexio.cli.main import main
main(sys.argv[1:])"""
ONE = 0.0015  # of a thousand problems one may be a tie that another library of linear algebra decides otherwise


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return unpack(tmp_path_factory.mktemp("data") / "demo")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Outcome]:
    """Where the demo has run, what it said, and what it found."""
    said: list[str] = []
    directory = tmp_path_factory.mktemp("done") / "demo"
    return directory, said, demo.run(directory, silent, said.append)


def test_accuracies(done: tuple[Path, list[str], Outcome]) -> None:
    """As transformers measures those that were trained, in float32; and predictions are between them."""
    found = done[2].measured
    base, last, *predicted, trained = (one.accuracy for one in found)
    assert [base, last, trained] == pytest.approx([0.276, 0.360, 0.536], abs=ONE)
    paper = next(one for one in found if one.recipe == Recipe())
    assert (paper.step, paper.untested) == (TARGET, True)
    assert base < last < paper.accuracy, "the prediction is better than all that it was made from"
    assert trained - paper.accuracy < 0.1
    advised = [one for one in found if one.advised]
    assert [one.step for one in advised] == [75, TARGET] and [one.untested for one in advised] == [False, True]
    assert len(predicted) == 3


def test_its_commands_do_the_same(
    done: tuple[Path, list[str], Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relexio: Relexio
) -> None:
    directory, said, _ = done
    for name in ("base", "checkpoints"):
        shutil.copytree(directory / name, tmp_path / "demo" / name)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line.replace(str(directory), "demo")) for line in said if line.startswith("$ ")]
    assert [words[2] for words in commands] == ["convert", "backtest", "predict", "predict", "convert"]
    for words in commands:
        ended = relexio(*words[2:])
        assert ended.code == 0, ended.err
    written = sorted(path.name for path in directory.glob("*-[0-9]*"))
    assert written == ["predicted-200", "recommended-200", "recommended-75"]
    for name in written:
        assert snapshot(tmp_path / "demo" / name) == snapshot(directory / name)


def test_the_command_needs_neither_torch_nor_the_report(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", BARE, "demo", "-o", "demo"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("$ "))
    shown = [line for line in lines if re.search(r"\d %  #+$", line)]
    assert len(shown) == 6 and sum("untested" in line for line in shown) == 2
    assert "no test covers it" in ended.stdout and "Use pinned, rank 1, strength 0.5" in ended.stdout
    assert "pip install 'relexio[report]'" in " ".join(lines) and not list(tmp_path.rglob("*.html"))
    assert [line.split()[2] for line in lines if line.startswith("$ relexio")][-4:] == [
        "convert",
        "backtest",
        "predict",
        "sweep",
    ]
    again = in_process("demo", "-o", tmp_path / "demo")
    assert again.code == 1 and "exists" in again.err


def test_the_report_is_written_where_it_can_be_drawn(
    done: tuple[Path, list[str], Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "a report.html"
    command._report(done[2], page)
    assert page.read_text().startswith("<!DOCTYPE html>")
    line = capsys.readouterr().out.splitlines()[1]
    assert shlex.split(line.removeprefix("$ "))[-2:] == ["-o", str(page)]


def test_what_is_not_recommended_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, said = backtest.judge, list[str]()
    monkeypatch.setattr(demo, "judge", lambda *given: replace(judge(*given), verdict=None))
    monkeypatch.setattr(demo, "accuracy", lambda path, problems: 0.5)
    found = demo.run(tmp_path / "demo", silent, said.append)
    assert [(one.step, one.recipe) for one in found.measured] == [(0, None), (50, None), (200, Recipe()), (200, None)]
    assert any("nothing is recommended" in line for line in said)
    assert not any("--method pinned" in line for line in said)


def outlook(step: int, farthest: int) -> Outlook:
    return Outlook(step, step / 50, step - 50, None if step > farthest else 0.1, 0, 0, farthest)


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    shares = st.floats(0, 1)
    steps = st.integers(51, 10**6)
    predicted = draw(
        st.lists(st.tuples(steps, shares, st.sampled_from(sorted(METHODS)), st.booleans(), steps), max_size=4)
    )
    measured = [
        Measured(step, share, Recipe(name), advised, outlook(step, farthest), share)
        for step, share, name, advised, farthest in predicted
    ]
    trained = [Measured(step, draw(shares)) for step in (0, 50, draw(steps))]
    return Outcome(None, (5, 50), draw(st.integers(10, 10**5)), (*trained[:2], *measured, trained[2]))  # type: ignore[arg-type]


@given(outcomes())
def test_bars(outcome: Outcome) -> None:
    lines = bars(outcome)
    assert len(lines) == len(outcome.measured) and len(head(outcome)) <= 80
    assert all(len(line) <= 80 and line.isascii() for line in lines)
    best = max(one.accuracy for one in outcome.measured)
    longest = max(line.count("#") for line in lines)
    assert longest >= 10 if best else longest == 0
    for one, line in zip(outcome.measured, lines, strict=True):
        assert f" {100 * one.accuracy:.1f} %" in line
        assert abs(line.count("#") * best - longest * one.accuracy) <= 0.51 * best
        assert ("untested" in line) == (
            one.recipe is not None and one.outlook is not None and one.outlook.skill is None
        )


def test_what_is_seen() -> None:
    pinned = Recipe("pinned", strength=0.5)
    measured = (
        Measured(0, 0.25),
        Measured(50, 0.4),
        Measured(75, 0.5, pinned, True, outlook(75, 75)),
        Measured(200, 0.35, pinned, True, outlook(200, 75), 0.4),
        Measured(200, 0.45, Recipe(), False, outlook(200, 75), -0.1),
        Measured(200, 0.6),
    )
    outcome = Outcome(None, (5, 50), 400, measured)  # type: ignore[arg-type]
    assert head(outcome) == "Right answers to 400 held-out problems (standard error: at most 2.5 points)"
    assert sentences(outcome) == [
        "Training from step 50 to step 200: +20.0 points; predicted from the steps up to 50, without training: "
        "step 75, pinned, recommended: +10.0 points (step 75 as trained does not come with relexio); "
        "step 200, same recipe, untested: -5.0 points; "
        "step 200, relex (the paper), untested: +5.0 points (25 % of what training gained).",
        "Skill in weights, now that step 200 is known: step 200, same recipe: +0.40; "
        "step 200, relex (the paper): -0.10.",
        "Step 200, 4.0 times the last known step, is farther ahead than any held-out step: no test covers it.",
    ]
    worse = replace(outcome, measured=(*measured[:-1], Measured(200, 0.4)))
    assert "% of what" not in " ".join(sentences(worse))


def test_an_answer_counts_if_it_is_exact_and_ends(data: Run) -> None:
    """By hand: the likeliest next token, one at a time. Answers of the model itself are right, and no part of one is."""
    model = load(data.base)
    characters = {token: character for character, token in model.vocabulary.items()}
    answered = []
    for prompt, _ in data.problems[:20]:
        tokens = [model.vocabulary[character] for character in prompt]
        while tokens[-1] != model.end:
            tokens.append(int(logits(model, np.array([tokens]))[0, -1].argmax()))
        answered.append((prompt, "".join(characters[token] for token in tokens[len(prompt) : -1])))
    assert accuracy(data.base, answered) == 1
    assert accuracy(data.base, [(prompt, answer[:-1]) for prompt, answer in answered]) == 0
    assert accuracy(data.base, [(prompt, answer + "0") for prompt, answer in answered]) == 0
    mixed = [(prompt, answer[: len(answer) - i % 2]) for i, (prompt, answer) in enumerate(answered)]
    assert accuracy(data.base, mixed) == 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"tie_word_embeddings": False},
        {"use_sliding_window": True},
        {"rope_parameters": {"rope_type": "linear"}},
    ],
)
def test_other_models_are_refused(data: Run, tmp_path: Path, change: dict[str, object]) -> None:
    shutil.copytree(data.base, tmp_path / "other")
    config = json.loads((data.base / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match="other: "):
        accuracy(tmp_path / "other", data.problems)
