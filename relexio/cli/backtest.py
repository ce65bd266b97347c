"""``relexio backtest``."""

from functools import partial

import click
import numpy as np

from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, stages, table
from relexio.cli.skill import horizon_heads, skill_columns, skill_table
from relexio.engine.resources import Resources
from relexio.methods.verdict import Pick
from relexio.store.store import Store
from relexio.verbs.backtest import Judgement, judge

_all = click.option("--all", "everything", is_flag=True, help="Show every recipe, not only the best of each method.")


@on_trajectory(_all)
def backtest(store: Store, window: tuple[int, ...], resources: Resources, everything: bool) -> Result:
    """Say which method to use on this run, how far ahead, and how sure that is.

    Every method, window, rank and strength is fitted up to several cut-offs inside the trajectory and compared with
    the steps that were really trained after them. Skill above 0 beats keeping the last checkpoint; 1 is perfect.
    """
    judged = judge(store, window, resources, stages)
    return Result(judged.to_json, partial(_show, judged, everything), next=tuple(judged.commands()))


def _show(judged: Judgement, everything: bool) -> None:
    _show_run(judged)
    _show_recipes(judged, judged.ranked() if everything else judged.best_of_each_method())
    if judged.verdict is not None:
        pick = judged.verdict.pick
        click.echo(f"\n{pick.recipe}, window {_share(pick)}, strength {pick.strength:g}, by part of the model")
        skill_table(judged.test, judged.parts(pick), "part")
        if options := judged.excluded():
            click.echo(f"parts that end farther away at every horizon are better left as they are: {' '.join(options)}")
    click.echo("\nverdict")
    for line in judged.words():
        click.echo(line)


def _show_run(judged: Judgement) -> None:
    table(judged.rows())
    for text in judged.straight.signs if judged.straight else ():
        note(f"not one line: {text}")


def _show_recipes(judged: Judgement, picks: list[Pick]) -> None:
    test = judged.test
    width = max(len(text) for text in ("method", *(str(pick.recipe) for pick in picks)))
    click.echo(
        "\nskill up to this many times the last known step, beyond the previous column (pooled over all tensors)"
    )
    click.echo(f"  {'method':<{width}}  window  strength{horizon_heads(test)}    mean  median  cosine")
    for pick in picks:
        skills = skill_columns(test, test.by_horizon(pick.trial, pick.strength))
        median, cosines = np.nanmean(test.medians(pick.trial, pick.strength)), test.cosines(pick.trial, pick.strength)
        cosine = f"{np.nanmean(cosines):+.2f}" if not np.isnan(cosines).all() else "-"
        click.echo(
            f"{'*' if pick == judged.advised else ' '} {pick.recipe!s:<{width}}  {_share(pick):>6}  "
            f"{pick.strength:>8g}{skills}{pick.score:>+8.2f}{median:>+8.2f}{cosine:>8}"
        )
    if judged.advised is not None:
        click.echo("*: recommended")
    click.echo(
        "mean: over the horizons; recipes are ranked by it. median: over tensors, mean over predictions. cosine: of "
        "the predicted and the real update."
    )


def _share(pick: Pick) -> str:
    return "all" if pick.trial.share == 1 else f"1/{round(1 / pick.trial.share)}"
