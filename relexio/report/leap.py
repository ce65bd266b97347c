"""The page of a leap: its score against the steps that were trained, and against the time that all of it took."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from relexio import atomic
from relexio.engine.resources import Resources
from relexio.report.data import Table
from relexio.report.report import missing, too_small
from relexio.report.theme import COLOURS

_SIZE = {"width": 420, "height": 300}  # pixels of a panel
_COLOURS = [COLOURS["light"]["soft"], COLOURS["light"]["accent"]]
_AXES = {"steps": "trained steps", "minutes": "minutes, evaluations included"}


def write_page(rows: list[dict[str, Any]], lower_is_better: bool, file: Path, resources: Resources) -> str:
    """Draw the rows of a leap's table into one HTML file, in the place of an earlier one. Says where it is, or why not."""
    reason = missing() or too_small(resources)
    if reason:
        return f"no page: {reason}"
    import altair as alt  # these need the extra

    better = "lower is better" if lower_is_better else "higher is better"
    points = alt.Chart(alt.Data(values=segments(rows)))
    panels = [
        points.mark_line(point=True, strokeWidth=2)
        .encode(
            x=alt.X(f"{name}:Q", title=title),
            y=alt.Y("score:Q", title=f"score ({better})", scale=alt.Scale(zero=False)),
            color=alt.Color("kind:N", title=None, scale=alt.Scale(domain=["training", "leap"], range=_COLOURS)),
            detail="part:N",
            order="end:Q",
            tooltip=["kind:N", "round:Q", "score:Q", "steps:Q", "minutes:Q"],
        )
        .properties(**_SIZE)
        for name, title in _AXES.items()
    ]
    text = alt.hconcat(*panels, title="relexio leap: training, and leaps that were taken").to_html(inline=True)
    atomic.write_file(atomic.staging(file), file, text.encode(), durable=False)
    return f"{file}: open it in a browser"


def segments(rows: list[dict[str, Any]]) -> Table:
    """Both ends of each piece of the curve: a round's training, and its leap where one was taken."""
    found: Table = []
    for before, row in pairwise(rows):
        steps, minutes = (before["trained"], row["trained"]), before["total_seconds"] / 60
        ends = [(steps[0], minutes, before["score"])]
        ends.append((steps[1], minutes + row["train_seconds"] / 60, row["trained_score"]))
        ends += [(steps[1], row["total_seconds"] / 60, row["score"])] if row["taken"] else []
        for kind, pair in zip(("training", "leap"), pairwise(ends), strict=False):
            found += [
                {"kind": kind, "part": f"{kind} {row['round']}", "round": row["round"], "end": end,
                 "steps": at, "minutes": round(when, 3), "score": score}
                for end, (at, when, score) in enumerate(pair)
            ]  # fmt: skip
    return found
