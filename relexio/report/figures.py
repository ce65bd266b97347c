"""From tables to figures: Vega-Lite specifications, made with Altair. Pure; colours come from a theme, apart."""

from typing import Any

import altair as alt
import numpy as np

from relexio.report import data
from relexio.report.chart import Figure, by, either, horizon_axis, hover, plot, share_axis, step_axis, tip
from relexio.report.coefficients import coefficients
from relexio.report.data import RUN, WALK, WHOLE, Facts, number, signed

_SKILL = tip("skill:Q", "skill", "+.3f")


def _untested(facts: Facts) -> str:
    if facts.findings.judged is None:
        return f"A backtest needs at least 3 observed steps; this window has {len(facts.findings.window)}."
    return "No method could be tried at every cut-off: the window has too few steps, or nothing moved between them."


def scores(facts: Facts) -> Figure:
    """Scores of a sweep against the step."""
    title = "What are predictions worth at the task?"
    if not facts.scores:
        how = "Not measured. Only your own evaluation can say: relexio sweep runs it, and the next report shows the scores."
        return Figure(title, how, wide=True)
    rows, known = data.score_rows(facts.scores), data.last_observed(facts.scores, facts.findings.window[-1])
    series = list(dict.fromkeys(row["series"] for row in rows))
    base = plot(rows).encode(
        x=step_axis().scale(zero=True),
        y=alt.Y("score:Q", title=None, scale=alt.Scale(zero=False)),
        color=by(alt.Color, "series", series),
    )
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=by(alt.Shape, "series", series),
        tooltip=[
            tip("series:N", "of"),
            tip("step:Q"),
            tip("score:Q", "score", ".4f"),
            tip("error:Q", "standard error", ".3f"),
        ],
    )
    chart = base.mark_rule(strokeWidth=1).encode(y="low:Q", y2="high:Q") + base.mark_line() + points
    how = "Scores of your own evaluation over steps, as relexio sweep has measured them. Each curve is one recipe."
    if known is not None:
        chart = plot([{"known": number(known)}]).mark_rule(style="ruled").encode(y="known:Q") + chart
        how += " The dashed line is the last observed checkpoint: only what is better than it is a gain."
    if any(row["error"] is not None for row in rows):
        how += " Bars are one standard error to either side."
    return Figure(title, how, chart, "score", 300, "methods", wide=True, column=250)


def skill(facts: Facts) -> Figure:
    """Skill against horizon for the best recipe of each method."""
    title, lines = "Do predictions beat keeping the last checkpoint?", data.skill_lines(facts.findings)
    if lines is None:
        return Figure(title, _untested(facts), wide=True)
    names = {name: f"{name} (recommended)" if name == lines.first else name for name in lines.methods}
    rows = [{**row, "method": names[row["method"]]} for row in lines.rows]
    domain, first = list(names.values()), alt.datum.method == names.get(lines.first or "", "")
    y_axis = alt.Axis(format="+.2~f", labelExpr="datum.value == 0 ? '0' : datum.label")
    base = plot(rows).encode(
        x=horizon_axis("up to this many times the last known step"),
        y=alt.Y("skill:Q", title=None, scale=alt.Scale(domain=[lines.floor, lines.top], nice=False), axis=y_axis),
        color=by(alt.Color, "method", domain),
    )
    line = base.mark_line(clip=True, strokeWidth=1.5)
    best = base.transform_filter(first).mark_line(clip=True, strokeWidth=4)
    points = base.mark_point(clip=True, filled=True, opacity=1).encode(
        shape=by(alt.Shape, "method", domain),
        size=either(first, 110, 50),
        tooltip=[tip("method:N"), tip("horizon:N", "up to"), _SKILL],
    )
    zero = plot([{"zero": 0}]).mark_rule(style="zero").encode(y="zero:Q")
    how = (
        "The best recipe of each method, fitted up to several earlier steps and compared with steps that were really trained "
        "after them. Above the zero line it came nearer to them than keeping the last checkpoint; 1 would be perfect."
    )
    if lines.floor > -1 or lines.below:
        how += f" The figure ends at {signed(lines.floor)}: lines that leave it are worse."
    if lines.below:
        how += f" Worse everywhere, and not drawn: {', '.join(lines.below)}."
    return Figure(title, how, zero + line + best + points, "skill", 300, "methods", wide=True, column=250)


def energy(facts: Facts) -> Figure:
    """Heat map of the energy that the rank keeps, by layer and part."""
    rows, layers = data.energy_cells(facts.findings), data.layers(facts.findings)
    rank, walk = facts.findings.rank, facts.walk.energy
    kept = alt.Scale(domain=[min([walk, *(row["kept"] for row in rows)]), 1])
    flush = alt.Axis(labelAngle=0, labelOverlap="greedy", labelSeparation=3, grid=False, domain=False)
    columns = alt.Scale(domain=layers, paddingInner=0.05)
    legend = alt.Legend(format=".0%", gradientLength=220, tickCount=5)
    cells = plot(rows).encode(
        x=alt.X("layer:O", sort=layers, title="layer", scale=columns, axis=flush),
        y=_part_axis(facts, grid=False).scale(paddingInner=0.05),
        color=alt.Color("kept:Q", title=None, scale=kept, legend=legend),
        tooltip=[
            tip("part:N"),
            tip("layer:N"),
            tip("kept:Q", "energy kept", ".1%"),
            tip("share:Q", "of the model's energy", ".2%"),
            tip("r2:Q", "r2 of the line", ".3f"),
            tip("tensors:Q"),
        ],
    )
    how = (
        f"The share of each tensor's movement that lies along {_directions(rank)}, by layer and part of the model "
        f"(layer “none”: outside the layers). Lighter is straighter. A random walk over the same steps keeps {walk:.0%}: "
        f"only what is well above that says anything."
    )
    height = max(24 * len(facts.parts), 60)
    title = "Where did the model move along a straight line?"
    return Figure(title, how, cells.mark_rect(), f"energy that rank {rank} keeps", height, wide=True)


def _part_axis(facts: Facts, **axis: Any) -> alt.Y:
    return alt.Y("part:N", sort=facts.parts, title=None, axis=alt.Axis(domain=False, **axis))


def _directions(rank: int) -> str:
    return "one direction" if rank == 1 else f"{rank} directions"


def changed(facts: Facts) -> Figure:
    """Changed share over steps, of the whole model and by part."""
    color = by(alt.Color, "part", [WHOLE, *facts.parts])
    base = plot(data.changed_shares(facts), "step", "share").encode(x=step_axis(), y=share_axis(), color=color)
    lines = base.mark_line().encode(strokeWidth=either(alt.datum.part == WHOLE, 3.5, 1.5))
    points = hover(base, tip("part:N"), tip("step:Q"), tip("share:Q", "changed", ".2%"))
    how = "The share of elements whose bits differ from the base."
    if any(tensor.kind.name == "bf16" for tensor in facts.findings.store.tensors):
        how += " In bf16 an update smaller than the last bit changes no element."
    title = "How much of the model changed at all?"
    return Figure(title, how, lines + points, "changed elements", palette="parts", column=110)


def spectrum(facts: Facts) -> Figure:
    """The singular spectrum beside that of a random walk."""
    decades = alt.Axis(format="~%", title=None, values=[1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4, 1e-5])
    base = plot(data.energy_by_direction(facts)).encode(
        x=alt.X("direction:O", title="direction", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("share:Q", title=None, scale=alt.Scale(type="log", nice=False, domainMax=1), axis=decades),
        color=by(alt.Color, "of", [RUN, WALK]),
    )
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=by(alt.Shape, "of", [RUN, WALK]),
        tooltip=[tip("of:N", "of"), tip("direction:O"), tip("share:Q", "of the energy", ".2%")],
    )
    how = (
        "The share of the movement along each tensor's first, second, third direction and so on, over all tensors. One "
        "direction counts where the first point lies high and the others fall off faster than those of a random walk."
    )
    chart = base.mark_line(opacity=0.7) + points
    return Figure("How many directions does the run need?", how, chart, "share of the energy (log scale)")


def thrown(facts: Facts) -> Figure:
    """What the rank throws away step by step."""
    rank, legend = facts.findings.rank, alt.Legend(symbolType="stroke", symbolSize=400)
    base = plot(data.left_out(facts), "step", "share").encode(x=step_axis(), y=share_axis(domainMin=0, nice=True))
    lines = base.mark_line(strokeWidth=2.5).encode(
        color=by(alt.Color, "of", [RUN, WALK], legend),
        strokeDash=by(alt.StrokeDash, "of", [RUN, WALK], legend, range=[[1, 0], [5, 4]]),
    )
    points = hover(base, tip("of:N", "of"), tip("step:Q"), tip("share:Q", "thrown away", ".1%"))
    how = (
        f"The share of the way from the base to each step that {_directions(rank)} cannot express. It is largest for "
        f"the first steps, which lie before the direction has settled."
    )
    cosines = facts.findings.alike[~np.isnan(facts.findings.alike)]
    if len(cosines):
        drift = float(cosines.mean())
        how += (
            f" Neighbouring pieces of what is left out have a cosine of {signed(drift)}: "
            f"{'it drifts, and is not mere noise' if drift > 0.2 else 'about 0 is noise'}."
        )
    return Figure(f"What does rank {rank} throw away?", how, lines + points, "left out of each delta")


def parts(facts: Facts) -> Figure:
    """Skill by part of the model for the best recipe."""
    title, rows = "Which parts can be predicted?", data.skill_by_part(facts.findings)
    if not rows:
        return Figure(title, _untested(facts))
    reach = min(max(0.1, *(abs(row["skill"]) for row in rows)), 1.0)
    scale = alt.Scale(domain=[-reach, reach], domainMid=0, clamp=True, interpolate="rgb")
    base = plot(rows).encode(x=horizon_axis("times the last known step"), y=_part_axis(facts))
    cells = base.mark_rect().encode(
        color=alt.Color("skill:Q", legend=None, title=None, scale=scale),
        tooltip=[tip("part:N"), tip("horizon:N", "up to"), _SKILL],
    )
    strong = alt.when(f"abs(datum.skill) > {0.8 * reach}").then(alt.value("white"))
    numbers = base.mark_text(style="value").encode(text="said:N", color=strong)
    how = "Skill of the best recipe, part by part. Blue and + beats keeping the last checkpoint, orange and − does not."
    if facts.findings.judged is not None and (options := facts.findings.judged.excluded()):
        how += f" Parts that are orange everywhere are better left as they are: relexio predict {' '.join(options)}."
    height = max(24 * len({row["part"] for row in rows}), 250)
    return Figure(title, how, cells + numbers, "skill", height, "parts")


#: The figures in the order of the page. A figure's name, in the page and of its picture, is that of its function.
FIGURES = {make.__name__: make for make in (scores, skill, energy, coefficients, changed, spectrum, thrown, parts)}


def figures(facts: Facts) -> dict[str, Figure]:
    """All figures of a report by their names, in the order of the page."""
    return {name: make(facts) for name, make in FIGURES.items()}
