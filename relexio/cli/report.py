"""``relexio report``."""

from functools import partial
from pathlib import Path

import click

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, stages, table
from relexio.engine.resources import Resources
from relexio.errors import RequestError
from relexio.fit.fit import command
from relexio.report import ReportFiles, ReportRequest, Score, default_page
from relexio.report import report as verb
from relexio.store.storage import local
from relexio.store.store import Store
from relexio.sweep import default_directory, known_scores
from relexio.words import show


@on_trajectory(
    click.option("-o", "--out", help="HTML file to write.  [default: RUN.html for a trajectory RUN.zarr]"),
    click.option("--png", metavar="DIR", help="Also write each figure as a picture into this directory."),
    options.rank,
    click.option(
        "--step",
        type=click.IntRange(min=0),
        help="Target shown beside the coefficients.  [default: the farthest with skill, else twice the last step]",
    ),
)
def report(
    store: Store,
    window: tuple[int, ...],
    resources: Resources,
    rank: int,
    out: str | None,
    png: str | None,
    step: int | None,
) -> Result:
    """Write a page that shows how the run moved, and what to believe about its future.

    One HTML file that needs no network: the verdict in words, the scores of a sweep (run.sweep beside run.zarr), skill of
    the methods, energy by layer, coefficients with their lines, changed elements, and the spectrum. Needs pip install
    'relexio[report]'.
    """
    page: Path = local(out) if out else default_page(store.address)
    try:
        scores = tuple(Score(*score) for score in known_scores(store, window, default_directory(store.address)))
    except RequestError as error:
        note(f"without scores of a sweep: {error}")
        scores = ()
    request = ReportRequest(page, local(png) if png else None, window, rank, step, scores)
    written = verb(store, request, resources, stages)
    facts = {
        "page": str(written.page),
        "bytes": written.size,
        "pictures": [str(path) for path in written.pictures],
        "window": list(window),
        "target": written.target,
    }
    return Result(lambda: facts, partial(_show, written), next=(command("backtest", store, window=window),))


def _show(written: ReportFiles) -> None:
    rows = [("wrote", f"{written.page} ({show(written.size)}): open it in a browser")]
    table([*rows, *(("", str(path)) for path in written.pictures)])
