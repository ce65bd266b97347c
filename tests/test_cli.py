"""What the command line prints: plans, results, JSON; the Python API beside it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import join
from typing import Any

import click
import numpy as np
import pytest

import relexio as package
from relexio.cli.main import _GROUPS, main, relexio_command
from relexio.engine import graph
from relexio.engine.executor import Executor
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, RequestError
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.verbs.output import Target
from relexio.verbs.predict import prepare
from relexio.verbs.predict import run as predict
from relexio.words import parse_size
from tests.support.command import Relexio, snapshot
from tests.support.make import BF16, Run, deltas, load_checkpoint, make_run
from tests.support.steps import CPU, fit_run, predict_run, store_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=(10, 20, 30, 40, 50))


def test_convert_tells_what_it_will_do_and_did(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    out = tmp_path / "run.zarr"
    (run.steps_path / "best_global_step_7").mkdir()
    command = ("convert", run.steps_path, "--base", run.base_path, "--steps", "10:30", "-o", out)
    plan = relexio(*command, "--dry-run")
    assert plan.code == 0 and "steps 10, 20, 30" in plan.out and "allowed" in plan.out and "free" in plan.out
    assert "best_global_step_7" in plan.err
    assert plan.out.endswith(f"\nnext\n  relexio {join(map(str, command))}\n")
    assert not out.exists() and not list(tmp_path.glob("*.relexio-partial"))
    facts = json.loads(relexio(*command, "--dry-run", "--json").out)
    assert facts["steps"] == [10, 20, 30] and facts["memory_projected"] <= facts["memory_allowed"]
    done = json.loads(relexio(*command, "--json").out)
    assert done["added"] == [10, 20, 30] and not done["resumed"]
    assert done["bytes"]["checkpoints"] == sum(
        (run.steps_path / f"global_step_{s}" / "model.safetensors").stat().st_size for s in (10, 20, 30)
    )
    again = relexio(*command)
    assert "all steps are stored already" in again.out and again.code == 0


def test_predict_tells_what_it_will_do_and_did(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr")
    command = ("predict", tmp_path / "run.zarr", "--method", "relex", "--step", 100, "-o", tmp_path / "out")
    before = snapshot(tmp_path / "run.zarr")
    plan = relexio(*command, "--dry-run")
    assert plan.code == 0 and "to be computed" in plan.out and "free" in plan.out
    assert plan.out.endswith(f"\nnext\n  relexio {join(map(str, command))}\n")
    assert snapshot(tmp_path / "run.zarr") == before and not (tmp_path / "out").exists()
    done = relexio(*command)
    assert done.code == 0 and "verdict" in done.out and "2.0 times" in done.out
    assert "kept in the store" in relexio(*command[:-1], tmp_path / "other", "--dry-run").out
    facts = json.loads(relexio(*command[:-1], tmp_path / "more", "--window", "20:40", "--json").out)
    assert facts["window"] == [20, 30, 40] and facts["step"] == 100 and facts["method"] == "relex"
    assert json.loads((tmp_path / "more" / "relexio.json").read_text()) == {
        k: v for k, v in facts.items() if k != "out"
    }


def test_the_second_prediction_makes_no_fit(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    predict_run(fit_run(store), 100, tmp_path / "one")
    monkeypatch.setattr("relexio.engine.graph.gram", lambda *_: pytest.fail("the fit is there already"))
    predict_run(fit_run(store, window="10:40"), 200, tmp_path / "two")


def test_a_kept_fit_is_used_where_the_memory_is_too_small_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, steps=tuple(range(1, 81)), shapes={f"w{i}": (2, 3) for i in range(12)})
    store = store_run(run, tmp_path / "run.zarr")
    outputs = [predict_run(fit_run(store), 100, tmp_path / "roomy")]
    roomy = Resources(workers=1, device="cpu", held=0)
    little = replace(roomy, memory=roomy.for_combine(store, 80, 1).plan.projected)
    with pytest.raises(BudgetError):
        little.for_gram(store, 80)
    for solver in ("gram", "operator"):
        monkeypatch.setattr(f"relexio.engine.graph.{solver}", lambda *_: pytest.fail("the fit is there already"))
    for solver in ("gram", "auto"):
        outputs.append(predict_run(fit_run(store, solver=solver, resources=little), 100, tmp_path / solver, little))
    assert len({(out / "model.safetensors").read_bytes() for out in outputs}) == 1


def test_the_memory_that_an_error_asks_for_is_enough(run: Run, tmp_path: Path) -> None:
    """Even if the program holds a little more when it is run again."""
    store = store_run(run, tmp_path / "run.zarr")
    for plan in (lambda r: r.for_gram(store, 5), lambda r: r.for_combine(store, 5, 3)):
        with pytest.raises(BudgetError) as refusal:
            plan(Resources(1, 1, "cpu", held=60_300_000))
        enough = re.search(r"give --memory (\d+MB)", str(refusal.value))
        assert enough is not None
        plan(Resources(parse_size(enough[1]), 1, "cpu", held=62_300_000))


@pytest.mark.parametrize("removed", [False, True])
def test_what_was_planned_is_what_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    store = store_run(run, tmp_path / "run.zarr")
    fit_run(store)
    job = prepare(store, store.steps, Recipe(), "auto", [Target(100, tmp_path / "out")], CPU)
    assert job.kept and job.plan is job.executor.plan
    executors: list[object] = []
    combine = graph.combine

    def watch(*given: Any) -> None:
        executors.extend(one for one in given if isinstance(one, Executor))
        combine(*given)

    monkeypatch.setattr(graph, "combine", watch)
    if removed:  # which anyone may do at any time
        shutil.rmtree(tmp_path / "run.zarr" / "cache")
    fit = predict(job, silent, pytest.fail)
    assert executors == [job.executor] and executors[0] is job.executor
    assert repr(fit) == f"<Fit of {store.shown}, steps 10, 20, 30, 40, 50: relex, strength 1>"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_model_card_and_side_files(run: Run, tmp_path: Path) -> None:
    for step in run.steps:
        (run.steps_path / f"global_step_{step}" / "chat_template.jinja").write_text("{{ messages }}")
        (run.steps_path / f"global_step_{step}" / "trainer_state.json").write_text("{}")
    (run.base_path / "README.md").write_text("of the base")
    out = predict_run(fit_run(store_run(run, tmp_path / "run.zarr")), 100, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "model.safetensors", "relexio.json", "tokenizer.json",
    ]  # fmt: skip
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and 'base_model: "base"' in card and "step 100" in card


def test_inspect(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr")
    shown = relexio("inspect", tmp_path / "run.zarr")
    assert shown.code == 0 and "model.norm.weight" in shown.out
    ranks = relexio("inspect", tmp_path / "run.zarr", "--rank", "2").out
    for found, recipe in ((shown.out, "relex, strength 1"), (ranks, "relex, rank 2, strength 1")):
        assert f" of {recipe}, inside the window at 1 cut-off (relexio backtest compares all methods)\n" in found
    facts = json.loads(relexio("inspect", tmp_path / "run.zarr", "--json").out)
    kept = total = 0.0
    for entry in facts["tensors"]:
        m = deltas(run.base[entry["name"]], [run.steps[s][entry["name"]] for s in sorted(run.steps)])
        u, sigma, _ = np.linalg.svd(m, full_matrices=False)
        line = np.polyfit(sorted(run.steps), np.abs(u[-1, 0]) / u[-1, 0] * sigma[0] * u[:, 0], 1)
        np.testing.assert_allclose(entry["energy"], sigma[0] ** 2 / (sigma**2).sum(), rtol=1e-9)
        np.testing.assert_allclose(entry["slope"], line[0], rtol=1e-9)
        changed = np.count_nonzero(m, axis=1).max() / m.shape[1]
        np.testing.assert_allclose(entry["changed"], changed)
        kept, total = kept + sigma[0] ** 2, total + (sigma**2).sum()
    np.testing.assert_allclose(facts["energy"], kept / total, rtol=1e-9)
    assert facts["backtest"] == {"cut_offs": [40]}


def test_inspect_of_a_single_step_shows_what_there_is(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    store_run(run, tmp_path / "run.zarr", "10")
    shown = relexio("inspect", tmp_path / "run.zarr")
    assert shown.code == 0 and "step 10" in shown.out


def test_python_api(run: Run, tmp_path: Path) -> None:
    store_run(run, tmp_path / "run.zarr")
    trajectory = package.open(tmp_path / "run.zarr")
    assert trajectory.steps == (10, 20, 30, 40, 50) and trajectory.tensors == tuple(run.base)
    name = "model.embed_tokens.weight"
    m = deltas(run.base[name], [run.steps[s][name] for s in sorted(run.steps)])
    np.testing.assert_array_equal(trajectory.delta(name).compute(), m)
    observed = trajectory.checkpoint(30)
    np.testing.assert_array_equal(observed[name].compute(), run.steps[30][name].astype(np.float32))
    observed.save(tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(run.steps_path / "global_step_30")
    fit = trajectory.fit([10, 30, 50], method="relex", rank=2)
    assert repr(fit).endswith("run.zarr, steps 10, 30, 50: relex, rank 2, strength 1>")
    assert trajectory.judge([10, 30, 50], workers=1).window == (10, 30, 50)
    prediction = fit.predict(80)
    prediction.save(tmp_path / "out")
    saved = load_checkpoint(tmp_path / "out")
    assert list(prediction) == list(saved)
    for key, array in saved.items():
        np.testing.assert_array_equal(prediction[key].compute(), array.astype(np.float32))
        assert prediction[key].shape == array.shape
    weights = fit.weights(80)[name]
    np.testing.assert_array_equal(
        (run.base[name].astype(np.float64).ravel() + weights @ m[[0, 2, 4]]).astype(np.float32).astype(BF16),
        saved[name].ravel(),
    )
    for wrong in (lambda: trajectory.delta("no"), lambda: trajectory.checkpoint(7), lambda: fit.skill(7)):
        with pytest.raises(RequestError):
            wrong()


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GB", 2 * 10**9), ("512MiB", 512 << 20), ("1.5g", 15 * 10**8), ("1000000", 10**6), ("3 TiB", 3 << 40)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


def test_the_list_of_commands_says_what_each_says_of_itself() -> None:
    for name, line in (pair for group in _GROUPS.values() for pair in group.items()):
        command = relexio_command.get_command(click.Context(relexio_command), name)
        assert command is not None and (command.help or "").split("\n\n")[0].replace("\n", " ") == line


def test_a_command_that_is_not_there(relexio: Relexio) -> None:
    done = relexio("predit", "run.zarr")
    assert done.code == 2 and done.err.endswith("Error: No such command 'predit'. Did you mean 'predict'?\n")
    assert relexio("xyz").err.endswith("Error: No such command 'xyz'.\n")


def test_quiet_shows_no_progress(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relexio.cli.show._PATIENCE", -1.0)
    command = ["convert", str(run.steps_path), "--base", str(run.base_path), "-o"]
    for out, more, told in (("a.zarr", [], True), ("b.zarr", ["-q"], False)):
        with pytest.raises(SystemExit) as end:
            main([*command, str(tmp_path / out), *more])
        assert end.value.code == 0
        err = capsys.readouterr().err
        assert ("left\n" in err and ": 100 %, done in 0:0" in err) is told and (err == "") is not told, err


def test_side_files_where_predictions_have_their_own(tmp_path: Path, relexio: Relexio) -> None:
    """A directory of that name: restored as it was, and named where it is left out of a prediction."""
    run, out = make_run(tmp_path), tmp_path / "out"
    strange = ["README.md/x.md", "relexio.json/x.json"]
    for name in strange:
        (run.base_path / name).parent.mkdir()
        (run.base_path / name).write_text(name)
    last = run.steps_path / "global_step_8" / "config.json"  # a file in the base
    last.unlink()
    last.mkdir()
    (last / "x.json").write_text("{}")
    assert relexio("convert", run.steps_path, "--base", run.base_path, "-o", tmp_path / "run.zarr").code == 0
    done = relexio("predict", tmp_path / "run.zarr", "--method", "relex", "--step", 20, "-o", out)
    assert done.code == 0, done.err
    (said,) = (line for line in done.err.splitlines() if "left out of the prediction" in line)
    assert all(name in said for name in (*strange, "config.json/x.json"))
    assert (out / "README.md").is_file() and (out / "relexio.json").is_file() and (out / "config.json").is_file()
    for step, original in (("base", run.base_path), (8, run.steps_path / "global_step_8")):
        restored = tmp_path / f"restored-{step}"
        assert relexio("restore", tmp_path / "run.zarr", "--step", step, "-o", restored).code == 0
        assert snapshot(restored) == snapshot(original)
