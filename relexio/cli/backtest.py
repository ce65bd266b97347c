"""``relexio backtest``."""

import json
from typing import TYPE_CHECKING

import click

from relexio.cli import options
from relexio.cli.show import by_horizon, heads, note, numbers, stages, table
from relexio.words import Selection

if TYPE_CHECKING:
    from relexio.methods.verdict import Pick
    from relexio.verbs.backtest import Judged


@click.command()
@click.argument("trajectory", type=click.Path())
@options.window
@click.option("--all", "everything", is_flag=True, help="Show every recipe, not only the best of each method.")
@options.memory
@options.workers
@options.scheduler
@options.as_json
def backtest(
    trajectory: str,
    window: Selection | None,
    everything: bool,
    memory: int,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Say which method to use on this run, how far, and how sure.

    Every method, window, rank and strength is fitted up to several cut-offs inside the trajectory and held against the
    steps that were really trained after them. Skill above 0 beats keeping the last checkpoint; 1 is perfect.
    """
    from relexio.engine.resources import Resources
    from relexio.fit.fit import choose_window
    from relexio.store.store import open_store
    from relexio.verbs.backtest import judge

    store = open_store(trajectory)
    with Resources(memory, workers, "cpu", scheduler=scheduler) as resources:
        judged = judge(store, choose_window(store, window), resources, stages)
    if as_json:
        click.echo(json.dumps(judged.to_json()))
        return
    _show_run(judged)
    _show_recipes(judged, judged.ranked() if everything else judged.best_of_each_method())
    if judged.verdict is not None:
        _show_parts(judged, judged.verdict.pick)
    _show_verdict(judged)


def _show_run(judged: "Judged") -> None:
    from relexio.words import describe_steps

    test, straight = judged.test, judged.straight
    known = ", ".join(str(step) for step in sorted(set(test.known.tolist())))
    rows = [
        ("trajectory", judged.store.shown),
        ("window", describe_steps(judged.window)),
        ("cut-offs", f"steps {known}; {len(test.held_out)} predictions of later steps for each recipe"),
    ]
    if straight is not None:
        half = "-" if straight.split_half is None else f"{straight.split_half:.2f}"
        rows += [
            (
                "energy",
                f"{straight.energy:.2f} at rank 1; a random walk over the same steps gives {straight.walk_energy:.2f}",
            ),
            ("r2", f"{straight.r_squared:.2f} of the line; a random walk gives {straight.walk_r_squared:.2f}"),
            ("split-half", f"{half}: cosine of the directions of odd and even increments; a random walk gives about 0"),
        ]
    table(rows)
    for text in straight.signs if straight else ():
        note(f"not one line: {text}")


def _show_recipes(judged: "Judged", picks: "list[Pick]") -> None:
    import numpy as np

    places, columns = heads(judged.test)
    names = [str(judged.test.trials[pick.trial].recipe) for pick in picks]
    width = max(map(len, (*names, "method")))
    click.echo("\nskill up to so many times the last known step, beyond the column before (pooled over all tensors)")
    click.echo(f"  {'method':<{width}}  window  strength{columns}    mean  median  cosine")
    for name, pick in zip(names, picks, strict=True):
        test = judged.test
        skills = test.by_horizon(pick.trial, pick.strength)
        median = np.nanmean(test.medians(pick.trial, pick.strength))
        cosine = test.cosines(pick.trial, pick.strength)
        direct = f"{np.nanmean(cosine):+.2f}" if not np.isnan(cosine).all() else "-"
        click.echo(
            f"{_mark(judged, pick)} {name:<{width}}  {_share(test.trials[pick.trial].share):>6}  {pick.strength:>8g}"
            f"{numbers(skills, places)}{pick.score:>+8.2f}{median:>+8.2f}{direct:>8}"
        )
    click.echo("*: recommended")
    click.echo(
        "mean: over the horizons, by which recipes are ranked. median: over tensors, mean over predictions. cosine: of "
        "the predicted and the real update."
    )


def _mark(judged: "Judged", pick: "Pick") -> str:
    return "*" if judged.verdict is not None and judged.verdict.sure != "none" and pick == judged.verdict.pick else " "


def _share(share: float) -> str:
    return "all" if share == 1 else f"1/{round(1 / share)}"


def _show_parts(judged: "Judged", pick: "Pick") -> None:
    trial = judged.test.trials[pick.trial]
    click.echo(f"\n{trial.recipe}, window {_share(trial.share)}, strength {pick.strength:g}, by part of the model")
    by_horizon(judged.test, judged.parts(pick), "part")


def _show_verdict(judged: "Judged") -> None:

    click.echo("\nverdict")
    for line in judged.words():
        click.echo(line)
    if (command := judged.command()) is not None:
        click.echo(f"\n  {command}")
