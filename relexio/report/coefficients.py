"""The figure of the coefficients: points over real steps, their lines, the target, and what the reader can pick."""

from typing import Any

import altair as alt

from relexio.report import curves, data
from relexio.report.chart import Figure, above, flat, plot
from relexio.report.data import WHOLE, Facts, signed

_HEIGHT = 360
_PICK, _REACH = "pick", "reach"  # which tensors, and up to which step
_SHOWN = f"datum.step <= {_REACH} && ({_PICK} == null ? datum.top : (datum.part == {_PICK} || datum.part == '{WHOLE}'))"


def coefficients(facts: Facts) -> Figure:
    """Coefficients over real steps, their lines, and the target."""
    tables = curves.coefficients(facts.found, facts.target)
    there = [part for part in facts.parts if any(row["part"] == part for row in tables.points)]
    layers = [*_ruled(facts), *_curves(tables, facts)]
    chart = (
        alt.layer(*layers)
        .add_params(*_choices(there, facts))
        .properties(height=_HEIGHT, title=above("coefficient, 1 at the last observed step"))
    )
    return Figure(
        "coefficients",
        "Is it a line, and where does it lead?",
        _how(facts, tables.drawn),
        chart,
        "parts",
        wide=True,
        column=110,
        signals=(_PICK, _REACH),
    )


def _choices(parts: list[str], facts: Facts) -> tuple[alt.Parameter, alt.Parameter]:
    pick = alt.param(
        name=_PICK,
        value=None,
        bind=alt.binding_select(
            options=[None, *parts], labels=["the most energetic tensors", *(f"{p} alone" for p in parts)], name="Show "
        ),
    )
    reach = alt.param(
        name=_REACH,
        value=facts.target,
        bind=alt.binding_select(
            options=[facts.target, facts.found.window[-1]],
            labels=["up to the target", "observed steps alone"],
            name="and ",
        ),
    )
    return pick, reach


def _x() -> alt.X:
    return alt.X(
        "step:Q", title="step", scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(format="d", tickCount=8)
    )


def _ruled(facts: Facts) -> list[alt.Chart]:
    """Where the observed steps end, and where the target is; said at the bottom, where no line of a run that moves is."""
    last, target = facts.found.window[-1], facts.target
    rules = (
        plot([{"step": last}, {"step": target}])
        .transform_filter(f"datum.step <= {_REACH}")
        .mark_rule(style="ruled")
        .encode(x=_x())
    )

    def said(step: int, text: str, above_axis: int, **where: Any) -> alt.Chart:
        return (
            plot([{"step": step, "says": text}])
            .transform_filter(f"{_REACH} > {last}")
            .mark_text(style="note", baseline="bottom", **where)
            .encode(x=_x(), y=alt.value(_HEIGHT - above_axis), text="says:N")
        )

    return [
        rules,
        said(last, f"last observed: step {last}", 20, align="left", dx=5),
        said(target, f"target: step {target}", 5, align="right", dx=-5),
    ]


def _curves(tables: curves.Curves, facts: Facts) -> list[alt.Chart]:
    """Lines, points and ends, in the colours of the parts; the whole model larger."""
    color = alt.Color("part:N", scale=alt.Scale(domain=[WHOLE, *facts.parts]), title=None)
    y, whole = alt.Y("value:Q", title=None), alt.datum.part == WHOLE
    tips = [alt.Tooltip("tensor:N"), alt.Tooltip("step:Q"), alt.Tooltip("value:Q", title="of its last", format=".3f")]
    lines = flat(tables.lines, "step", "value").transform_filter(_SHOWN).mark_line(opacity=0.7)
    points = flat(tables.points, "step", "value", "raw").transform_filter(_SHOWN).mark_circle(opacity=0.75)
    ends = plot(tables.targets).transform_filter(_SHOWN).mark_point(shape="diamond", filled=True, opacity=1)
    return [
        lines.encode(
            x=_x(), y=y, color=color, detail="tensor:N", strokeWidth=alt.condition(whole, alt.value(2.5), alt.value(1))
        ),
        points.encode(
            x=_x(),
            y=y,
            color=color,
            size=alt.condition(whole, alt.value(20), alt.value(11)),
            tooltip=[*tips, alt.Tooltip("raw:Q", title="coefficient", format=".4g")],
        ),
        ends.encode(x=_x(), y=y, color=color, size=alt.condition(whole, alt.value(120), alt.value(50)), tooltip=tips),
    ]


def _how(facts: Facts, drawn: int) -> str:
    found, last, target = facts.found, facts.found.window[-1], facts.target
    what = "all tensors that moved" if drawn >= len(found.tensors) else f"the {drawn} most energetic tensors"
    said = (
        f"How far {what} came along their direction, each divided by its value at step {last}, so that 1 is the last "
        f"checkpoint; at least one of each part. Lines are fitted to the whole window; diamonds are what they give for "
        f"the target. Hover over a point for tensor and step."
    )
    if found.judged is None:
        return said
    skill = data.skill_at(found, target)
    if skill is None:
        return f"{said} Step {target} is farther ahead than anything that was held out: nothing vouches for it."
    return f"{said} Predictions as far ahead as step {target} had skill {signed(skill)} with the best recipe."
