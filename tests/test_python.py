"""What the Python API returns shows itself, in one line or a small table; and convert is the command."""

import logging
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import relexio as package
from relexio.errors import BudgetError, RequestError
from tests.support.command import Relexio, snapshot
from tests.support.make import Run, load_checkpoint, make_run

STEPS = (10, 20, 30, 40, 50)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, steps=STEPS)


class Table(HTMLParser):
    """The rows of a table; anything else but its tags is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.feed(text)
        self.rows = dict(zip(self.cells[::2], self.cells[1::2], strict=True))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("table", "tr", "th", "td"), tag
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


def shown(held: Any, path: Path) -> dict[str, str]:
    """The rows of what is held, and that its line is short."""
    line = repr(held)
    assert "\n" not in line and len(line) < len(str(path)) + 120 and str(path) in line
    rows = Table(held._repr_html_()).rows
    assert rows["trajectory"] == str(path)
    return rows


def test_what_is_returned_shows_itself(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    path = tmp_path / "<b>a&b.zarr"
    trajectory = package.convert(run.steps_path, path, run.base_path)
    assert escape(str(path)) in trajectory._repr_html_()
    assert shown(trajectory, path) == {"trajectory": str(path), "tensors": "3", "holds": "steps 10, 20, 30, 40, 50"}
    assert shown(trajectory.checkpoint(), path)["checkpoint"] == "base"
    assert shown(trajectory.checkpoint(20), path)["checkpoint"] == "step 20"
    judged = trajectory.judge()
    found, printed = shown(judged, path), relexio("backtest", path).out
    assert found.pop("verdict") == " ".join(judged.words())
    assert {"window", "cut-offs", "energy", "r2", "next"} < found.keys()
    assert all(text in printed for text in found.values())
    assert f"{judged.advised.recipe}, strength" in repr(judged) if judged.advised else "nothing" in repr(judged)
    fit = trajectory.fit(method="relex", exclude=["*norm*"])
    found = shown(fit, path)
    assert found["window"] == "steps 10, 20, 30, 40, 50" and found["method"] == "relex, rank 1, strength 1"
    assert found["tensors"] == "2 of 3; the others are as in step 50"
    predicted = shown(fit.predict(80), path)
    assert predicted == {**found, "predicted": "step 80", "verdict": str(fit.outlook(80))}
    command = ("predict", path, "--step", 80, "--exclude", "*norm*", "-o", tmp_path / "out")
    printed = relexio(*command).out
    assert all(predicted[name] in printed for name in ("window", "method", "tensors", "verdict"))
    mixed = trajectory.fit(method="mix", weights="50=1").predict()
    assert shown(mixed, path)["predicted"] == "mix" and "verdict" not in shown(mixed, path)


def test_a_judgement_that_advises_nothing(run: Run, tmp_path: Path) -> None:
    for step in STEPS:  # there and back
        (run.steps_path / f"global_step_{step}").rename(run.steps_path / f"checkpoint-{(step * 3) % 70}")
    trajectory = package.convert(run.steps_path, tmp_path / "run.zarr", run.base_path)
    judged = trajectory.judge()
    assert judged.advised is None and repr(judged).endswith(": nothing is recommended>")
    assert "command" not in shown(judged, tmp_path / "run.zarr")
    assert "None" not in unescape(judged._repr_html_())


def test_convert_is_the_command(run: Run, tmp_path: Path, relexio: Relexio) -> None:
    done = relexio(
        "convert", run.steps_path, "--base", run.base_path, "--steps", "10,20,30", "-o", tmp_path / "one.zarr"
    )
    assert done.code == 0
    by_hand = package.convert(run.steps_path, tmp_path / "two.zarr", run.base_path, steps="10:30", workers=1)
    assert by_hand.steps == (10, 20, 30) and snapshot(tmp_path / "two.zarr") == snapshot(tmp_path / "one.zarr")
    assert package.convert(str(run.steps_path), by_hand.path, steps=[40]).steps == (10, 20, 30, 40)
    assert by_hand.steps == (10, 20, 30), "what was opened before is as it was"


def test_steps_that_were_written_again(run: Run, tmp_path: Path) -> None:
    first = package.convert(run.steps_path, tmp_path / "run.zarr", run.base_path)
    again = Run(tmp_path / "again", run.base, {step: run.steps[60 - step] for step in (30, 40, 50)})
    second = package.convert(again.steps_path, first.path, replace="30:")
    assert second.steps == STEPS
    name = "model.norm.weight"
    assert (second.checkpoint(50)[name].compute() == run.steps[10][name].astype(np.float32)).all()


def test_types_and_notes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, steps=(1, 2))
    wide = Run(
        tmp_path / "wide", run.base, {s: {n: t.astype(np.float32) for n, t in m.items()} for s, m in run.steps.items()}
    )
    with caplog.at_level(logging.WARNING, "relexio"):
        package.convert(wide.steps_path, tmp_path / "rounded.zarr", wide.base_path)
    assert f"{tmp_path / 'rounded.zarr'}: " in caplog.text and "rounded to" in caplog.text
    stored = package.convert(wide.steps_path, tmp_path / "stored.zarr", wide.base_path, dtype="stored")
    stored.checkpoint(2).save(tmp_path / "back")
    assert {tensor.dtype for tensor in load_checkpoint(tmp_path / "back").values()} == {np.dtype("float32")}


def test_what_cannot_be_converted(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    with pytest.raises(RequestError, match="needs --base"):
        package.convert(run.steps_path, out)
    with pytest.raises(RequestError, match="unknown dtype 'bf16'; known are base, stored"):
        package.convert(run.steps_path, out, run.base_path, dtype="bf16")
    with pytest.raises(RequestError, match="no checkpoint for step 70"):
        package.convert(run.steps_path, out, run.base_path, steps=[10, 70])
    with pytest.raises(BudgetError):
        package.convert(run.steps_path, out, run.base_path, memory="1MB")
    assert not out.exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "pinned", "strength": "0.5"}, "--strength '0.5' is not a number"),
        ({"method": "pinned", "strength": None}, "--strength None is not a number"),
        ({"method": "pinned", "strength": True}, "--strength True is not a number"),
        (
            {"method": "mix", "weights": {0: -0.5, 50: 1.5}},
            "--weights {0: -0.5, 50: 1.5} is not text, such as '0=-0.5,300=1.5'",
        ),
        ({"method": "mix", "weights": 1.5}, "--weights 1.5 is not text"),
    ],
)
def test_a_part_of_a_recipe_of_another_type_is_refused(
    run: Run, tmp_path: Path, asked: dict[str, Any], said: str
) -> None:
    trajectory = package.convert(run.steps_path, tmp_path / "run.zarr", run.base_path)
    with pytest.raises(RequestError) as refused:
        trajectory.fit(**asked)
    assert str(refused.value).startswith(said)
