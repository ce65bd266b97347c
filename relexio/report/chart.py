"""One figure of the report, and what several of them share."""

from dataclasses import dataclass
from typing import Any

import altair as alt

from relexio.report.data import Table

Spec = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One figure: what it shows (``title``), how to read it, whether it takes the whole width, and whose colours it has.

    ``chart`` is None where the run cannot give one; ``how`` says why then. ``column``: the width of one entry of its legend
    in pixels. ``signals``: what the reader can set.
    """

    name: str
    title: str
    how: str
    chart: alt.TopLevelMixin | None
    palette: str = "pair"
    wide: bool = False
    column: int = 130
    signals: tuple[str, ...] = ()

    def spec(self, width: int | str = "container") -> Spec | None:
        """The Vega-Lite specification, without colours; None without a chart."""
        if self.chart is None:
            return None
        spec: Spec = self.chart.properties(
            width=width, autosize={"type": "fit-x", "contains": "padding"}, description=f"{self.title}. {self.how}"
        ).to_dict()
        spec.pop("config", None)
        return spec


def plot(rows: Table) -> alt.Chart:
    """A chart of rows as they are."""
    return alt.Chart(alt.Data(values=rows))


def flat(rows: Table, *fields: str) -> alt.Chart:
    """A chart of rows whose lists run over steps."""
    return plot(rows).transform_flatten(list(fields))


def above(text: str) -> alt.TitleParams:
    """What the y axis is, above it: there it takes no width."""
    return alt.TitleParams(text)


def percent() -> alt.Axis:
    """An axis of shares."""
    return alt.Axis(format="~%", title=None, tickCount=6)


def flat_axis() -> alt.Axis:
    """Of a heat map or a scale of names: labels lie, nothing is ruled."""
    return alt.Axis(labelAngle=0, grid=False, domain=False, ticks=False)


def over_steps() -> alt.X:
    """Training steps, from left to right."""
    return alt.X(
        "step:Q", title="step", scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(format="d", tickCount=6)
    )
