"""``relexio findings``."""

from functools import partial

import click
import numpy as np

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, printable, stages, table
from relexio.cli.skill import skill_table
from relexio.engine.resources import Resources
from relexio.store.store import Store
from relexio.verbs.findings import Findings
from relexio.verbs.findings import findings as verb
from relexio.words import describe_steps

_LARGEST, _COLUMNS, _ROWS = 8, 6, 16  # tensors and steps of the coefficients; steps of the denoising view


@on_trajectory(options.rank)
def findings(store: Store, window: tuple[int, ...], resources: Resources, rank: int) -> Result:
    """See whether the findings of the RELEX paper hold on this run.

    Finding 1: the energy by direction. Finding 2: the coefficients over steps, and their lines (--json has them all). The
    ablations of rank and curve, by skill. And what --rank directions throw away, step by step: is it noise?
    """
    found = verb(store, window, rank, resources, stages)
    return Result(found.to_json, partial(_show, found))


def _show(found: Findings) -> None:
    if found.judged is not None and found.judged.doubt is not None:
        note(found.judged.doubt)
    table(
        [
            ("trajectory", found.store.shown),
            ("window", describe_steps(found.window)),
            ("tensors", f"{len(found.tensors)} that moved"),
        ]
    )
    click.echo("\nFinding 1: energy that the first directions keep, over all tensors")
    click.echo("  ".join(f"rank {rank}: {share:.1%}" for rank, share in enumerate(found.spectrum.cumsum()[:5], 1)))
    _show_lines(found)
    _show_ablation(found)
    _show_thrown_away(found)


def _evenly(count: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``count`` steps, evenly spread, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(most, count))})


def _show_lines(found: Findings) -> None:
    low, middle, high = np.quantile([t.line.r_squared for t in found.tensors], [0.1, 0.5, 0.9])
    click.echo("\nFinding 2: coefficients of the first direction, and the line through them")
    click.echo(f"r2 over tensors: median {middle:.3f}, a tenth below {low:.3f}, a tenth above {high:.3f}")
    largest = sorted(found.tensors, key=lambda t: -t.sigma2)[:_LARGEST]
    title = "the tensors with most energy"
    width = max(len(title), *(len(printable(t.name)) for t in largest))
    columns = _evenly(len(found.window), _COLUMNS)
    heads = "".join(f"{f'step {found.window[i]}':>11}" for i in columns)
    click.echo(f"{title:<{width}}{heads}      slope  intercept     r2")
    for t in largest:
        values = "".join(f"{t.coefficients[i]:>11.3g}" for i in columns)
        line = f"{t.line.slope:>11.3g}{t.line.intercept:>11.3g}{t.line.r_squared:>7.3f}"
        click.echo(f"{printable(t.name):<{width}}{values}{line}")


def _show_ablation(found: Findings) -> None:
    rows = found.ablation()
    click.echo("\nAblations of rank and curve: skill by horizon, as in relexio backtest")
    if not rows or found.judged is None:
        click.echo("- (a backtest takes three steps)")
        return
    skill_table(found.judged.test, rows)


def _show_thrown_away(found: Findings) -> None:
    click.echo(
        f"\nWhat rank {found.rank} throws away: share of the squared distance from the base, and whether it is noise"
    )
    click.echo("(cosine of its neighbouring increments, about 0 for noise)")
    click.echo(f"{'step':>8}  thrown away  cosine")
    for i in _evenly(len(found.window), _ROWS):
        inside = 0 < i < len(found.window) - 1
        cosine = f"{found.alike[i - 1]:+.2f}" if inside and not np.isnan(found.alike[i - 1]) else "-"
        click.echo(f"{found.window[i]:>8}  {found.thrown[i]:>11.1%}  {cosine:>6}")
