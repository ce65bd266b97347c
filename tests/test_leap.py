"""``leap``: what it goes on from is what scored best, no interruption changes that, and a broken command is told at once."""

import csv
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from relexio.errors import EvaluationError, MissingError, RequestError, TrainingError
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.sweep import SweepPlan, Watch
from relexio.sweep.leap import Leap, Request, leap
from relexio.sweep.leap.request import Files
from relexio.sweep.leap.table import Round, Setting, parse
from tests.support.command import Outcome, Relexio, snapshot
from tests.support.make import Run, make_run
from tests.support.steps import CPU, fit_run, predict_run
from tests.support.striking import before_changes
from tests.support.trainer import OPTIMUM, score

SMALL = {"model.embed_tokens.weight": (9, 7), "model.norm.weight": (12,)}
TRAINER = f"{shlex.quote(sys.executable)} {Path(__file__).parent}/support/trainer.py"
TRAIN, SCORE = f"{TRAINER} train {{base}} {{out}} {{steps}} 0.02", f"{TRAINER} score {{checkpoint}}"
LOSS = f'{SCORE} | sed \'s/-//; s/.*/{{"loss": &, "n": 3}}/\''
#: The score of a step, whatever its weights: best at 30.
NEAR_30 = "echo $((0 - ({step} - 30) * ({step} - 30))) {checkpoint} | cut -d ' ' -f 1"


class Silent:
    """Nothing is told."""

    def training(self, number: int, model: Path, log: Path) -> None: ...

    def searching(self, number: int, plan: SweepPlan) -> Watch:
        return lambda *_: None

    def ended(self, table: Leap) -> None: ...


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    top = tmp_path_factory.mktemp("it's a run")
    return make_run(top, np.dtype(np.float32), (10, 20, 30, 40), shapes=SMALL, noise=0.1)


def copying(run: Run) -> str:
    """A trainer that leaves step 10 of its round: one that was made before, so that a shell is enough."""
    return f"cp -r {shlex.quote(str(run.steps_path))}/global_step_{{round}}0 {{out}}/checkpoint-10 && : {{base}}"


def leapt(relexio: Relexio, run: Run, out: Path, *more: object) -> Outcome:
    given = [] if "--train" in more else ["--train", TRAIN]
    given += [] if "--eval" in more else ["--eval", SCORE]
    return relexio("leap", "--base", run.base_path, "-o", out, "--segment", 4, *given, *more)


def test_it_goes_on_from_the_best_of_the_line(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    out = tmp_path / "leap"
    done = leapt(relexio, run, out, "--segments", 2, "--test", SCORE)
    assert done.code == 0, done.err
    table = json.loads((out / "leap.json").read_text())
    assert table["base_score"] == score(run.base_path) and [one["last"] for one in table["rounds"]] == [4, 4]
    model = Files(out).model(2)
    assert (
        table["test"] == SCORE
        and table["tests"] == [score(run.base_path), score(model)]
        and score(model) == table["rounds"][-1]["score"]
    )
    second = table["rounds"][1]
    assert second["taken"] and second["best_score"] > second["trained_score"] > table["rounds"][0]["score"]
    store = open_store(out / "round-2" / "run.zarr")
    again = predict_run(fit_run(store, Recipe(method="scaled-last")), second["step"], tmp_path / "again")
    assert snapshot(again) == snapshot(model), "what relexio predict writes"
    far = sum(one["step"] for one in table["rounds"]) / 8
    assert table["far"] == far and f"a learning rate {far:.2g} times as large might do the same" in done.out
    rows = list(csv.DictReader((out / "leap.csv").read_text().splitlines()))
    assert [row["trained"] for row in rows] == ["0", "4", "8"] and float(rows[2]["score"]) == second["score"]
    assert "*" in done.out and max(map(len, done.out.split("\n\n")[0].splitlines())) <= 80
    assert sorted(path.name for path in out.iterdir()) == [
        "leap.csv",
        "leap.html",
        "leap.json",
        "logs",
        "round-1",
        "round-2",
    ]
    left = sorted(path.name for path in (out / "round-1").iterdir())
    assert left == ["run.zarr", "sweep", "train.log", "trained.json"] and not (out / "round-2" / "steps").exists()
    more = leapt(relexio, run, out, "--segments", 2, "--test", SCORE)
    assert more.err == "note: 2 rounds of 2 done already\n"
    assert more.out.replace("--segments 4", "") == done.out.replace("--segments 4", "")


def test_it_goes_on_from_training_where_nothing_is_better(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    """Also with a rate so large that every farther point is worse; the last checkpoint alone is enough."""
    train = f"{TRAINER} train {{base}} {{out}} {{steps}} 0.9 --last"
    done = leapt(relexio, run, tmp_path / "leap", "--segments", 1, "--train", train)
    assert done.code == 0 and "no leap was better" in done.err and "might do the same" not in done.out
    (only,) = json.loads((tmp_path / "leap" / "leap.json").read_text())["rounds"]
    assert not only["taken"] and only["leap"] == 1 and only["score"] == only["trained_score"]
    flat = np.concatenate([a.ravel() for a in run.base.values()]).astype("f8")
    assert abs(only["score"] + np.sqrt(np.mean((flat - OPTIMUM) ** 2)) * 0.1**4) < 1e-6
    assert score(Files(tmp_path / "leap").model(1)) == only["score"]


def test_a_gain_within_the_standard_error_is_none(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    """0.40 at what was trained, 0.42 ahead: of 100 problems that says nothing, of 10,000 it does."""
    scores = "if [ {step} = 10 ]; then echo 0.40; else echo 0.42; fi; : {checkpoint}"
    for problems, taken in ((100, False), (10_000, True)):
        out = tmp_path / str(problems)
        done = leapt(
            relexio, run, out, "--train", copying(run), "--eval", scores, "--segments", 1, "--problems", problems
        )
        assert done.code == 0, done.err
        (only,) = json.loads((out / "leap.json").read_text())["rounds"]
        assert only["taken"] is taken and only["error"] == pytest.approx(np.sqrt(0.42 * 0.58 / problems))


@pytest.mark.slow
def test_interrupted_before_any_change_of_its_files(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill would leave is copied before every rename and removal; the same leap goes on from each copy.

    Those within one trajectory or sweep are tests of their own.
    """
    out = tmp_path / "leap"

    def asked(top: Path) -> Request:
        return Request(run.base_path, copying(run), NEAR_30, top, steps=10, rounds=2, test=NEAR_30)

    left: dict[object, Path] = {}

    def copy() -> None:
        names = snapshot(out) if out.exists() else {}
        state = frozenset(name for name in names if "run.zarr" not in name and "sweep/" not in name)
        if state not in left:
            left[state] = tmp_path / f"left-{len(left)}"
            if out.exists():
                shutil.copytree(out, left[state])

    with monkeypatch.context() as watched:
        before_changes(watched, copy)
        found = leap(asked(out), CPU, silent, Silent(), pytest.fail)
    assert len(left) > 10 and [one.taken for one in found.rounds] == [True, True]
    wanted = snapshot(Files(out).model(2))
    for top in left.values():
        again = leap(asked(top), CPU, silent, Silent(), lambda _: None)
        assert [one.score for one in again.rounds] == [one.score for one in found.rounds]
        assert again.tests == found.tests and snapshot(Files(top).model(2)) == wanted
        names = {path.name for path in top.iterdir()}
        assert names == {"leap.csv", "leap.json", "logs", "round-1", "round-2"}
        assert not (top / "round-1" / "model").exists() and not (top / "round-2" / "steps").exists()


def test_broken_commands_are_told_in_the_first_round(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    out = tmp_path / "leap"
    done = leapt(relexio, run, out, "--eval", "echo oh no >&2; exit 3 {checkpoint}")
    assert (
        done.code == 1 and f"--eval fails on {run.base_path}: exit code 3 (oh no) (see {out}/logs/base.log)" in done.err
    )
    done = leapt(relexio, run, out, "--train", "echo no GPU >&2; exit 9 {base} {out}")
    assert done.code == 1 and "--train fails in round 1: exit code 9 (no GPU) (see" in done.err
    assert (out / "round-1" / "train.log").read_text() == "no GPU\n"
    done = leapt(relexio, run, out, "--train", "echo nothing to do {base} {out}")
    assert done.code == 1 and "--train left nothing to go on from in round 1" in done.err and "checkpoint-4" in done.err
    done = leapt(relexio, run, out, "--segments", 1)
    assert done.code == 0, "mended commands go on in the same directory"
    done = leapt(relexio, run, out, "--eval", f"{SCORE} 2")
    assert done.code == 1 and f"holds rounds of a leap with --eval '{SCORE}'; go on with that" in done.err
    assert leapt(relexio, run, tmp_path / "c", "--train", "python train.py").code == 1
    assert not (tmp_path / "c").exists()


def test_next_command_repeats_all_that_was_asked(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    """As it is printed, with a round more."""
    asked = (
        "--lower-is-better",
        "--metric",
        "loss",
        "--timeout",
        60,
        "--method",
        "secant",
        "--test",
        LOSS,
        "--eval",
        LOSS,
    )
    done = leapt(relexio, run, tmp_path / "leap", "--segments", 1, *asked)
    assert done.code == 0, done.err
    more = relexio(*shlex.split(done.out.splitlines()[-1])[1:])
    assert more.code == 0 and "round 2 of 2" in more.err, more.err
    table = json.loads((tmp_path / "leap" / "leap.json").read_text())
    assert [one["method"] for one in table["rounds"]] == ["secant"] * 2 and table["lower_is_better"]
    assert table["rounds"][1]["score"] < table["rounds"][0]["score"] < table["base_score"]
    five = ("--test", """echo '{"loss": 5}'; : {checkpoint}""")
    other = leapt(relexio, run, tmp_path / "leap", "--segments", 2, *asked, *five)
    assert other.code == 0 and "base 5, last model 5" in other.out, "another test is run"


def test_the_base_is_another_before_a_round_ended(run: Run, tmp_path: Path) -> None:
    """What was trained from the first base is not stored on the second."""
    request = Request(run.base_path, copying(run), NEAR_30, tmp_path / "leap", steps=10, rounds=1)
    broken = replace(request, command=f"[ {{step}} = 0 ] && {NEAR_30}")
    with pytest.raises(EvaluationError, match="--eval fails on step 10"):
        leap(broken, CPU, silent, Silent(), pytest.fail)
    other = run.steps_path / "global_step_40"
    leap(replace(request, base=other), CPU, silent, Silent(), pytest.fail)
    store = open_store(Files(request.out).store(1))
    assert Path(store.base().source) == other


@pytest.mark.parametrize("left", ["cut", "nan", "base"])
def test_training_that_left_nothing_usable_is_done_again(run: Run, tmp_path: Path, left: str) -> None:
    """A last checkpoint that is cut off, one that is not a number, the base itself: told, and trained anew."""
    broken = shutil.copytree(run.steps_path / "global_step_20", tmp_path / "broken")
    weights = broken / "model.safetensors"
    if left == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif left == "nan":
        weights.write_bytes(weights.read_bytes()[:-8] + np.full(2, np.nan, "<f4").tobytes())
    else:
        shutil.copy(run.base_path / "model.safetensors", weights)
    train = f"{copying(run)} && cp -r {shlex.quote(str(broken))} {{out}}/checkpoint-11"
    request = Request(run.base_path, train, NEAR_30, tmp_path / "leap", steps=10, rounds=1)
    if left == "base":
        notes: list[str] = []
        assert leap(request, CPU, silent, Silent(), notes.append).rounds[0].last == 10
        assert notes == ["step 11 is the model that it began from, bit for bit, and left out"]
        return
    with pytest.raises(TrainingError, match="left nothing to go on from in round 1"):
        leap(request, CPU, silent, Silent(), pytest.fail)
    mended = replace(request, train=copying(run))
    assert leap(mended, CPU, silent, Silent(), pytest.fail).rounds[0].taken


def test_a_model_that_has_gone_is_made_again_by_the_command_that_is_named(
    run: Run, tmp_path: Path, relexio: Relexio
) -> None:
    out = tmp_path / "leap"
    request = Request(run.base_path, copying(run), NEAR_30, out, steps=10, rounds=1)
    leap(request, CPU, silent, Silent(), pytest.fail)
    wanted = snapshot(Files(out).model(1))
    shutil.rmtree(Files(out).model(1))
    with pytest.raises(MissingError, match="make it again: relexio predict") as error:
        leap(replace(request, rounds=2), CPU, silent, Silent(), pytest.fail)
    assert relexio(*shlex.split(str(error.value).partition("again: ")[2])[1:]).code == 0
    assert snapshot(Files(out).model(1)) == wanted


def test_one_failed_evaluation_is_tried_once_more(run: Run, tmp_path: Path) -> None:
    """The first candidate fails the first time."""
    flag = shlex.quote(str(tmp_path / "once"))
    once = f"[ {{step}} != 15 ] || [ -e {flag} ] || {{ touch {flag}; exit 1; }}"
    request = Request(run.base_path, copying(run), f"{once}; {NEAR_30}", tmp_path / "leap", steps=10, rounds=1)
    (only,) = leap(request, CPU, silent, Silent(), pytest.fail).rounds
    assert only.failed == 0 and only.step is not None and 25 <= only.step <= 35


@pytest.mark.parametrize("field", ["--train", "--eval"])
def test_a_command_without_its_fields_is_refused(run: Run, tmp_path: Path, field: str) -> None:
    commands = {"--train": copying(run), "--eval": NEAR_30, field: "true"}
    with pytest.raises(RequestError, match=f"{field}: must contain"):
        Request(run.base_path, commands["--train"], commands["--eval"], tmp_path)


@pytest.mark.parametrize("method", ["mean", "mix", "reconstruct", "rre", "nothing"])
def test_methods_that_go_no_farther_are_refused(run: Run, tmp_path: Path, method: str) -> None:
    with pytest.raises(RequestError, match="needs one that goes farther: relex, pinned, "):
        Request(run.base_path, copying(run), NEAR_30, tmp_path, method=method)


def test_an_evaluation_that_fails_later_is_tried_again(run: Run, tmp_path: Path) -> None:
    """It fails on what round 1 has trained; nothing is trained again when the command works."""
    flag = tmp_path / "works"
    command = f"if [ {{step}} = 0 -o -e {shlex.quote(str(flag))} ]; then {NEAR_30}; else exit 1; fi"
    request = Request(run.base_path, copying(run), command, tmp_path / "leap", steps=10, rounds=1)
    with pytest.raises(EvaluationError, match="--eval fails on step 10"):
        leap(request, CPU, silent, Silent(), pytest.fail)
    before = Files(request.out).trained(1).stat().st_mtime_ns
    flag.touch()
    assert leap(request, CPU, silent, Silent(), pytest.fail).rounds[0].taken
    assert Files(request.out).trained(1).stat().st_mtime_ns == before


def test_training_is_begun_anew_where_it_was_cut_off(run: Run, tmp_path: Path) -> None:
    """A trainer that leaves a step and fails; then one that would fail if anything were in its directory."""
    request = Request(run.base_path, f"{copying(run)} && exit 5", NEAR_30, tmp_path / "leap", steps=10, rounds=1)
    with pytest.raises(TrainingError, match="exit code 5"):
        leap(request, CPU, silent, Silent(), pytest.fail)
    mended = Request(run.base_path, copying(run), NEAR_30, tmp_path / "leap", steps=10, rounds=1)
    assert leap(mended, CPU, silent, Silent(), pytest.fail).rounds[0].last == 10


def test_the_table_reads_what_it_wrote_and_nothing_else() -> None:
    taken = Round("secant", "train", 10, 10, 0.5, 30, 0.7, None, True, 5, 0, 1.5, 2.0, 4.0)
    not_taken = replace(taken, trained_score=0.6, step=None, best_score=None, taken=False)
    table = Leap(Setting("/base", "eval", None, False), 0.4, (taken, not_taken), "test", (0.3, 0.6))
    assert parse(json.dumps(table.to_json()).encode(), "leap.json") == table
    assert table.far == 2.0 and table.score == 0.6 and table.trained == 20
    changes: tuple[dict[str, object], ...] = (
        {"format": 2},
        {"rounds": [{}]},
        {"base_score": "x"},
        {"tests": [1]},
        {"eval": None},
    )
    for change in changes:
        with pytest.raises(RequestError, match=r"leap\.json: not a table that a leap wrote"):
            parse(json.dumps({**table.to_json(), **change}).encode(), "leap.json")
