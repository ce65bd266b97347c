"""``relexio predict``."""

import json
from typing import TYPE_CHECKING

import click

from relexio.cli import options
from relexio.cli.show import note, stages, table
from relexio.words import Selection

if TYPE_CHECKING:
    from relexio.fit.fit import Fit
    from relexio.methods import Recipe
    from relexio.methods.roles import Choice
    from relexio.verbs.output import Target
    from relexio.verbs.predict import Prospect

_NO_VERDICT = "none: a backtest takes three steps, tensors that move, a rank below the steps, and the gram solver"


@click.command()
@click.argument("trajectory", type=click.Path())
@click.option(
    "--step", "steps", type=click.IntRange(min=0), multiple=True, required=True, help="Step to predict. Repeatable."
)
@click.option("-o", "--out", required=True, help="Directory to write; with several steps one that holds {step}.")
@options.window
@options.recipe
@options.tensors
@click.option(
    "--solver",
    type=click.Choice(["auto", "gram", "blocks"]),
    default="auto",
    show_default=True,
    help="gram: one pass, kept for all later fits. blocks: a pass for each iteration, for very many steps.",
)
@options.device
@options.memory
@options.workers
@options.scheduler
@options.dry_run
@options.as_json
def predict(
    trajectory: str,
    steps: tuple[int, ...],
    out: str,
    window: Selection | None,
    recipe: "Recipe",
    choice: "Choice",
    solver: str,
    device: str,
    device_memory: int | None,
    memory: int,
    workers: int | None,
    scheduler: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint that training would reach later.

    Fits the stored steps of TRAJECTORY (once: the fit is kept there) and writes a Hugging Face directory with the
    base's tensors, dtypes and shards, and the configuration and tokenizer of the window's last step.
    """
    options.check_out(steps, out)
    from relexio.engine.resources import Resources
    from relexio.fit.fit import choose_window, fit
    from relexio.store.storage import local
    from relexio.store.store import open_store
    from relexio.verbs import predict as verb
    from relexio.verbs.output import Target

    store = open_store(trajectory)
    chosen = choose_window(store, window)
    targets = [Target(step, local(out.replace("{step}", str(step)))) for step in steps]
    with Resources(memory, workers, device, device_memory, scheduler=scheduler) as resources:
        prospect = verb.prospect(store, chosen, recipe, solver, targets, resources, choice)
        if dry_run:
            _show_plan(chosen, targets, prospect, as_json)
            return
        fitted = fit(store, chosen, recipe, solver, resources, stages, choice)
        for text in fitted.notes:
            note(text)
        if lacking := verb.left_out(store, chosen):
            note(f"not in the prediction, which has files of its own where these would be: {', '.join(lacking[:6])}")
        verb.predict(fitted, targets, resources, stages)
    _show_result(fitted, targets, as_json)


def _show_plan(window: tuple[int, ...], targets: "list[Target]", prospect: "Prospect", as_json: bool) -> None:
    from relexio.words import describe_steps, show

    plan = prospect.plan
    if as_json:
        facts = {
            "window": list(window),
            "outputs": {str(t.step): str(t.out) for t in targets},
            "fit_kept": prospect.kept,
            "bytes_read": prospect.bytes_read,
            "bytes_written": prospect.bytes_written,
            "bytes_free": prospect.bytes_free,
            "memory_projected": plan.projected,
            "memory_allowed": plan.allowed,
            "workers": plan.workers,
            "device": prospect.device,
        }
        click.echo(json.dumps(facts))
        return
    table(
        [
            ("window", describe_steps(window)),
            ("to write", ", ".join(str(target.out) for target in targets)),
            (
                "fit",
                "kept in the store" if prospect.kept else "to be made, and kept in the store if that can be written",
            ),
            ("to read", show(prospect.bytes_read)),
            ("disk", f"{show(prospect.bytes_written)} needed, {show(prospect.bytes_free)} free"),
            ("memory", f"{show(plan.projected)} projected, {show(plan.allowed)} allowed, {plan.workers} workers"),
            ("device", prospect.device),
        ]
    )


def _show_result(fitted: "Fit", targets: "list[Target]", as_json: bool) -> None:
    from relexio.verbs.predict import provenance
    from relexio.words import describe_steps

    _warn(fitted, targets)
    if as_json:
        facts = [{**provenance(fitted, target.step), "out": str(target.out)} for target in targets]
        click.echo(json.dumps(facts[0] if len(facts) == 1 else facts))
        return
    recipe, last = fitted.recipe, fitted.steps[-1]
    rows = [("window", describe_steps(fitted.steps)), ("method", f"{recipe}, strength {recipe.strength:g}")]
    if len(fitted.chosen) < len(fitted.store.tensors):
        kept = "step " + str(last) if fitted.choice.others == "last" else "the base"
        rows.append(("tensors", f"{len(fitted.chosen)} of {len(fitted.store.tensors)}; the others are those of {kept}"))
    for target in targets:
        expected = fitted.outlook(target.step)
        rows.append(("wrote", f"{target.out}: step {target.step}"))
        if recipe.way.extrapolates:
            rows.append(("verdict", str(expected) if expected else _NO_VERDICT))
    table(rows)


def _warn(fitted: "Fit", targets: "list[Target]") -> None:
    """Notes on what speaks against believing these predictions."""

    if not fitted.recipe.way.extrapolates:
        return
    for text in fitted.signs():
        note(f"not one line: {text}")
    expected = [found for target in targets if (found := fitted.outlook(target.step)) is not None]
    beaten = [f"{found.target}" for found in expected if found.skill is not None and found.skill <= 0]
    if beaten:
        note(
            f"no skill so far ahead inside the window, for step {', '.join(beaten)}: relexio backtest says which method "
            f"has; evaluate before you trust it"
        )
    beyond = [f"{found.target}" for found in expected if found.target > found.farthest]
    if beyond:
        note(
            f"step {', '.join(beyond)} is beyond what was backtested, which is up to step {expected[0].farthest}: evaluate "
            f"nearer steps as well (relexio sweep)"
        )
