"""One figure of the report, as a Vega-Lite specification and as a picture, and what several figures share."""

from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from relexio.report.data import Table
from relexio.report.theme import config, palettes

#: The version of Vega-Lite that Altair writes, as vl-convert wants it.
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
_PNG_WIDTH, _PNG_SCALE = 760, 2
_PNG_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"


@dataclass(frozen=True)
class Figure:
    """One figure: what it shows (``title``), how to read it, its chart, and what its y axis is (said above it: no width).

    ``chart`` is None where the run cannot give one; ``how`` says why then. ``height`` and ``column``, the width of one
    entry of its legend, are in pixels. ``wide``: it takes the whole width. ``signals``: what the reader can set.
    """

    title: str
    how: str
    chart: alt.TopLevelMixin | None = None
    measure: str = ""
    height: int = 250
    palette: str = "pair"
    wide: bool = False
    column: int = 130
    signals: tuple[str, ...] = ()

    def spec(self, width: int | str = "container") -> dict[str, Any] | None:
        """The Vega-Lite specification, without colours; None without a chart."""
        if self.chart is None:
            return None
        spec: dict[str, Any] = self.chart.properties(
            width=width,
            height=self.height,
            title=alt.TitleParams(self.measure),
            autosize={"type": "fit-x", "contains": "padding"},
            description=f"{self.title}. {self.how}",
        ).to_dict()
        spec.pop("config", None)
        return spec

    def picture(self, parts: list[str]) -> bytes | None:
        """A PNG in light colours, of a model with these parts; None without a chart."""
        spec = self.spec(_PNG_WIDTH)
        if spec is None:
            return None
        spec["title"] = {"text": self.title, "subtitle": self.measure, "fontSize": 17, "color": "#1a1d21"}
        theme = config("light", _PNG_FONT, palettes(parts)[self.palette]["light"])
        theme["legend"]["columns"] = max(1, _PNG_WIDTH // self.column)
        theme["padding"] = 14
        return vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=_PNG_SCALE, config=theme)


def plot(rows: Table, *lists: str) -> alt.Chart:
    """A chart of rows; ``lists`` are fields that hold lists over steps."""
    chart = alt.Chart(alt.Data(values=rows))
    return chart.transform_flatten(list(lists)) if lists else chart


def tip(field: str, title: Any = alt.Undefined, digits: Any = alt.Undefined) -> alt.Tooltip:
    """One line of a tooltip: a field with its type, a title in place of its name, and the format of its number."""
    return alt.Tooltip(field, title=title, format=digits)


def hover(base: alt.Chart, *tips: alt.Tooltip) -> alt.Chart:
    """Points that nobody sees, on a line, to give its numbers."""
    return base.mark_circle(opacity=0.01, size=60).encode(tooltip=list(tips))


def by(channel: Any, field: str, names: list[str], legend: Any = alt.Undefined, **scale: Any) -> Any:
    """A channel (colour, shape, dash) that tells names apart."""
    return channel(f"{field}:N", scale=alt.Scale(domain=names, **scale), title=None, legend=legend)


def either(test: Any, value: float, other: float) -> Any:
    """One size where a test holds, else the other."""
    return alt.condition(test, alt.value(value), alt.value(other))


def step_axis(ticks: int = 6) -> alt.X:
    """Training steps, from left to right."""
    axis = alt.Axis(format="d", tickCount=ticks)
    return alt.X("step:Q", title="step", scale=alt.Scale(nice=False, zero=False), axis=axis)


def share_axis(**scale: Any) -> alt.Y:
    """Shares, from below to above."""
    axis = alt.Axis(format="~%", title=None, tickCount=6)
    return alt.Y("share:Q", title=None, axis=axis, scale=alt.Scale(**scale))


def horizon_axis(title: str) -> alt.X:
    """Horizons in their order; labels lie, nothing is ruled."""
    axis = alt.Axis(labelAngle=0, grid=False, domain=False, ticks=False)
    return alt.X("horizon:O", sort=None, title=title, axis=axis)
