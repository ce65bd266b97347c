"""``sweep``: scores are those of the checkpoints, the best one is kept, and no evaluation or kill can spoil that."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from relexio import atomic
from relexio.cli.main import relexio_command
from relexio.errors import EvaluationError
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.store.store import Store
from relexio.sweep import Candidate, Evaluation, Request, Sweep, prepare, sweep
from relexio.sweep.candidates import filled
from relexio.sweep.command import run as run_command
from relexio.sweep.curve import curve
from relexio.sweep.files import Files
from relexio.sweep.score import read_score
from relexio.sweep.table import Setting
from tests.support.command import Outcome, Relexio, snapshot
from tests.support.make import Run, make_run
from tests.support.scoring import score
from tests.support.steps import CPU, fit_run, predict_run, store_run
from tests.support.striking import before_changes

ROOT = Path(__file__).parents[1]
PYTHON = shlex.quote(sys.executable)
SMALL = {"model.embed_tokens.weight": (9, 7), "model.norm.weight": (12,)}
NUMBER_OF_STEP = "echo $RELEXIO_STEP {checkpoint} | cut -d ' ' -f 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(
        tmp_path_factory.mktemp("a run"), np.dtype(np.float32), (10, 20, 30, 40, 60), shapes=SMALL, noise=0.1
    )


@pytest.fixture(scope="module")
def store(run: Run) -> Store:
    made = store_run(run, run.root / "it's a run.zarr")
    fit_run(made)
    return made


def swept(relexio: Relexio, store: Store, out: Path, command: str, *more: object) -> Outcome:
    methods = () if "--methods" in more else ("--methods", "relex")
    return relexio("sweep", store.address, "--window", "10:40", "-o", out, "--eval", command, *methods, *more)


def table(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((out / "results.json").read_text())["results"]}


def scores(out: Path) -> dict[str, object]:
    return {name: row["score"] for name, row in table(out).items()}


def test_scores_are_those_of_the_checkpoints(run: Run, store: Store, tmp_path: Path, relexio: Relexio) -> None:
    sums = [float(sum(a.astype(float).sum() for a in run.steps[step].values())) for step in (40, 60)]
    wanted = repr(sums[0] + 2.2 * (sums[1] - sums[0]))
    command = f"{PYTHON} {ROOT}/tests/support/scoring.py {{checkpoint}} {wanted}"
    asked = ("--steps", "50:90:40,60", "--strengths", "0.5,1", "--methods", "relex,pinned", "--rank", 2)
    done = swept(relexio, store, tmp_path / "out", command, *asked)
    assert done.code == 0, done.err
    truth = {
        "base": score(run.base_path, float(wanted)),
        "observed-step-40": score(run.steps_path / "global_step_40", float(wanted)),
        "observed-step-60": score(run.steps_path / "global_step_60", float(wanted)),
    }
    for method in ("relex", "pinned"):
        for strength, name in ((0.5, "0.5"), (1.0, "1")):
            fitted = fit_run(store, Recipe(method=method, rank=2, strength=strength), "10:40")
            for step in (50, 60, 90):
                out = predict_run(fitted, step, tmp_path / f"{method}-step-{step}-strength-{name}-rank-2")
                truth[out.name] = score(out, float(wanted))
    assert scores(tmp_path / "out") == truth
    best = max((name for name in truth if "strength" in name), key=lambda name: truth[name])
    facts = json.loads((tmp_path / "out" / "results.json").read_text())
    assert facts["best"] == best and facts["last_observed"] == truth["observed-step-40"]
    assert snapshot(tmp_path / "out" / "best") == snapshot(tmp_path / best)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["best", "logs", "results.csv", "results.json"]
    assert "loading" in (tmp_path / "out" / "logs" / f"{best}.log").read_text()
    gain = truth[best] - truth["observed-step-40"]
    assert gain > 0 and f"+{gain:.4g} over the last observed checkpoint (step 40" in done.out
    lines = [re.sub(r", [\d:]+ left$", "", line) for line in done.err.splitlines()]
    assert len(lines) == 15 and lines[0] == f"[1/15] base: {truth['base']:.4g}"
    assert all(line.endswith(" left") for line in done.err.splitlines()[:-1])
    last = f"(last observed {truth['observed-step-40']:.4g})"
    assert (
        lines[-1]
        == f"[15/15] pinned, rank 2, strength 1, step 90: {truth['pinned-step-90-strength-1-rank-2']:.4g} {last}"
    )
    assert "the best of 12 predictions" in done.out and "looks better than it is" in done.out
    shown = done.out[: done.out.index("\n\n")].splitlines()
    assert len(shown) == 17 and max(map(len, shown)) <= 80 and sum("*" in line for line in shown[1:-1]) == 1
    check_csv(tmp_path / "out")
    again = swept(relexio, store, tmp_path / "out", command, *asked)
    assert again.out == done.out and again.err == "note: 15 of 15 evaluations are done already\n"


def check_csv(out: Path) -> None:
    """The CSV holds what the JSON does."""
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    told = json.loads((out / "results.json").read_text())["results"]
    assert len(rows) == len(told)
    for row, want in zip(rows, told, strict=True):
        for key, text in row.items():
            value = want[key]
            assert text == ("" if value is None else str(value).lower() if type(value) is bool else str(value)), key


@pytest.mark.parametrize(
    ("line", "metric", "score"),
    [
        ("0.5", None, 0.5),
        (" -1e-3 ", None, -1e-3),
        ("+.5", None, 0.5),
        ("7", None, 7.0),
        ('{"acc": 0.25}', None, 0.25),
        ('{"model": "x", "ok": true, "deep": {"acc": 1}}', None, 1.0),
        ('{"gsm8k": {"exact_match,strict-match": 0.5, "n": 3}}', "gsm8k.exact_match,strict-match", 0.5),
        ('{"a.b": {"c": 2}, "a": {"d": 3}}', "a.b.c", 2.0),
        ("[[1, 2], 3]", "0.1", 2.0),
    ],
)
def test_the_score_in_a_line(line: str, metric: str | None, score: float) -> None:
    assert read_score(line, metric) == score


@pytest.mark.parametrize(
    ("line", "metric", "said"),
    [
        ("", None, "printed nothing"),
        ("done.", None, "neither a number nor JSON: 'done.'"),
        ("51.2%", None, "neither a number"),
        ("1_000", None, "neither a number"),
        ("nan", None, "not a finite number"),
        ("-Infinity", None, "not a finite number"),
        ('{"acc": NaN}', None, "not a finite number"),
        ('{"acc": 1e999}', "acc", "not a finite number"),
        ("1" * 400, None, "not a finite number"),
        ("[" + "1" * 400 + "]", None, "not a finite number"),
        ("true", None, "no number at all"),
        ('{"a": 1, "b": 2}', None, r"2 numbers \(a, b\) in the last line; choose one with --metric"),
        ('{"a": 1}', "b", r"--metric b: no number of that name in the last line; it has 1 number \(a\)"),
        ("0.5", "acc", "a number alone"),
        ("[" * 100_000, None, "neither a number"),
    ],
)
def test_lines_that_hold_no_score(line: str, metric: str | None, said: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        read_score(line, metric)


@pytest.mark.parametrize("path", ["/plain", "/two words", '/it\'s $HOME `id` "x"'])
def test_the_shell_gets_the_directory_as_one_word(path: str) -> None:
    command = filled("printf '%s|' a{checkpoint} {step} ${step} {other}", checkpoint=Path(path), step=7)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env={"step": "s"})
    assert done.stdout == f"a{path}|7|s|{{other}}|"


BROKEN = """case $RELEXIO_METHOD-$RELEXIO_STEP in
  relex-50) echo "$RELEXIO_STRENGTH" {checkpoint} >&2; exit 3;;
  relex-60) echo nan;;
  relex-70) (trap '' TERM; sleep 60) & echo $! > "$PIDS"; echo waiting; wait;;
  relex-80) sleep 60 & echo $! > "$PIDS-2"; echo 5;;
  relex-90) kill -9 $$;;
  base-*) echo '{"acc": 1}';;
  *) echo '{"acc": 1, "n": 7}';;
esac"""


def runs(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.slow
def test_evaluations_that_fail_or_hang_do_not_end_it(
    store: Store, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relexio.sweep.command.GRACE", 0.2)
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    out = tmp_path / "out"
    done = swept(relexio, store, out, BROKEN, "--steps", "50:90:10", "--timeout", 8)
    assert done.code == 0, done.err
    found = {name: (row["score"], row["failed"]) for name, row in table(out).items()}
    many = "2 numbers (acc, n) in the last line; choose one with --metric"
    assert found == {
        "base": (1.0, None),
        "observed-step-40": (None, many),
        "observed-step-60": (None, many),
        "relex-step-50-strength-1": (None, "exit code 3"),
        "relex-step-60-strength-1": (None, "not a finite number: 'nan' is nan"),
        "relex-step-70-strength-1": (None, "no score within 8 seconds"),
        "relex-step-80-strength-1": (5.0, None),
        "relex-step-90-strength-1": (None, "exit code -9 (SIGKILL)"),
    }
    assert table(out)["relex-step-50-strength-1"]["tail"].startswith("1.0 /")
    assert "not known: step 40, the last observed, has no score" in done.out
    assert "failed: exit code 3: 1.0 /" in done.err and str(out / "logs/relex-step-50-strength-1.log") in done.err
    assert not any(runs(int((tmp_path / name).read_text())) for name in ("pids", "pids-2"))
    check_csv(out)
    # the lines that were printed are kept: another metric is read off them
    more = swept(relexio, store, out, BROKEN, "--steps", "50:90:10", "--timeout", 8, "--metric", "acc", "--json")
    assert "note: 3 of 8 evaluations are done already; 5 failed before and will be tried again" in more.err
    assert json.loads(more.out)["results"][0]["score"] == 1.0 and more.code == 1
    assert "error: none of 5 predictions has a score; relex, strength 1, step 90: exit code" in more.err


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        ("(yes | tr -d y) & echo 5", 0, "5"),
        ("exec >&-; sleep 0.1; exit 4", 4, ""),
        ("exec >&-; sleep 60", None, ""),
        (r"printf 'loading\r 50%%\r0.25\n \n'", 0, "0.25"),
        (r"printf '\377\n7'", 0, "7"),
        ("read line; echo $?", 0, "1"),
        ("yes | head -c 3000000; echo 8", 0, "8"),
        ("echo 9; echo more >&2", 0, "9"),
    ],
)
def test_how_a_command_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int | None, line: str
) -> None:
    monkeypatch.setattr("relexio.sweep.command.GRACE", 0.1)
    ended = run_command(command, {}, tmp_path / "log", 300 if code is not None else 1)
    assert (ended.code, ended.line) == (code, line)


def test_no_score_at_all_is_one_error(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    broken = "test $RELEXIO_METHOD != relex && echo 1 {checkpoint} | cut -c 1 || no-such-program"
    done = swept(relexio, store, tmp_path / "out", broken, "--steps", "50,60")
    assert done.code == 1 and done.out == ""
    assert "failed: exit code 127: " in done.err and "not found" in done.err
    assert done.err.splitlines()[-1].startswith("error: none of 2 predictions has a score; relex, strength 1, step 60")
    assert not (tmp_path / "out" / "best").exists()


def test_a_command_that_fails_on_base_and_last_step_is_not_run_again(
    store: Store, tmp_path: Path, relexio: Relexio
) -> None:
    for steps in ((), ("--steps", "50,60")):
        done = swept(relexio, store, tmp_path / "out", "no-such-program {checkpoint}", *steps)
        assert done.code == 1 and list(table(tmp_path / "out")) == ["base", "observed-step-40"]
        error = done.err.splitlines()[-1]
        assert error.startswith("error: --eval fails on the base and on step 40, the last observed: exit code 127")
    # nothing is lost, so the command may be mended in place
    mended = swept(relexio, store, tmp_path / "out", NUMBER_OF_STEP, "--steps", "50,60")
    assert mended.code == 0 and scores(tmp_path / "out")["relex-step-60-strength-1"] == 60.0
    assert json.loads((tmp_path / "out" / "best" / "relexio.json").read_text())["step"] == 60


COUNTED = 'echo $RELEXIO_STEP {checkpoint} >> "$SEEN"; test $RELEXIO_STEP != 60 -o -e "$SEEN.ok" && echo $RELEXIO_STEP'


def test_it_goes_on_with_what_has_no_score(
    store: Store, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, out = tmp_path / "seen", tmp_path / "out"
    monkeypatch.setenv("SEEN", str(seen))

    def evaluated() -> list[int]:
        steps = [int(line.split()[0]) for line in seen.read_text().splitlines()]
        seen.unlink()
        return steps

    assert swept(relexio, store, out, COUNTED, "--steps", "50,60").code == 0
    assert evaluated() == [0, 40, 60, 50, 60]
    (tmp_path / "seen.ok").touch()
    again = swept(relexio, store, out, COUNTED, "--steps", "50,60")
    assert again.code == 0 and evaluated() == [60, 60] and "2 failed before" in again.err
    assert json.loads((out / "best" / "relexio.json").read_text())["step"] == 60
    # more may be asked for, in the same table; and the direction may be turned without evaluating again
    assert swept(relexio, store, out, COUNTED, "--steps", "70", "--strengths", "1,2").code == 0
    assert evaluated() == [70, 70] and json.loads((out / "best" / "relexio.json").read_text())["strength"] == 1.0
    turned = swept(relexio, store, out, COUNTED, "--steps", "50", "--lower-is-better")
    assert not seen.exists() and json.loads((out / "best" / "relexio.json").read_text())["step"] == 50
    assert "none: no prediction beats the last observed checkpoint (step 40: 40)" in turned.out
    assert len(json.loads((out / "results.json").read_text())["results"]) == 7
    # a best checkpoint that is gone is made again
    atomic.remove_tree(out / "best")
    assert swept(relexio, store, out, COUNTED, "--steps", "50", "--lower-is-better").code == 0
    assert json.loads((out / "best" / "relexio.json").read_text())["step"] == 50 and not seen.exists()


def test_scores_of_another_sweep_are_not_mixed_in(run: Run, store: Store, tmp_path: Path, relexio: Relexio) -> None:
    out = tmp_path / "out"
    assert swept(relexio, store, out, NUMBER_OF_STEP, "--steps", "50").code == 0
    before = snapshot(out)
    other = make_run(tmp_path / "other", np.dtype(np.float32), (10, 20, 30, 40, 60), shapes=SMALL, seed=5)
    for store_, command, more, said in (
        (store, NUMBER_OF_STEP + " ", (), "--eval"),
        (store, NUMBER_OF_STEP, ("--window", "10:30"), "a window of 4 steps, 10 to 40"),
        (store_run(other, tmp_path / "other.zarr"), NUMBER_OF_STEP, (), "other checkpoints"),
    ):
        done = swept(relexio, store_, out, command, "--steps", "50", *more)
        assert done.code == 1 and done.err.count("\n") == 1
        assert f"holds scores of a sweep with {said}" in done.err and f"such as -o {out}-" in done.err
    assert snapshot(out) == before


HANGING = f'echo $$ > "$SEEN"; : > "$SEEN.$RELEXIO_STEP"; test -e "$SEEN.ok" -o $RELEXIO_STEP != 70 || sleep 60; {NUMBER_OF_STEP}'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_while_it_evaluates(
    store: Store, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    out, seen = tmp_path / "out", tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    command = [
        "sweep",
        store.address,
        "--window",
        "10:40",
        "-o",
        out,
        "--eval",
        HANGING,
        "--steps",
        "60:80:10",
        "--methods",
        "relex",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "relexio", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not Path(f"{seen}.70").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    group = int(seen.read_text())
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL and (out / "candidates").exists()
        os.killpg(group, signal.SIGKILL)
    else:
        assert process.returncode == 128 + number and "run the same command again" in err and "Traceback" not in err
        while runs(group):  # it was killed; on a busy machine it takes a moment to go
            time.sleep(0.05)
        assert not (out / "candidates").exists()
    held = scores(out)
    assert held == {"base": 0.0, "observed-step-40": 40.0, "observed-step-60": 60.0, "relex-step-60-strength-1": 60.0}
    (tmp_path / "seen.ok").touch()
    done = relexio(*command)
    assert done.code == 0 and "note: 4 of 6 evaluations are done already\n" in done.err
    assert json.loads((out / "best" / "relexio.json").read_text())["step"] == 80
    assert sorted(p.name for p in out.iterdir()) == ["best", "logs", "results.csv", "results.json"]


@pytest.mark.slow
def test_killed_before_any_change_of_its_files(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill would leave is copied before every rename, write and removal; the same sweep goes on from each copy."""
    request = Request((10, 20, 30, 40), NUMBER_OF_STEP, tmp_path / "out", (50, 70), methods=("relex",))
    left: dict[object, Path] = {}

    def copy() -> None:
        state = tuple(snapshot(request.out).items())
        begun = any("relex" in name or "best" in name for name, _ in state)
        if begun is bool(left) and state not in left:  # the first of all, then from the first prediction on
            left[state] = Path(shutil.copytree(request.out, tmp_path / f"left-{len(left)}"))

    with monkeypatch.context() as watched:
        before_changes(watched, copy, "write_text")
        sweep(prepare(store, request, CPU, silent), silent, lambda *_: None, pytest.fail)
    want, names = snapshot(request.out / "best"), ["best", "logs", "results.csv", "results.json"]
    assert len(left) > 10 and json.loads(want["relexio.json"])["step"] == 70
    held = False
    for out in left.values():
        bests = [path for path in (out / "best", out / "best.relexio-partial") if path.exists()]
        assert all(sorted(p.name for p in best.iterdir()) == sorted(want) for best in bests)
        assert bests or not held, "the old one stays until the new one is in its place"
        held = bool(bests)
        evaluated: list[Candidate] = []
        before = set(scores(out)) if (out / "results.json").exists() else set()

        def watch(candidate: Candidate, result: Evaluation | None, known: Sweep) -> None:
            if result is not None:
                evaluated.append(candidate)  # noqa: B023  called right below

        sweep(prepare(store, replace(request, out=out), CPU, silent), silent, watch, pytest.fail)
        assert snapshot(out / "best") == want and sorted(p.name for p in out.iterdir()) == names
        assert {candidate.name for candidate in evaluated} == set(scores(out)) - before and len(scores(out)) == 4


def test_two_checkpoints_have_room_or_nothing_is_begun(
    store: Store, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = (NUMBER_OF_STEP, "--steps", "50,60,70")
    monkeypatch.setattr("relexio.sweep.plan._CARD", 3000)  # or it would hide the size of these tiny checkpoints
    small = swept(relexio, store, out, *asked, "--disk", "5kB")
    assert small.code == 1 and "--disk 5 kB is too small: " in small.err and not out.exists()
    (least,) = re.findall(r"give --disk (\d+) or more", small.err)
    assert swept(relexio, store, out, *asked, "--disk", int(least) - 1).code == 1
    with monkeypatch.context() as full_disk:
        full_disk.setattr(atomic, "free_bytes", lambda path: int(least) - 1)
        full = swept(relexio, store, out, *asked)
    assert full.code == 1 and "free space" in full.err and not out.exists()
    most = []

    def watch(candidate: Candidate, result: Evaluation | None, known: Sweep) -> None:
        most.append(atomic.tree_bytes(out / "candidates") + atomic.tree_bytes(out / "best"))

    real = Files.take

    def take(files: Files, checkpoint: Path) -> None:
        most.append(atomic.tree_bytes(out / "candidates") + atomic.tree_bytes(out / "best"))
        real(files, checkpoint)

    monkeypatch.setattr(Files, "take", take)
    request = Request((10, 20, 30, 40), NUMBER_OF_STEP, out, (50, 60, 70), methods=("relex",), disk=int(least))
    sweep(prepare(store, request, CPU, silent), silent, watch, pytest.fail)
    assert 0.5 * int(least) < max(most) <= int(least)
    # as it may be after a kill: a checkpoint that is not the best one, which is predicted again
    shutil.copytree(out / "best", out / "candidates" / "relex-step-60-strength-1")
    most.clear()
    sweep(prepare(store, replace(request, lower_is_better=True), CPU, silent), silent, watch, pytest.fail)
    assert json.loads((out / "best" / "relexio.json").read_text())["step"] == 50
    shutil.copytree(out / "best", out / "candidates" / "relex-step-60-strength-1")
    sweep(prepare(store, request, CPU, silent), silent, watch, pytest.fail)
    assert json.loads((out / "best" / "relexio.json").read_text())["step"] == 70
    assert 0 < max(most) < 2.1 * atomic.tree_bytes(out / "best")


def test_what_is_refused_before_anything_is_run(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    out, eval_ = tmp_path / "out", NUMBER_OF_STEP
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.safetensors").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"format": 2, "results": []}')
    for command, more, code, said in (
        (eval_, ("--steps", "30,50"), 1, "--step 30 is not beyond the window, which ends at step 40"),
        ("python my_eval.py", ("--steps", "50"), 1, "must contain {checkpoint}"),
        ("python my_eval.py ${checkpoint}", ("--steps", "50"), 1, "must contain {checkpoint}"),
        (eval_, ("--steps", "50", "--methods", "relex,magic"), 1, "unknown method 'magic'"),
        (eval_, ("--steps", "50", "--strengths", "nan"), 1, "--strength nan"),
        (eval_, ("--steps", "50", "--methods", ","), 1, "nothing to predict"),
        (eval_, ("--methods", "auto", "--rank", 2), 2, "--rank goes with --methods NAME"),
        (eval_, ("--steps", "50", "--rank", 9), 1, "--rank 9"),
        (eval_, ("--steps", "50", "--memory", "1MB"), 1, "memory"),
        (eval_, ("--steps", "50", "-o", tmp_path / "taken"), 1, "is not a sweep"),
        (eval_, ("--steps", "50", "-o", tmp_path / "broken"), 1, "not a table that a sweep wrote"),
        (eval_, ("--steps", "50", "-o", "s3://bucket/x"), 1, "local directory"),
        (eval_, ("--steps", "50:"), 2, "give an end and a stride"),
        (eval_, ("--steps", "50", "--strengths", "0.5,much"), 2, "is not a list of numbers"),
    ):
        done = swept(relexio, store, out, command, *more)
        assert (done.code, done.out) == (code, "") and said in done.err, done.err
        assert code == 2 or done.err.count("\n") == 1
        assert not out.exists()
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["model.safetensors"]


def test_a_second_sweep_waits_for_nobody(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    (tmp_path / "out" / "logs").mkdir(parents=True)
    with atomic.locked(tmp_path / "out"):
        done = swept(relexio, store, tmp_path / "out", NUMBER_OF_STEP, "--steps", "50")
    assert done.code == 1 and "is writing it" in done.err
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_dry_run_writes_nothing(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    asked = (NUMBER_OF_STEP, "--steps", "50,60", "--methods", "relex,pinned", "--timeout", 90)
    plan = swept(relexio, store, tmp_path / "out", *asked, "--dry-run")
    assert plan.code == 0 and "3 references and 4 predictions, 0 done already, at most 1:30 each" in plan.out
    facts = json.loads(swept(relexio, store, tmp_path / "out", *asked, "--dry-run", "--json").out)
    assert facts["candidates"] == facts["waiting"] and len(facts["waiting"]) == 7
    assert facts["bytes_needed"] < facts["bytes_free"]
    assert not (tmp_path / "out").exists()


def test_results_stand_beside_the_trajectory(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr", "10:40")
    done = relexio(
        "sweep", tmp_path / "run.zarr", "--methods", "relex", "--steps", 50, "--eval", NUMBER_OF_STEP, "--json"
    )
    assert done.code == 0 and (tmp_path / "run.sweep" / "best" / "config.json").is_file()
    facts = json.loads(done.out)
    out = facts.pop("out")
    assert out == str(tmp_path / "run.sweep")
    assert facts == json.loads((tmp_path / "run.sweep" / "results.json").read_text())


def test_observed_checkpoints_get_the_side_files_that_they_lack(tmp_path: Path, relexio: Relexio) -> None:
    made = make_run(tmp_path, np.dtype(np.float32), (1, 2, 3), shapes=SMALL)
    (made.steps_path / "global_step_3" / "tokenizer.json").unlink()
    (made.steps_path / "global_step_3" / "config.json").write_text('{"of": "step 3"}')
    store_run(made, tmp_path / "run.zarr")
    command = "cat {checkpoint}/tokenizer.json {checkpoint}/config.json | wc -c"
    done = relexio("sweep", tmp_path / "run.zarr", "--methods", "relex", "--steps", 5, "--eval", command)
    assert done.code == 0, done.err
    size = (made.base_path / "tokenizer.json").stat().st_size + len('{"of": "step 3"}')
    assert scores(tmp_path / "run.sweep")["observed-step-3"] == size


@pytest.mark.parametrize(
    "values", [(0.5, 0.5), (-1e308, 1e308), (1e-300, 3e-300), (12345678.9, -3.0), (1e12, 1e300), (2.0, None)]
)
def test_the_curve_fits_a_terminal(values: tuple[float | None, ...]) -> None:
    setting = Setting("", ((10**14, ""),), "")
    candidates = (Candidate(10**14), Candidate(10**15, Recipe("a-method-of-a-very-long-name", strength=-1 / 3)))
    results = tuple(Evaluation(c, v, None, 0.0) for c, v in zip(candidates, values, strict=True))
    lines = curve(Sweep("", setting, results=results))
    assert len(lines) == 4 and max(map(len, lines)) <= 80
    marks = [line for line in lines[1:-1] if re.search(r"\S {2,}\S+ {2,}[. |]*[*o]", line)]
    assert len(marks) == sum(value is not None for value in values)
    assert curve(Sweep("", setting)) == []


def test_of_equal_scores_the_nearest_step_is_best() -> None:
    made = Sweep("", Setting("", ((1, ""),), ""))
    for step, strength, value in ((90, 0.5, 1.0), (80, 1.0, 1.0), (80, 0.5, 1.0), (70, 1.0, 0.5), (60, 1.0, math.pi)):
        made = made.added(Evaluation(Candidate(step, Recipe(strength=strength)), value, None, 0.0))
    made = made.added(Evaluation(Candidate(60, Recipe()), 0.0, None, 0.0))
    best, least = made.best, replace(made, lower_is_better=True).best
    assert best is not None and best.candidate == Candidate(80, Recipe(strength=0.5))
    assert least is not None and least.candidate.step == 60


def test_commands_in_the_docs_parse() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [command for page in pages for command in sweeps_in(page)]
    assert len(found) >= 5
    for command in found:
        assert filled(command["command"], checkpoint=Path("/a b"), step=3) != command["command"]


def sweeps_in(page: Path) -> list[dict[str, Any]]:
    """The options of every ``relexio sweep`` that a page shows."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("relexio sweep ")]
    command = relexio_command.get_command(click.Context(relexio_command), "sweep")
    assert command is not None
    return [command.make_context("sweep", some).params for some in words]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


HARNESS = """#!{python}
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--model_args"].startswith("pretrained=/a b,"), options
folder = Path(options["--output_path"], "__a_b")
folder.mkdir()
print("|gsm8k|0.5|")
found = {{"results": {{"gsm8k": {{"alias": "gsm8k", "exact_match,strict-match": 0.5, "n": 3}}}}, "date": 1.0}}
(folder / "results_2026-01-01.json").write_text(json.dumps(found, indent=2))
"""
MODULE = """def simple_evaluate(model, model_args, tasks, **more):
    assert model_args["pretrained"] == "/a b"
    return {"results": {task: {"alias": task, "exact_match,strict-match": 0.5, "n": 3} for task in tasks}}
"""


def test_the_harness_examples_print_what_their_metric_names(tmp_path: Path) -> None:
    """With stand-ins that take and give what the harness does."""
    page = ROOT / "docs" / "sweep.md"
    (tmp_path / "lm_eval").write_text(HARNESS.format(python=sys.executable))
    (tmp_path / "lm_eval").chmod(0o755)
    (tmp_path / "lm_eval.py").write_text(MODULE)
    (tmp_path / "eval_hf.sh").write_text(next(block for block in blocks(page, "sh") if block.startswith("set -e")))
    (tmp_path / "eval_vllm.py").write_text(next(block for block in blocks(page, "python") if "import lm_eval" in block))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    found = 0
    for options in sweeps_in(page):
        if options["metric"] is not None:
            command = filled(options["command"], checkpoint=Path("/a b"), step=3).replace("python ", f"{PYTHON} ")
            done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert read_score(done.stdout.strip().splitlines()[-1], options["metric"]) == 0.5, done.stderr
            found += 1
    assert found == 2
    (mine,) = (block for block in blocks(page, "python") if "accuracy(" in block)
    compile(mine, "my_eval.py", "exec")
