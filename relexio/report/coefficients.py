"""The figure of the coefficients: points over real steps, their lines, the target, and what the reader can pick."""

from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from relexio.methods.spectrum import TensorFindings
from relexio.report.chart import Figure, by, either, plot, step_axis, tip
from relexio.report.data import WHOLE, Facts, Row, Table, number, numbers, over_steps, signed, skill_at
from relexio.verbs.findings import Findings

_DRAWN, _DRAWN_OF_PART = 12, 6  # tensors whose coefficients are drawn at first, and when one part is picked
_LEAST_LAST = 0.2  # of the largest coefficient: a tensor that came back has no last value to be measured in
_HEIGHT = 360
_PICK, _REACH = "pick", "reach"  # which tensors, and up to which step
_SHOWN = f"datum.step <= {_REACH} && ({_PICK} == null ? datum.top : (datum.part == {_PICK} || datum.part == '{WHOLE}'))"


@dataclass(frozen=True)
class Curves:
    """Coefficients over steps, as multiples of each tensor's last one: points, lines to the target, and target points."""

    points: Table
    lines: Table
    targets: Table
    drawn: int


def curves(findings: Findings, target: int) -> Curves:
    """Those of the most energetic tensors, some of each part, and of the whole model.

    The whole model's is along the direction that its tensors' directions make up, each as long as its last coefficient.
    """
    window, drawn = findings.window, _drawn(findings.tensors)
    tables = Curves([], [], [], sum(top for _, top in drawn))
    ends = np.array([window[0], window[-1], target])  # where a line is drawn

    def add(row: Row, values: np.ndarray, line: np.ndarray) -> None:
        last = float(values[-1])
        points, raw = over_steps(window, "value", values / last), over_steps(window, "raw", values)
        tables.points.append({**row, **points, **raw})
        tables.lines.append({**row, "step": ends.tolist(), "value": numbers(line / last)})
        tables.targets.append({**row, "step": target, "value": number(float(line[-1]) / last)})

    for tensor, top in drawn:
        row = {"tensor": tensor.name, "part": tensor.part, "top": top}
        add(row, tensor.coefficients, tensor.line.slope * ends + tensor.line.intercept)
    values = np.array([tensor.coefficients for tensor in findings.tensors])
    lines = np.array([tensor.line.slope * ends + tensor.line.intercept for tensor in findings.tensors])
    lasts = values[:, -1]
    if length := float(np.linalg.norm(lasts)):
        add({"tensor": WHOLE, "part": WHOLE, "top": True}, lasts @ values / length, lasts @ lines / length)
    return tables


def _drawn(tensors: list[TensorFindings]) -> list[tuple[TensorFindings, bool]]:
    """The tensors that are drawn, by energy, and whether they are at first: the best of each part before the second."""
    fit = [t for t in tensors if t.coefficients[-1] > _LEAST_LAST * np.abs(t.coefficients).max()]
    by_part: dict[str, list[TensorFindings]] = {}
    for tensor in sorted(fit, key=lambda t: -t.sigma2):
        by_part.setdefault(tensor.part, []).append(tensor)
    order = sorted(fit, key=lambda t: (t is not by_part[t.part][0], -t.sigma2))
    top = {t.name for t in order[:_DRAWN]}
    return [
        (t, t.name in top)
        for group in by_part.values()
        for index, t in enumerate(group)
        if index < _DRAWN_OF_PART or t.name in top
    ]


def coefficients(facts: Facts) -> Figure:
    """Coefficients over real steps, their lines, and the target."""
    tables = curves(facts.findings, facts.target)
    drawn = {row["part"] for row in tables.points}
    choices = _choices([part for part in facts.parts if part in drawn], facts)
    chart = alt.layer(*_marks(facts), *_layers(tables, facts)).add_params(*choices)
    title, measure = "Is it a line, and where does it lead?", "coefficient, 1 at the last observed step"
    how, signals = _how(facts, tables.drawn), (_PICK, _REACH)
    return Figure(title, how, chart, measure, _HEIGHT, "parts", wide=True, column=110, signals=signals)


def _choices(parts: list[str], facts: Facts) -> tuple[alt.Parameter, alt.Parameter]:
    labels = ["the most energetic tensors", *(f"{part} alone" for part in parts)]
    tensors = alt.binding_select(options=[None, *parts], labels=labels, name="Show ")
    ends = [facts.target, facts.findings.window[-1]]
    steps = alt.binding_select(options=ends, labels=["up to the target", "observed steps alone"], name="and ")
    return alt.param(name=_PICK, value=None, bind=tensors), alt.param(name=_REACH, value=facts.target, bind=steps)


def _marks(facts: Facts) -> list[alt.Chart]:
    """Where the observed steps end, and where the target is; said at the bottom, where no line of a run that moves is."""
    last, target, x = facts.findings.window[-1], facts.target, step_axis(8)
    rules = plot([{"step": last}, {"step": target}]).transform_filter(f"datum.step <= {_REACH}")

    def note(step: int, text: str, above_axis: int, **style: Any) -> alt.Chart:
        chart = plot([{"step": step, "says": text}]).transform_filter(f"{_REACH} > {last}")
        chart = chart.mark_text(style="note", baseline="bottom", **style)
        return chart.encode(x=x, y=alt.value(_HEIGHT - above_axis), text="says:N")

    return [
        rules.mark_rule(style="ruled").encode(x=x),
        note(last, f"last observed: step {last}", 20, align="left", dx=5),
        note(target, f"target: step {target}", 5, align="right", dx=-5),
    ]


def _layers(tables: Curves, facts: Facts) -> list[alt.Chart]:
    """Lines, points and ends, in the colours of the parts; the whole model larger."""
    whole = alt.datum.part == WHOLE
    tips = [tip("tensor:N"), tip("step:Q"), tip("value:Q", "of its last", ".3f")]
    lines = plot(tables.lines, "step", "value").transform_filter(_SHOWN).mark_line(opacity=0.7)
    points = plot(tables.points, "step", "value", "raw").transform_filter(_SHOWN).mark_circle(opacity=0.75)
    ends = plot(tables.targets).transform_filter(_SHOWN).mark_point(shape="diamond", filled=True, opacity=1)
    layers = [
        lines.encode(detail="tensor:N", strokeWidth=either(whole, 2.5, 1)),
        points.encode(size=either(whole, 20, 11), tooltip=[*tips, tip("raw:Q", "coefficient", ".4g")]),
        ends.encode(size=either(whole, 120, 50), tooltip=tips),
    ]
    color = by(alt.Color, "part", [WHOLE, *facts.parts])
    return [layer.encode(x=step_axis(8), y=alt.Y("value:Q", title=None), color=color) for layer in layers]


def _how(facts: Facts, drawn: int) -> str:
    findings, last, target = facts.findings, facts.findings.window[-1], facts.target
    what = "all tensors that moved" if drawn >= len(findings.tensors) else f"the {drawn} most energetic tensors"
    how = (
        f"How far {what} moved along their direction, each divided by its value at step {last}, so that 1 is the last "
        f"checkpoint; at least one of each part. Lines are fitted to the whole window; diamonds are their values at the "
        f"target. Hover over a point for tensor and step."
    )
    if findings.judged is None:
        return how
    skill = skill_at(findings, target)
    if skill is None:
        return f"{how} Step {target} is farther ahead than any held-out step: no test covers it."
    return f"{how} Predictions as far ahead as step {target} had skill {signed(skill)} with the best recipe."
