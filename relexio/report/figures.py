"""From tables to figures: Vega-Lite specifications, made with Altair. Pure; colours come from a theme, apart."""

from collections.abc import Callable

import altair as alt

from relexio.report import data
from relexio.report.chart import Figure, above, flat, flat_axis, over_steps, percent, plot
from relexio.report.coefficients import coefficients
from relexio.report.data import RUN, WALK, WHOLE, Facts, signed


def figures(facts: Facts) -> list[Figure]:
    """All figures of a report, in the order of the page."""
    makers: tuple[Callable[[Facts], Figure], ...] = (skill, energy, coefficients, changed, spectrum, thrown, parts)
    return [make(facts) for make in makers]


_SMALL = 250  # pixels: the height of figures that stand side by side
_NOT_TESTED = "A backtest takes at least three observed steps; this window has {}."
_NOT_TRIED = "No method could be tried at every cut-off: the window has too few steps."


def _untested(facts: Facts) -> str:
    found = facts.found
    return _NOT_TESTED.format(len(found.window)) if found.judged is None else _NOT_TRIED


def skill(facts: Facts) -> Figure:
    """Skill against horizon for the best recipe of each method."""
    title, found = "Do predictions beat keeping the last checkpoint?", data.skills(facts.found)
    if found is None:
        return Figure("skill", title, _untested(facts), None, wide=True)
    names = {name: f"{name} (recommended)" if name == found.first else name for name in found.methods}
    rows = [{**row, "method": names[row["method"]]} for row in found.rows]
    domain, first = list(names.values()), names.get(found.first or "", "")
    base = plot(rows).encode(
        x=alt.X("horizon:O", sort=None, title="up to so many times the last known step", axis=flat_axis()),
        y=alt.Y(
            "skill:Q",
            title=None,
            scale=alt.Scale(domain=[found.floor, found.top], nice=False),
            axis=alt.Axis(format="+.2~f", labelExpr="datum.value == 0 ? '0' : datum.label"),
        ),
        color=alt.Color("method:N", scale=alt.Scale(domain=domain), title=None),
    )
    thick = alt.datum.method == first
    line = base.mark_line(clip=True, strokeWidth=1.5)
    best = base.transform_filter(thick).mark_line(clip=True, strokeWidth=4)
    points = base.mark_point(clip=True, filled=True, opacity=1).encode(
        shape=alt.Shape("method:N", scale=alt.Scale(domain=domain), title=None),
        size=alt.condition(thick, alt.value(110), alt.value(50)),
        tooltip=[
            alt.Tooltip("method:N"),
            alt.Tooltip("horizon:N", title="up to"),
            alt.Tooltip("skill:Q", format="+.3f"),
        ],
    )
    zero = plot([{"zero": 0}]).mark_rule(style="zero").encode(y="zero:Q")
    how = (
        "The best recipe of each method, fitted up to several earlier steps and held against steps that were really trained "
        "after them. Above the zero line it came nearer to them than keeping the last checkpoint; 1 would be perfect."
    )
    if found.floor > -1 or found.below:
        how += f" The figure ends at {signed(found.floor)}: lines that leave it are worse."
    if found.below:
        how += f" Worse everywhere, and not drawn: {', '.join(found.below)}."
    chart = (zero + line + best + points).properties(height=300, title=above("skill"))
    return Figure("skill", title, how, chart, "methods", wide=True, column=250)


def energy(facts: Facts) -> Figure:
    """Heat map of the energy that the rank keeps, by layer and part."""
    found, rows = facts.found, data.energy(facts.found)
    walk = facts.walk_energy
    low = min([walk, *(row["kept"] for row in rows)])
    order = [part for part in facts.parts if part in {row["part"] for row in rows}]
    chart = (
        plot(rows)
        .mark_rect()
        .encode(
            x=alt.X(
                "layer:O",
                sort=data.layers(found),
                title="layer",
                scale=alt.Scale(domain=data.layers(found), paddingInner=0.05),
                axis=alt.Axis(labelAngle=0, labelOverlap="greedy", labelSeparation=3, grid=False, domain=False),
            ),
            y=alt.Y(
                "part:N",
                sort=order,
                title=None,
                scale=alt.Scale(paddingInner=0.05),
                axis=alt.Axis(domain=False, grid=False),
            ),
            color=alt.Color(
                "kept:Q",
                title=None,
                scale=alt.Scale(domain=[low, 1]),
                legend=alt.Legend(format=".0%", gradientLength=220, tickCount=5),
            ),
            tooltip=[
                alt.Tooltip("part:N"),
                alt.Tooltip("layer:N"),
                alt.Tooltip("kept:Q", title="energy kept", format=".1%"),
                alt.Tooltip("share:Q", title="of the model's energy", format=".2%"),
                alt.Tooltip("r2:Q", title="r2 of the line", format=".3f"),
                alt.Tooltip("tensors:Q"),
            ],
        )
        .properties(height=max(24 * len(order), 60), title=above(f"energy that rank {found.rank} keeps"))
    )
    how = (
        f"The share of each tensor's movement that lies along {_directions(found.rank)}, by layer and part of the model "
        f"(layer “none”: outside the layers). Lighter is straighter. A random walk over the same steps keeps {walk:.0%}: "
        f"only what is well above that says anything."
    )
    return Figure("energy", "Where did the model move along a straight line?", how, chart, wide=True)


def _directions(rank: int) -> str:
    return "one direction" if rank == 1 else f"{rank} directions"


def changed(facts: Facts) -> Figure:
    """Changed share over steps, of the whole model and by part."""
    rows = data.changed(facts)
    whole = alt.datum.part == WHOLE
    base = flat(rows, "step", "share").encode(
        x=over_steps(),
        y=alt.Y("share:Q", title=None, axis=percent()),
        color=alt.Color("part:N", scale=alt.Scale(domain=[row["part"] for row in rows]), title=None),
    )
    lines = base.mark_line().encode(strokeWidth=alt.condition(whole, alt.value(3.5), alt.value(1.5)))
    points = base.mark_circle(opacity=0.01, size=60).encode(
        tooltip=[
            alt.Tooltip("part:N"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("share:Q", title="changed", format=".2%"),
        ]
    )
    how = (
        "The share of elements whose bits differ from the base. In bf16 an update smaller than the last bit changes none."
        if any(t.kind.name == "bf16" for t in facts.found.store.tensors)
        else "The share of elements whose bits differ from the base."
    )
    chart = (lines + points).properties(height=_SMALL, title=above("changed elements"))
    return Figure("changed", "How much of the model changed at all?", how, chart, "parts", column=110)


def _pair() -> alt.Color:
    return alt.Color("of:N", scale=alt.Scale(domain=[RUN, WALK]), title=None)


def _decades() -> alt.Axis:
    return alt.Axis(format="~%", title=None, values=[1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4, 1e-5])


def spectrum(facts: Facts) -> Figure:
    """The singular spectrum beside that of a random walk."""
    base = plot(data.spectrum(facts.found)).encode(
        x=alt.X("direction:O", title="direction", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("share:Q", title=None, scale=alt.Scale(type="log", nice=False, domainMax=1), axis=_decades()),
        color=_pair(),
    )
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=alt.Shape("of:N", scale=alt.Scale(domain=[RUN, WALK]), title=None),
        tooltip=[
            alt.Tooltip("of:N", title="of"),
            alt.Tooltip("direction:O"),
            alt.Tooltip("share:Q", title="of the energy", format=".2%"),
        ],
    )
    how = (
        "The share of the movement along each tensor's first, second, third direction and so on, over all tensors. One "
        "direction counts where the first point lies high and the others fall off faster than those of a random walk."
    )
    chart = (base.mark_line(opacity=0.7) + points).properties(
        height=_SMALL, title=above("share of the energy (log scale)")
    )
    return Figure("spectrum", "How many directions does the run need?", how, chart)


def thrown(facts: Facts) -> Figure:
    """What the rank throws away step by step."""
    found, stroke = facts.found, alt.Legend(symbolType="stroke", symbolSize=400)
    base = flat(data.thrown(found), "step", "share").encode(
        x=over_steps(),
        y=alt.Y("share:Q", title=None, axis=percent(), scale=alt.Scale(domainMin=0)),
        color=alt.Color("of:N", scale=alt.Scale(domain=[RUN, WALK]), title=None, legend=stroke),
        strokeDash=alt.StrokeDash(
            "of:N", scale=alt.Scale(domain=[RUN, WALK], range=[[1, 0], [5, 4]]), title=None, legend=stroke
        ),
    )
    points = (
        flat(data.thrown(found), "step", "share")
        .mark_circle(opacity=0.01, size=60)
        .encode(
            x=over_steps(),
            y="share:Q",
            tooltip=[
                alt.Tooltip("of:N", title="of"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("share:Q", title="thrown away", format=".1%"),
            ],
        )
    )
    how = (
        f"The share of the way from the base to each step that {_directions(found.rank)} cannot express. It is largest for "
        f"the first steps, which lie before the direction has settled."
    )
    if (drift := facts.drift) is not None:
        how += (
            f" Neighbouring pieces of what is left out have a cosine of {signed(drift)}: "
            f"{'it drifts, and is not mere noise' if drift > 0.2 else 'about 0 is noise'}."
        )
    chart = (base.mark_line(strokeWidth=2.5) + points).properties(height=_SMALL, title=above("left out of each delta"))
    return Figure("thrown", f"What does rank {found.rank} throw away?", how, chart)


def parts(facts: Facts) -> Figure:
    """Skill by part of the model for the best recipe."""
    title, rows = "Which parts can be predicted?", data.parts(facts.found)
    if not rows:
        return Figure("parts", title, _untested(facts), None)
    reach = min(max(0.1, *(abs(row["skill"]) for row in rows)), 1.0)
    base = plot(rows).encode(
        x=alt.X("horizon:O", sort=None, title="times the last known step", axis=flat_axis()),
        y=alt.Y("part:N", sort=facts.parts, title=None, axis=alt.Axis(domain=False)),
    )
    cells = base.mark_rect().encode(
        color=alt.Color(
            "skill:Q",
            legend=None,
            title=None,
            scale=alt.Scale(domain=[-reach, reach], domainMid=0, clamp=True, interpolate="rgb"),
        ),
        tooltip=[
            alt.Tooltip("part:N"),
            alt.Tooltip("horizon:N", title="up to"),
            alt.Tooltip("skill:Q", format="+.3f"),
        ],
    )
    strong = f"abs(datum.skill) > {0.8 * reach}"
    says = base.mark_text(style="value").encode(text="said:N", color=alt.when(strong).then(alt.value("white")))
    how = (
        "Skill of the best recipe, part by part. Blue and + beats keeping the last checkpoint, orange and − does not: such "
        "parts are better left as they are (relexio predict --exclude)."
    )
    height = max(24 * len({row["part"] for row in rows}), _SMALL)
    chart = (cells + says).properties(height=height, title=above("skill"))
    return Figure("parts", title, how, chart, "parts")
