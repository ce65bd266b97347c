"""``relexio reconstruct``."""

from functools import partial

import click
import numpy as np

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, stages, table
from relexio.engine.resources import Resources
from relexio.fit.fit import command, fit
from relexio.methods import Recipe
from relexio.store.storage import local
from relexio.store.store import Store
from relexio.verbs.output import Target
from relexio.verbs.predict import predict, provenance
from relexio.words import describe_steps

_step = click.option(
    "--step", "steps", type=click.IntRange(min=0), multiple=True, required=True, help="Observed step. Repeatable."
)
_out = click.option("-o", "--out", required=True, help="Directory to write. With several steps it must contain {step}.")


@on_trajectory(_step, _out, options.rank, options.device)
def reconstruct(
    store: Store, window: tuple[int, ...], resources: Resources, rank: int, steps: tuple[int, ...], out: str
) -> Result:
    """Write what a few directions keep of an observed step.

    This is the paper's Finding 1. Evaluate it and the step itself. If both do equally well, those directions hold what
    training gained.
    """
    options.check_out(steps, out)
    recipe = Recipe("reconstruct", rank)
    targets = [Target(step, local(out.replace("{step}", str(step)))) for step in steps]
    recipe.check(np.array(window), list(steps))
    fitted = fit(store, window, recipe, "auto", resources, stages)
    for text in fitted.notes:
        note(text)
    predict(fitted, targets, resources, stages)
    lost = [fitted.thrown_away(step) for step in steps]

    def facts() -> object:
        pairs = zip(targets, lost, strict=True)
        rows = [{**provenance(fitted, t.step), "out": str(t.out), "thrown_away": share} for t, share in pairs]
        return rows[0] if len(rows) == 1 else rows

    return Result(
        facts,
        partial(_show, window, rank, targets, lost),
        next=tuple(command("restore", store, f"--step {step} -o step-{step}") for step in steps),
    )


def _show(window: tuple[int, ...], rank: int, targets: list[Target], lost: list[float | None]) -> None:
    rows = [("window", describe_steps(window)), ("rank", str(rank))]
    for target, share in zip(targets, lost, strict=True):
        energy = "" if share is None else f"; {1 - share:.1%} of its squared distance from the base is kept"
        rows.append(("wrote", f"{target.out}: step {target.step}{energy}"))
    table(rows)
