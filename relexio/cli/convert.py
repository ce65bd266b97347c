"""``relexio convert``."""

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from relexio.cli import options
from relexio.cli.show import not_stored, note, stages, table
from relexio.cli.verify import report
from relexio.verbs.verify import find_originals
from relexio.verbs.verify import verify as check
from relexio.words import Selection

if TYPE_CHECKING:
    from relexio.verbs.convert import Conversion, Converted

_NAMED = "STEP=PATH"


def _named(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[int, str]:
    found: dict[int, str] = {}
    for value in values:
        step, sign, path = value.partition("=")
        if not sign or not step.isascii() or not step.isdigit() or len(step) > 15 or not path:
            raise click.BadParameter(f"{value!r} is not {_NAMED}, as in 40=runs/a/step40")
        if int(step) in found:
            raise click.BadParameter(f"step {int(step)} is given twice")
        found[int(step)] = path
    return found


@click.command()
@click.argument("checkpoints", required=False, type=click.Path())
@click.option("--base", type=click.Path(), help="The model before RL. Needed for a new trajectory.")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(),
    help="The trajectory to make or add to: a path, or a URL as s3://bucket/run.zarr.",
)
@click.option("--steps", type=options.STEPS, help="Steps to take, e.g. 1:75, 80:, 10:300:10 or 1,2,5.  [default: all]")
@click.option(
    "--checkpoint", "named", multiple=True, metavar=_NAMED, callback=_named, help="One more checkpoint. Repeatable."
)
@options.memory
@options.workers
@options.scheduler
@click.option("--verify", is_flag=True, help="Afterwards read all of it again and compare it with the checkpoints.")
@options.dry_run
@options.as_json
def convert(
    checkpoints: str | None,
    base: str | None,
    out: str,
    steps: Selection | None,
    named: dict[int, str],
    memory: int,
    workers: int | None,
    scheduler: str | None,
    verify: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Store a run's checkpoints losslessly, as a small trajectory.

    CHECKPOINTS is a directory of step directories (global_step_N, global_stepN_hf, checkpoint-N, step_N or step-N)
    with safetensors weights in Hugging Face layout. The model's files are stored; what is not (a trainer's state, say) is
    named at the end. Run again, it adds the steps that are new and rewrites nothing, and says which stored ones have been
    written again since; after an interruption it goes on where it was.
    """
    if checkpoints is None and not named:
        raise click.UsageError("Give CHECKPOINTS, or --checkpoint STEP=PATH.")
    from relexio.engine.resources import Resources
    from relexio.store.storage import local
    from relexio.verbs import convert as verb

    root, model = (local(path) if path is not None else None for path in (checkpoints, base))
    request = verb.Request(out, model, root, {step: local(path) for step, path in named.items()}, steps)
    with Resources(memory, workers, scheduler=scheduler) as resources:
        conversion = verb.prepare(request, resources, stages)
        for text in conversion.notes:
            note(text)
        if dry_run:
            _show_plan(conversion, as_json)
            return
        done = verb.convert(conversion, stages)
        if done.resumed:
            note("went on with what an interrupted run had finished")
        for text in done.notes:
            note(text)
        if not verify:
            _show_result(conversion, done, as_json)
            return
        originals = find_originals(done.store, root, model)
        originals = replace(originals, steps={**originals.steps, **conversion.by_step})
        found = check(done.store, originals, resources, stages)
    if not as_json:
        _show_result(conversion, done, as_json, said=False)
    report(out, found, as_json)


def _show_plan(conversion: "Conversion", as_json: bool) -> None:
    from relexio.words import describe_steps, show

    plan, free = conversion.executor.plan, conversion.out.free_bytes()
    if as_json:
        facts = {
            "out": conversion.out.shown,
            "steps": list(conversion.steps),
            "present": list(conversion.present),
            "bytes_read": conversion.bytes_read,
            "bytes_written_at_most": conversion.bytes_written_at_most,
            "bytes_free": free,
            "memory_projected": plan.projected,
            "memory_allowed": plan.allowed,
            "workers": plan.workers,
        }
        click.echo(json.dumps(facts))
        return
    room = "" if free is None else f", {show(free)} free"
    table(
        [
            (
                "to add",
                describe_steps(conversion.steps) if conversion.steps else "nothing: every step is stored already",
            ),
            ("to read", show(conversion.bytes_read)),
            ("disk", f"{show(conversion.bytes_written_at_most)} at the very most{room}"),
            ("memory", f"{show(plan.projected)} projected, {show(plan.allowed)} allowed, {plan.workers} workers"),
        ]
    )


def _show_result(conversion: "Conversion", done: "Converted", as_json: bool, said: bool = True) -> None:
    """Print what is stored now and, where ``verify`` does not say it in a moment, what is not."""
    from relexio.verbs.convert.left import recorded
    from relexio.verbs.inspect import sizes
    from relexio.words import describe_steps, show

    found, left = sizes(done.store), recorded(done.store) if said else []
    if as_json:
        facts = {
            "out": conversion.out.shown,
            "added": list(conversion.steps),
            "steps": list(done.store.steps),
            "resumed": done.resumed,
            "bytes": asdict(found),
            "not_stored": [one.to_json() for one in left],
        }
        click.echo(json.dumps(facts))
        return
    table(
        [
            ("trajectory", conversion.out.shown),
            (
                "added",
                describe_steps(conversion.steps) if conversion.steps else "nothing: every step is stored already",
            ),
            ("holds", describe_steps(done.store.steps)),
            (
                "size",
                f"{show(found.steps)} for {show(found.checkpoints)} of checkpoints ({found.compression:.1f} times smaller), "
                f"and {show(found.base)} for the base",
            ),
            *not_stored(left),
        ]
    )
