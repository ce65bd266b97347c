"""``relexio findings``."""

import json
from typing import TYPE_CHECKING

import click

from relexio.cli import options
from relexio.cli.show import by_horizon, note, printable, stages, table
from relexio.words import Selection

if TYPE_CHECKING:
    from relexio.verbs.findings import Findings

_ROWS = 16  # steps of the denoising view


@click.command()
@click.argument("trajectory", type=click.Path())
@options.window
@options.rank
@options.memory
@options.workers
@options.scheduler
@options.as_json
def findings(
    trajectory: str,
    window: Selection | None,
    rank: int,
    memory: int,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """See whether the findings of the RELEX paper hold on this run.

    Finding 1: the energy by direction. Finding 2: the coefficients over steps, and their lines (--json has them all). The
    ablations of rank and curve, by skill. And what --rank directions throw away, step by step: is it noise?
    """
    from relexio.engine.resources import Resources
    from relexio.fit.fit import choose_window
    from relexio.store.store import open_store
    from relexio.verbs.findings import findings as verb

    store = open_store(trajectory)
    with Resources(memory, workers, "cpu", scheduler=scheduler) as resources:
        found = verb(store, choose_window(store, window), rank, resources, stages)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    if found.judged is not None and found.judged.doubt is not None:
        note(found.judged.doubt)
    _show_directions(found)
    _show_lines(found)
    _show_ablation(found)
    _show_thrown(found)


def _show_directions(found: "Findings") -> None:
    from relexio.words import describe_steps

    shares = found.spectrum.cumsum()
    table(
        [
            ("trajectory", found.store.shown),
            ("window", describe_steps(found.window)),
            ("tensors", f"{len(found.tensors)} that moved"),
        ]
    )
    click.echo("\nFinding 1: energy that the first directions keep, over all tensors")
    click.echo("  ".join(f"rank {rank}: {share:.1%}" for rank, share in enumerate(shares[:5], 1)))


def _show_lines(found: "Findings") -> None:
    import numpy as np

    lines = np.array([t.line.r_squared for t in found.tensors])
    low, middle, high = np.quantile(lines, [0.1, 0.5, 0.9])
    click.echo("\nFinding 2: coefficients of the first direction, and the line through them")
    click.echo(f"r2 over tensors: median {middle:.3f}, a tenth below {low:.3f}, a tenth above {high:.3f}")
    largest = sorted(found.tensors, key=lambda t: -t.energy)[:8]
    width = max(len(printable(t.name)) for t in largest)
    picked = [round(i) for i in np.linspace(0, len(found.window) - 1, min(6, len(found.window)))]
    heads = "".join(f"{f'step {found.window[i]}':>11}" for i in picked)
    click.echo(f"{'the tensors with most energy':<{width}}{heads}      slope  intercept     r2")
    for t in largest:
        values = "".join(f"{t.coefficients[i]:>11.3g}" for i in picked)
        click.echo(
            f"{printable(t.name):<{width}}{values}{t.line.slope:>11.3g}{t.line.intercept:>11.3g}{t.line.r_squared:>7.3f}"
        )


def _show_ablation(found: "Findings") -> None:
    rows = found.ablation()
    click.echo("\nAblations of rank and curve: skill by horizon, as in relexio backtest")
    if not rows or found.judged is None:
        click.echo("- (a backtest takes three steps)")
        return
    by_horizon(found.judged.test, rows)


def _show_thrown(found: "Findings") -> None:
    import numpy as np

    click.echo(
        f"\nWhat rank {found.rank} throws away: share of the squared distance from the base, and whether it is noise"
    )
    click.echo("(cosine of its neighbouring increments, about 0 for noise)")
    picked = sorted({round(i) for i in np.linspace(0, len(found.window) - 1, min(_ROWS, len(found.window)))})
    click.echo(f"{'step':>8}  thrown away  cosine")
    for i in picked:
        inside = 0 < i < len(found.window) - 1
        cosine = f"{found.alike[i - 1]:+.2f}" if inside and not np.isnan(found.alike[i - 1]) else "-"
        click.echo(f"{found.window[i]:>8}  {found.thrown[i]:>11.1%}  {cosine:>6}")
