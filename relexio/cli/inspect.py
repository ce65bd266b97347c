"""``relexio inspect``."""

import json
from typing import TYPE_CHECKING

import click

from relexio.cli import options
from relexio.cli.show import note, printable, stages, table
from relexio.words import Selection

if TYPE_CHECKING:
    from relexio.methods.line_tests import Straightness
    from relexio.verbs.inspect import Inspection


@click.command()
@click.argument("trajectory", type=click.Path())
@options.window
@options.rank
@options.memory
@options.workers
@options.scheduler
@options.as_json
def inspect(
    trajectory: str,
    window: Selection | None,
    rank: int,
    memory: int,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Show what a trajectory holds, and how each tensor moved.

    energy is the share of the movement that --rank directions keep, r2 how straight the first one runs. High values
    of both certify nothing: skill does, where a prediction inside the window beats keeping its last checkpoint (> 0).
    """
    from relexio.engine.resources import Resources
    from relexio.fit.fit import choose_window
    from relexio.store.store import open_store
    from relexio.verbs.inspect import inspect as verb

    store = open_store(trajectory)
    with Resources(memory, workers, scheduler=scheduler) as resources:
        found = verb(store, choose_window(store, window), rank, resources, stages)
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        _show(found)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _said(value: float | None, form: str, more: str) -> str:
    return (
        "- (nothing to fit: it takes two steps, and tensors that change)" if value is None else f"{value:{form}}{more}"
    )


def _half(straight: "Straightness | None") -> str:
    if straight is None or straight.split_half is None:
        return "- (it takes four steps)"
    return f"{straight.split_half:.2f}, cosine of the directions of odd and even increments (a random walk: about 0)"


def _show(found: "Inspection") -> None:
    from relexio.words import describe_steps, show

    size, tested = found.sizes, found.backtest
    last, straight = found.window[-1], found.straight
    walk = ("", "")
    if straight is not None:
        walk = (
            f" (rank 1 of a random walk: {straight.walk_energy:.1%})",
            f" (a random walk: {straight.walk_r_squared:.3f})",
        )
    table(
        [
            ("trajectory", found.store.shown),
            ("holds", describe_steps(found.store.steps)),
            ("window", describe_steps(found.window)),
            (
                "size",
                f"{show(size.steps)} for {show(size.checkpoints)} of checkpoints ({size.compression:.1f} times smaller)",
            ),
            ("", f"{show(size.base)} for the base, {show(size.cache)} of kept fits"),
            ("changed", f"{found.changed[last]:.1%} of all elements at step {last}"),
            ("energy", _said(found.energy, ".1%", f" of the movement is along rank {found.rank}{walk[0]}")),
            ("r2", _said(found.r_squared, ".3f", f", the median of {len(found.moved)} tensors that changed{walk[1]}")),
            ("split-half", _half(found.straight)),
            ("slope", _said(found.slope, ".3g", " a step")),
            (
                "skill",
                f"{_number(found.skill, '+.2f')} inside the window, at {len(tested.folds)} cut-offs (relexio backtest tells more)"
                if tested
                else "- (a backtest needs three steps)",
            ),
        ]
    )
    if found.doubt is not None:
        note(found.doubt)
    for text in straight.signs if straight else ():
        note(f"not one line: {text}")
    width = max(len(t.name) for t in found.tensors)
    click.echo(f"\n{'tensor':<{width}}  {'elements':>11}  changed  energy     r2       slope   skill")
    for t in found.tensors:
        click.echo(
            f"{printable(t.name):<{width}}  {t.size:>11,}  {t.changed:>7.1%}  {_number(t.energy, '6.3f'):>6}  "
            f"{_number(t.line.r_squared if t.line else None, '5.3f'):>5}  "
            f"{_number(t.line.slope if t.line else None, '10.3g'):>10}  {_number(t.errors.skill, '+6.2f'):>6}"
        )
