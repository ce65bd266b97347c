"""``relexio inspect``."""

from functools import partial

import click

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, number, printable, stages, table
from relexio.engine.resources import Resources
from relexio.fit.fit import command
from relexio.store.store import Store
from relexio.verbs.inspect import Inspection
from relexio.verbs.inspect import inspect as verb
from relexio.words import describe_steps, show


@on_trajectory(options.rank)
def inspect(store: Store, window: tuple[int, ...], resources: Resources, rank: int) -> Result:
    """Show what a trajectory holds, and how each tensor moved.

    energy is the share of the movement that --rank directions keep, r2 how straight the first one runs. High values
    of both prove nothing. Skill above 0 is better evidence: a prediction inside the window was nearer than the last
    checkpoint.
    """
    inspection = verb(store, window, rank, resources, stages)
    return Result(inspection.to_json, partial(_show, inspection), next=(command("backtest", store, window=window),))


def _figure(value: float | None, form: str, more: str) -> str:
    if value is None:
        return "- (nothing to fit: this needs two steps and tensors that change)"
    return f"{value:{form}}{more}"


def _split_half(inspection: Inspection) -> str:
    straight = inspection.straight
    if straight is None or straight.split_half is None:
        return "- (needs four steps)"
    return f"{straight.split_half:.2f}, cosine of the directions of odd and even increments (a random walk: about 0)"


def _skill(inspection: Inspection) -> str:
    if inspection.backtest is None:
        return "- (a backtest needs three steps)"
    recipe, cut_offs = inspection.backtest.trials[0].recipe, len(inspection.backtest.folds)
    where = f"{recipe.label}, inside the window at {cut_offs} cut-off{'s' * (cut_offs != 1)}"
    return f"{number(inspection.skill, '+.2f')} of {where} (relexio backtest compares all methods)"


def _show(inspection: Inspection) -> None:
    size, last, straight = inspection.sizes, inspection.window[-1], inspection.straight
    moved = len(inspection.moved)
    walk_energy = f" (rank 1 of a random walk: {straight.walk_energy:.1%})" if straight else ""
    walk_r2 = f" (a random walk: {straight.walk_r_squared:.3f})" if straight else ""
    smaller = f"{show(size.checkpoints)} of checkpoints ({size.compression:.1f} times smaller)"
    table(
        [
            ("trajectory", inspection.store.shown),
            ("holds", describe_steps(inspection.store.steps)),
            ("window", describe_steps(inspection.window)),
            ("size", f"{show(size.steps)} for {smaller}"),
            ("", f"{show(size.base)} for the base, {show(size.cache)} of kept fits"),
            ("changed", f"{inspection.changed[last]:.1%} of all elements at step {last}"),
            (
                "energy",
                _figure(inspection.energy, ".1%", f" of the movement is along rank {inspection.rank}{walk_energy}"),
            ),
            ("r2", _figure(inspection.r_squared, ".3f", f", the median of {moved} tensors that changed{walk_r2}")),
            ("split-half", _split_half(inspection)),
            ("slope", _figure(inspection.slope, ".3g", " a step")),
            ("skill", _skill(inspection)),
        ]
    )
    if inspection.doubt is not None:
        note(inspection.doubt)
    for text in straight.signs if straight else ():
        note(f"not one line: {text}")
    width = max(len(printable(t.name)) for t in inspection.tensors)
    click.echo(f"\n{'tensor':<{width}}  {'elements':>11}  changed  energy     r2       slope   skill")
    for t in inspection.tensors:
        r2, slope = (t.line.r_squared, t.line.slope) if t.line else (None, None)
        click.echo(
            f"{printable(t.name):<{width}}  {t.size:>11,}  {t.changed:>7.1%}  {number(t.energy, '.3f'):>6}  "
            f"{number(r2, '.3f'):>5}  {number(slope, '.3g'):>10}  {number(t.errors.skill, '+.2f'):>6}"
        )
