"""``relexio reconstruct``."""

import json

import click

from relexio.cli import options
from relexio.cli.show import note, stages, table
from relexio.words import Selection


@click.command()
@click.argument("trajectory", type=click.Path())
@click.option(
    "--step", "steps", type=click.IntRange(min=0), multiple=True, required=True, help="Observed step. Repeatable."
)
@click.option("-o", "--out", required=True, help="Directory to write; with several steps one that holds {step}.")
@options.window
@options.rank
@options.device
@options.memory
@options.workers
@options.scheduler
@options.as_json
def reconstruct(
    trajectory: str,
    steps: tuple[int, ...],
    out: str,
    window: Selection | None,
    rank: int,
    device: str,
    device_memory: int | None,
    memory: int,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Write what a few directions keep of an observed step.

    That is the paper's Finding 1. Evaluate it beside the step itself: where both do equally well, those directions hold
    what training gained.
    """
    options.check_out(steps, out)
    import numpy as np

    from relexio.engine.resources import Resources
    from relexio.fit.fit import choose_window, fit
    from relexio.methods import Recipe
    from relexio.store.storage import local
    from relexio.store.store import open_store
    from relexio.verbs.predict import Target, predict, provenance
    from relexio.words import describe_steps

    store = open_store(trajectory)
    chosen, recipe = choose_window(store, window), Recipe("reconstruct", rank)
    targets = [Target(step, local(out.replace("{step}", str(step)))) for step in steps]
    recipe.check(np.array(chosen), list(steps))
    with Resources(memory, workers, device, device_memory, scheduler=scheduler) as resources:
        fitted = fit(store, chosen, recipe, "auto", resources, stages)
        for text in fitted.notes:
            note(text)
        predict(fitted, targets, resources, stages)
    thrown = {step: fitted.thrown_away(step) for step in steps}
    if as_json:
        facts = [{**provenance(fitted, t.step), "out": str(t.out), "thrown_away": thrown[t.step]} for t in targets]
        click.echo(json.dumps(facts[0] if len(facts) == 1 else facts))
        return
    rows = [("window", describe_steps(fitted.steps)), ("rank", str(rank))]
    for target in targets:
        lost = thrown[target.step]
        said = "" if lost is None else f"; {1 - lost:.1%} of its squared distance from the base is kept"
        rows.append(("wrote", f"{target.out}: step {target.step}{said}"))
    table(rows)
