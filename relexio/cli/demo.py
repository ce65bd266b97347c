"""``relexio demo``."""

import textwrap
from pathlib import Path

import click

from relexio.cli.show import stages
from relexio.engine.resources import Resources
from relexio.methods.verdict import caveat
from relexio.report import ReportRequest, missing, report
from relexio.verbs.backtest import EVAL
from relexio.verbs.demo.run import TARGET, WINDOW_END, Outcome, free_directory, run
from relexio.verbs.demo.words import bars, head, sentences

_WIDTH = 80


@click.command()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="A new directory for its files.  [default: relexio-demo]"
)
def demo(out: Path | None) -> None:
    """Try it all on a real, tiny RLVR run that comes with relexio.

    Writes its checkpoints, converts the first 50 steps, backtests them, predicts as far as the backtest recommends and
    step 200, and measures how many problems each checkpoint solves, beside step 200 as trained.
    """
    directory = out or free_directory(Path("relexio-demo"))
    _say(f"GRPO on additions, 1.6 M parameters: a checkpoint every 5 steps up to {WINDOW_END}, and step {TARGET}.")
    outcome = run(directory, stages, _say)
    click.echo("\n".join(["", head(outcome), *bars(outcome), ""]))
    for sentence in (*sentences(outcome), caveat()):
        _say(sentence)
    _report(outcome, directory / "report.html")
    click.echo(f"\nEverything is in {directory}; look around, and remove it when you are done.")
    click.echo("Next, on your own run:")
    sweep = f"sweep run.zarr {EVAL}"
    for command in ("convert CHECKPOINTS --base MODEL -o run.zarr", "backtest run.zarr", "predict run.zarr", sweep):
        click.echo(f"$ relexio {command}")


def _say(text: str) -> None:
    """A command as it is, to be copied; a sentence in lines."""
    click.echo(text if text.startswith("$ ") else textwrap.fill(text, _WIDTH))


def _report(outcome: Outcome, page: Path) -> None:
    """Write the page, if what draws it is installed; else say that it was not, and why."""
    request = ReportRequest(page, None, outcome.window)
    click.echo()
    _say(f"$ {request.command(outcome.store)}")
    if reason := missing():
        _say(f"This was not run: {reason}.")
    else:
        report(outcome.store, request, Resources(), stages)
        click.echo(f"Wrote {page}: open it in a browser.")
