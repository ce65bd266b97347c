"""``relexio findings``."""

from dataclasses import asdict
from functools import partial

import click
import numpy as np

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, number, printable, stages, table
from relexio.cli.skill import skill_table
from relexio.engine.resources import Resources
from relexio.fit.fit import command
from relexio.methods.linearity import LINEAR, VALUES, Linearity
from relexio.store.store import Store
from relexio.verbs.findings import Findings, linearity
from relexio.verbs.findings import findings as verb
from relexio.words import describe_steps

_LARGEST, _COLUMNS, _ROWS = 8, 6, 16  # tensors and steps of the coefficients; steps of the denoising view
_STRAIGHT = "- (a line through two steps is always straight)"


@on_trajectory(options.rank)
def findings(store: Store, window: tuple[int, ...], resources: Resources, rank: int) -> Result:
    """See whether the findings of the RELEX paper hold on this run.

    Finding 1: the energy by direction. Finding 2: the coefficients over steps, and their lines (--json has them all). How
    many single elements move on a line, beside walks without direction. The ablations of rank and curve, by skill. What
    --rank directions throw away at each step, and whether that is noise.
    """
    run = verb(store, window, rank, resources, stages)
    lines = linearity(store, window, resources, stages)
    return Result(
        partial(_facts, run, lines), partial(_show, run, lines), next=(command("backtest", store, window=window),)
    )


def _facts(run: Findings, lines: Linearity | None) -> object:
    facts = None if lines is None else {**asdict(lines), "share": lines.share, "several_share": lines.several_share}
    return {**run.to_json(), "elements": facts}


def _show(run: Findings, lines: Linearity | None) -> None:
    if run.judged is not None and run.judged.doubt is not None:
        note(run.judged.doubt)
    table(
        [
            ("trajectory", run.store.shown),
            ("window", describe_steps(run.window)),
            ("tensors", f"{len(run.tensors)} that moved"),
        ]
    )
    click.echo("\nFinding 1: energy that the first directions keep, over all tensors")
    click.echo("  ".join(f"rank {rank}: {share:.1%}" for rank, share in enumerate(run.spectrum.cumsum()[:5], 1)))
    click.echo(_held(float(run.spectrum[0]), run.walk[0], ".1%"))
    _show_lines(run)
    _show_elements(lines)
    _show_ablation(run)
    _show_thrown_away(run)


def _held(share: float, walk: float, form: str) -> str:
    """Whether a finding holds: a walk without direction has high figures too, so only what is above them counts."""
    holds, more = ("holds", "more") if round(share, 3) > round(walk, 3) else ("does not hold", "no more")  # as shown
    return f"It {holds} here: {share:{form}} is {more} than a random walk over the same steps has ({walk:{form}})."


def _evenly(count: int, most: int) -> list[int]:
    """Indices of at most ``most`` of ``count`` steps, evenly spread, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(most, count))})


def _show_lines(run: Findings) -> None:
    low, high = np.quantile([t.line.r_squared for t in run.tensors], [0.1, 0.9])
    click.echo("\nFinding 2: coefficients of the first direction, and the line through them")
    click.echo(f"r2 over tensors: median {run.r_squared:.3f}, a tenth below {low:.3f}, a tenth above {high:.3f}")
    if len(run.window) > 2:
        click.echo(_held(run.r_squared, run.walk[1], ".3f"))
    else:
        click.echo(_STRAIGHT)
    largest = sorted(run.tensors, key=lambda t: -t.sigma2)[:_LARGEST]
    title = "the tensors with most energy"
    width = max(len(title), *(len(printable(t.name)) for t in largest))
    columns = _evenly(len(run.window), _COLUMNS)
    heads = "".join(f"{f'step {run.window[i]}':>11}" for i in columns)
    click.echo(f"{title:<{width}}{heads}      slope  intercept     r2")
    for t in largest:
        values = "".join(f"{t.coefficients[i]:>11.3g}" for i in columns)
        line = f"{t.line.slope:>11.3g}{t.line.intercept:>11.3g}{t.line.r_squared:>7.3f}"
        click.echo(f"{printable(t.name):<{width}}{values}{line}")


def _show_elements(lines: Linearity | None) -> None:
    click.echo(f"\nSingle elements: share with a line over the steps of r2 above {LINEAR:g}")
    if lines is None:
        click.echo(_STRAIGHT)
        return
    part = "" if lines.blocks == lines.all_blocks else f"{lines.blocks} of {lines.all_blocks:,} blocks, "
    moved = f"{lines.moved:,} that moved of {lines.elements:,}"
    table(
        [
            (number(lines.share, ".2f"), f"{part}{moved}"),
            (
                number(lines.several_share, ".2f"),
                f"{lines.several:,} with {VALUES} values or more; choosing them favours lines",
            ),
            (number(lines.walk, ".2f"), "a random walk over the same steps"),
            (number(lines.momentum, ".2f"), "a walk with momentum: updates correlated at 0.9 from step to step"),
        ]
    )


def _show_ablation(run: Findings) -> None:
    click.echo("\nAblations of rank and curve: skill by horizon, as in relexio backtest")
    if run.judged is None:
        click.echo("- (a backtest needs three steps)")
    else:
        skill_table(run.judged.test, run.ablation())


def _show_thrown_away(run: Findings) -> None:
    click.echo(
        f"\nWhat rank {run.rank} throws away: share of the squared distance from the base, and whether it is noise"
    )
    click.echo("(cosine of its neighbouring increments, about 0 for noise)")
    click.echo(f"{'step':>8}  thrown away  cosine")
    for i in _evenly(len(run.window), _ROWS):
        inside = 0 < i < len(run.window) - 1
        cosine = f"{run.alike[i - 1]:+.2f}" if inside and not np.isnan(run.alike[i - 1]) else "-"
        click.echo(f"{run.window[i]:>8}  {run.thrown[i]:>11.1%}  {cosine:>6}")
