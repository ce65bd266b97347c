"""The search for the best step: it ends, whatever is scored; and finds the top of what rises and falls."""

import json
import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relexio.progress import silent
from relexio.store.store import Store
from relexio.sweep import Candidate, Evaluation, Request, Sweep, prepare, sweep
from relexio.sweep.score import read_error
from relexio.sweep.search import GROWTH, HORIZONS, MOST, Scored, next_step
from tests.support.command import Relexio
from tests.support.make import BF16, make_run
from tests.support.steps import CPU, store_run

SCORES = st.one_of(st.none(), st.floats(-1e300, 1e300))


def search(
    last: int, ahead: int, score: Callable[[int], float | None], known: float, error: float = 0.0
) -> dict[int, float | None]:
    """All that a search evaluates, in its order; every score has the same error."""
    found: dict[int, float | None] = {}
    seen: dict[int, Scored] = {}
    while (step := next_step(last, ahead, seen, Scored(known, error))) is not None:
        assert step not in found and step > last
        found[step] = value = score(step)
        seen[step] = Scored(-np.inf) if value is None else Scored(value, error)
    return found


@given(st.data(), st.integers(0, 10**6), st.integers(1, 10**6), st.floats(-1e300, 1e300), st.floats(0, 1e300))
def test_it_ends_whatever_the_scores(data: st.DataObject, last: int, ahead: int, known: float, error: float) -> None:
    found = search(last, ahead, lambda _: data.draw(SCORES), known, error)
    assert 1 <= len(found) <= MOST
    # every evaluation follows from those before it: that is what an interrupted search goes on from
    again = search(last, ahead, lambda step: found[step], known, error)
    assert list(again) == list(found)


@given(st.integers(1, 10**5), st.integers(1000, 10**4), st.floats(1.0, 60.0), st.floats(0.3, 4.0))
def test_of_a_curve_with_one_top_it_finds_the_top(last: int, ahead: int, top: float, width: float) -> None:
    """A parabola over the logarithm of how far ahead, down to the last observed step."""

    def score(far: float) -> float:
        return float(1.0 - (np.log(far / (ahead * top)) / width) ** 2)

    found = search(last, ahead, lambda step: score(step - last), score(ahead / GROWTH))
    best = max(found, key=lambda step: found[step] or -np.inf)
    off = abs(np.log((best - last) / (ahead * top)))
    dropped = max(found) != best
    assert off < 0.01 if dropped else off <= np.log(GROWTH) / 2 + 0.01


def test_a_drop_within_the_error_does_not_end_it() -> None:
    scores = {110: 0.50, 130: 0.49, 190: 0.60, 370: 0.3}
    assert 190 not in search(100, 10, lambda step: scores.get(step, 0.0), 0.4)
    assert list(search(100, 10, lambda step: scores.get(step, 0.0), 0.4, 0.02))[:4] == [110, 130, 190, 370]


def test_a_top_that_promises_less_than_the_error_is_not_looked_for() -> None:
    scores = {110: 0.50, 130: 0.60, 190: 0.52}
    assert list(search(100, 10, lambda step: scores.get(step, 0.0), 0.4, 0.02)) == [110, 130, 190]
    assert len(search(100, 10, lambda step: scores.get(step, 0.0), 0.4, 0.0)) > 3


def test_where_nothing_helps_it_looks_nearer_and_ends() -> None:
    assert list(search(100, 30, lambda step: 0.5 - (step - 100) / 100, 0.5)) == [130, 110, 103]
    assert list(search(100, 30, lambda step: None, 0.5)) == [130, 110, 103]
    assert list(search(100, 1, lambda step: None, 0.5)) == [101]
    assert list(search(100, 30, lambda step: 0.49, 0.5, 0.1)) == [130, 190, 370, 910, 2530]


def test_a_failed_evaluation_is_a_drop() -> None:
    found = search(100, 10, lambda step: None if step > 150 else step / 1000, 0.1)
    assert list(found)[:4] == [110, 130, 190, 152] and len(found) == 5


def test_where_nothing_ever_drops_it_ends_all_the_same() -> None:
    assert list(search(100, 10, lambda step: 1.0, 1.0)) == [110, 130, 190, 370, 910]


@pytest.mark.parametrize(
    ("line", "metric", "error"),
    [
        ("0.5", None, None),
        ('{"acc": 0.5, "acc_stderr": 0.01}', None, 0.01),
        ('{"acc": 0.5, "stderr": 0.02}', None, 0.02),
        ('{"a": {"acc": 0.5, "stderr": 0.03}, "b": 1, "stderr": 9}', "a.acc", 0.03),
        (
            '{"gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.04, "stderr": 7}}',
            "gsm8k.exact_match,strict-match",
            0.04,
        ),
        ('{"acc": 0.5, "acc_stderr": -1}', None, None),
        ('{"acc": 0.5, "acc_stderr": "N/A"}', None, None),
        ('{"a": 1, "b": 2, "stderr": 3}', None, None),
        ("nonsense", None, None),
    ],
)
def test_the_standard_error_in_a_line(line: str, metric: str | None, error: float | None) -> None:
    assert read_error(line, metric) == error


#: Rises to step 150, then falls; base and observed steps have their own scores. It writes down what it is run for.
HILL = """echo $RELEXIO_STEP >> "$SEEN"
python3 -c "s = $RELEXIO_STEP; print(0.9 - abs(s - 150) / 400 if s > 32 else 0.3)" # {checkpoint}"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = make_run(tmp_path_factory.mktemp("a run"), BF16, tuple(range(2, 34, 2)), noise=0.05)
    return store_run(made, made.root / "run.zarr")


def evaluated(seen: Path) -> list[int]:
    return list(map(int, seen.read_text().split()))


def test_a_sweep_alone_searches_from_the_recommended_recipe(
    store: Store, tmp_path: Path, relexio: Relexio, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, out = tmp_path / "seen", tmp_path / "out"
    monkeypatch.setenv("SEEN", str(seen))
    said = json.loads(relexio("backtest", store.address, "--json").out)["verdict"]
    command = ("sweep", store.address, "-o", out, "--eval", HILL)
    planned = json.loads(relexio(*command, "--dry-run", "--json").out)
    (line,) = planned["lines"]
    assert line["ahead"] == said["farthest"] - 32 and line["method"] == said["method"] and not out.exists()
    assert line["strength"] == said["strength"] and planned["candidates"] == ["base", "observed-step-32"]
    done = relexio(*command)
    assert done.code == 0, done.err
    first = 32 + line["ahead"]
    assert evaluated(seen)[:3] == [0, 32, first] and len(evaluated(seen)) <= 2 + MOST
    table = json.loads((out / "results.json").read_text())
    best = max(evaluated(seen)[2:], key=lambda step: 0.9 - abs(step - 150) / 400)
    facts = json.loads((out / "best" / "relexio.json").read_text())
    assert facts["step"] == best and table["best"].startswith(f"{said['method']}-step-{best}-")
    assert facts["strength"] == said["strength"]
    assert f"note: recommended by the backtest: {said['method']}, " in done.err
    assert "[3 of at most 9] " in done.err and ", at most 0:0" in done.err


def test_an_interrupted_search_goes_on_where_it_was(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    request = Request(store.steps, HILL, tmp_path / "out")

    def run(most: int) -> None:
        def watch(candidate: Candidate, result: Evaluation | None, known: Sweep) -> None:
            if result is None and len(evaluated(seen)) == most:
                raise KeyboardInterrupt

        sweep(prepare(store, request, CPU, silent), silent, watch, pytest.fail)

    seen.touch()
    run(99)
    whole = evaluated(seen)
    for most in range(len(whole)):
        shutil.rmtree(request.out)
        seen.write_text("")
        with pytest.raises(KeyboardInterrupt):
            run(most)
        run(99)
        assert evaluated(seen) == whole


def test_the_error_of_a_share_lets_it_go_on(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    flat = """python3 -c "print(0.5 - $RELEXIO_STEP / 1e6)" # {checkpoint}"""
    for more, most in (((), 3), (("--problems", 100), HORIZONS)):
        out = tmp_path / f"out{most}"
        assert relexio("sweep", store.address, "-o", out, "--eval", flat, *more).code == 0
        found = json.loads((out / "results.json").read_text())
        assert sum(row["method"] not in ("base", "observed") for row in found["results"]) >= most
        errors = [row["error"] for row in found["results"]]
        assert errors == (
            [None] * len(errors) if not more else pytest.approx([sqrt(0.25 / 100)] * len(errors), rel=1e-3)
        )


def test_named_methods_are_searched_from_half_as_far_again(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    command = ("sweep", store.address, "-o", tmp_path / "out", "--methods", "secant,auto", "--strengths", "1,0.5")
    planned = json.loads(relexio(*command, "--eval", "echo 1 {checkpoint}", "--dry-run", "--json").out)
    assert [line["strength"] for line in planned["lines"]] == [1.0, 0.5, 1.0, 0.5]
    assert [line["ahead"] for line in planned["lines"]][:2] == [16, 16]


def test_a_prediction_that_overflows_has_failed_and_the_sweep_goes_on(tmp_path: Path, relexio: Relexio) -> None:
    made = make_run(tmp_path, np.dtype(np.float32), (10, 20, 30, 40), shapes={"model.norm.weight": (12,)}, noise=0.1)
    store = store_run(made, tmp_path / "run.zarr")
    command = ("sweep", store.address, "--steps", "50,60", "--strengths", "1,1e60", "--methods", "relex")
    done = relexio(*command, "--eval", "echo $RELEXIO_STEP {checkpoint} | cut -d ' ' -f 1")
    assert done.code == 0 and "best    relex, strength 1, step 60: 60" in done.out, done.err
    rows = json.loads((tmp_path / "run.sweep" / "results.json").read_text())["results"]
    failed = [row for row in rows if row["strength"] == 1e60]
    assert len(failed) == 2 and all("the prediction overflows F32" in row["failed"] for row in failed)
    assert done.err.count("it was not written: tensor model.norm.weight") == 2


@pytest.mark.parametrize("method", ["mean", "rre"])
def test_what_is_the_same_for_every_step_is_evaluated_once(
    store: Store, tmp_path: Path, relexio: Relexio, method: str
) -> None:
    for steps in ((), ("--steps", "40,50,60")):
        out = tmp_path / f"out{len(steps)}"
        command = ("sweep", store.address, "-o", out, "--methods", method, *steps, "--eval", "echo 0.5 # {checkpoint}")
        assert relexio(*command).code == 0
        rows = json.loads((out / "results.json").read_text())["results"]
        assert [row["method"] for row in rows] == ["base", "observed", method]


def test_a_score_that_is_no_share_of_problems(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    command = ("sweep", store.address, "-o", tmp_path / "out", "--problems", 100, "--eval", "echo 49 # {checkpoint}")
    done = relexio(*command)
    assert done.code == 1 and "49 is no share of 100 problems: print one from 0 to 1" in done.err.splitlines()[-1]


SPOILS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no problems": lambda table: table.update(problems=0),
    "problems in words": lambda table: table.update(problems="x"),
    "a line that is none": lambda table: table["results"][2].update(line=[]),
    "an infinite score": lambda table: table["results"][2].update(score=np.inf),
    "a vast score": lambda table: table["results"][2].update(score=10**400),
    "no time": lambda table: table["results"][2].update(seconds=np.nan),
    "no step": lambda table: table["results"][2].update(step=np.inf),
    "a step inside the window": lambda table: table["results"][2].update(step=20),
    "no first": lambda table: table["results"][2].update(first=np.inf),
    "no method": lambda table: table["results"][2]["recipe"].update(method=[]),
    "an unknown method": lambda table: table["results"][2]["recipe"].update(method="bogus"),
    "no strength": lambda table: table["results"][2]["recipe"].update(strength=None),
    "a rank in words": lambda table: table["results"][2]["recipe"].update(rank="x"),
    "no metric": lambda table: table.update(metric=[]),
    "a window without steps": lambda table: table.update(window=[]),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_table_that_no_sweep_wrote(store: Store, tmp_path: Path, relexio: Relexio, spoil: str) -> None:
    out = tmp_path / "out"
    command = (
        "sweep",
        store.address,
        "-o",
        out,
        "--methods",
        "relex",
        "--steps",
        "40",
        "--eval",
        "echo 1 # {checkpoint}",
    )
    assert relexio(*command).code == 0
    table = json.loads((out / "results.json").read_text())
    SPOILS[spoil](table)
    (out / "results.json").write_text(json.dumps(table))
    done = relexio(*command)
    assert done.code == 1 and done.err.count("\n") == 1 and "not a table that a sweep wrote" in done.err, done.err
    if spoil == "no problems":
        (out / "results.json").write_text("[" * 100_000)
        assert "not a table that a sweep wrote" in relexio(*command).err


def test_scores_whose_difference_no_number_holds(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    command = """python3 -c "print(-1.7e308 if $RELEXIO_STEP < 40 else 1.7e308)" # {checkpoint}"""
    done = relexio(
        "sweep", store.address, "-o", tmp_path / "out", "--methods", "relex", "--steps", "40", "--eval", command
    )
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"][2]["gain"] is None


def test_a_search_goes_on_once_its_command_is_mended(store: Store, tmp_path: Path, relexio: Relexio) -> None:
    mended = tmp_path / "mended"
    command = (
        "sweep",
        store.address,
        "-o",
        tmp_path / "out",
        "--eval",
        f"test -e '{mended}' && echo 0.5 # {{checkpoint}}",
    )
    broken = relexio(*command)
    assert broken.code == 1 and "error: --eval fails on the base and on step 32" in broken.err
    mended.touch()
    done = relexio(*command)
    assert done.code == 0 and "2 failed before and will be tried again" in done.err, done.err
    assert done.out.count("0.5") >= 3
