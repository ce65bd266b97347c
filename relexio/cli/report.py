"""``relexio report``."""

import json
from pathlib import Path

import click

from relexio.cli import options
from relexio.cli.show import stages, table
from relexio.words import Selection


@click.command()
@click.argument("trajectory", type=click.Path())
@click.option("-o", "--out", help="HTML file to write.  [default: RUN.html for a trajectory RUN.zarr]")
@click.option("--png", metavar="DIR", help="Write each figure as a picture into this directory too.")
@options.window
@options.rank
@click.option(
    "--step",
    type=click.IntRange(min=0),
    help="Target shown beside the coefficients.  [default: the farthest with skill, else twice the last step]",
)
@options.memory
@options.workers
@options.scheduler
@options.as_json
def report(
    trajectory: str,
    out: str | None,
    png: str | None,
    window: Selection | None,
    rank: int,
    step: int | None,
    memory: int,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Write a page that shows how the run moved, and what to believe of its future.

    One HTML file that needs no network: the verdict in words, skill of the methods, energy by layer, coefficients with
    their lines, changed elements, and the spectrum. Needs pip install 'relexio[report]'.
    """
    from relexio.engine.resources import Resources
    from relexio.fit.fit import choose_window
    from relexio.report import Request, default_page
    from relexio.report import report as verb
    from relexio.store.storage import local
    from relexio.store.store import open_store
    from relexio.words import show

    store = open_store(trajectory)
    page: Path = local(out) if out else default_page(store.address)
    request = Request(page, local(png) if png else None, choose_window(store, window), rank, step)
    with Resources(memory, workers, scheduler=scheduler) as resources:
        written = verb(store, request, resources, stages)
    if as_json:
        facts = {
            "page": str(written.page),
            "bytes": written.size,
            "pictures": [str(path) for path in written.pictures],
            "window": list(request.window),
            "target": written.target,
        }
        click.echo(json.dumps(facts))
        return
    rows = [("wrote", f"{written.page} ({show(written.size)}): open it in a browser")]
    rows += [("", str(path)) for path in written.pictures]
    table(rows)
