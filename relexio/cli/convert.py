"""``relexio convert``."""

import re
from dataclasses import asdict
from dataclasses import replace as evolve
from functools import partial
from pathlib import Path

import click

from relexio.checkpoints.layout import choose
from relexio.cli import options
from relexio.cli.command import Result, at_work
from relexio.cli.convert_plan import added, plan, replaced
from relexio.cli.follow import Freed, delete, follow_run, require_bytes, step_directories
from relexio.cli.show import not_stored, note, stages, table
from relexio.cli.verify import report
from relexio.engine.resources import Resources
from relexio.fit.fit import command
from relexio.store.storage import local
from relexio.verbs import convert as verb
from relexio.verbs.convert.delete import Keep
from relexio.verbs.convert.follow import follow as follow_steps
from relexio.verbs.convert.hub import SCHEME, Repository, convert_revisions
from relexio.verbs.convert.left import recorded
from relexio.verbs.inspect import sizes
from relexio.verbs.verify import find_originals
from relexio.verbs.verify import verify as check
from relexio.words import Selection, describe_steps, show

_NAMED = "STEP=PATH"


def _named(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[int, str]:
    paths: dict[int, str] = {}
    for value in values:
        step, sign, path = value.partition("=")
        if not sign or not step.isascii() or not step.isdigit() or len(step) > 15 or not path:
            raise click.BadParameter(f"{value!r} is not {_NAMED}, as in 40=runs/a/step40")
        if int(step) in paths:
            raise click.BadParameter(f"step {int(step)} is given twice")
        paths[int(step)] = path
    return paths


@at_work(
    click.argument("checkpoints", required=False, type=click.Path(readable=False)),
    click.option("--base", type=click.Path(readable=False), help="The model before RL. Needed for a new trajectory."),
    click.option(
        "-o",
        "--out",
        required=True,
        type=click.Path(readable=False),
        help="The trajectory to create or add to: a path, or a URL such as s3://bucket/run.zarr.",
    ),
    click.option(
        "--steps", type=options.STEPS, help="Steps to convert, e.g. 1:75, 80:, 10:300:10 or 1,2,5.  [default: all]"
    ),
    click.option(
        "--replace",
        type=options.STEPS,
        help="Steps that were written again, e.g. 21: after training was resumed from step 20: the new ones replace the stored.",
    ),
    click.option(
        "--checkpoint", "named", multiple=True, metavar=_NAMED, callback=_named, help="One more checkpoint. Repeatable."
    ),
    options.pattern,
    click.option("--revisions", help="What the revisions of hf://ORG/NAME are called, e.g. 'step_{step}'."),
    click.option(
        "--dtype",
        type=click.Choice(["base", "stored"]),
        default="base",
        show_default=True,
        help="Types of a new trajectory: the base's, to which steps are rounded, or those of the steps' files.",
    ),
    click.option("--verify", is_flag=True, help="Then read the trajectory back and compare it with the checkpoints."),
    click.option(
        "--delete-verified",
        is_flag=True,
        help="Remove a step's weight files once the trajectory has given back every byte of them. "
        "Training cannot be resumed from such a step before it is restored.",
    ),
    click.option("--keep", type=options.KEEP, help="Steps that keep their files, e.g. every:50,last:2."),
    click.option("--follow", is_flag=True, help="Wait for steps, and store each as soon as it is whole."),
    click.option("--until", type=click.IntRange(min=0), metavar="STEP", help="Follow until this step is stored."),
    click.option("--idle", type=options.DURATION, help="Follow until no step has come for so long, e.g. 30m."),
    dry_run=True,
)
def convert(
    resources: Resources,
    checkpoints: str | None,
    base: str | None,
    out: str,
    steps: Selection | None,
    replace: Selection | None,
    named: dict[int, str],
    pattern: re.Pattern[str] | None,
    revisions: str | None,
    dtype: str,
    verify: bool,
    delete_verified: bool,
    keep: Keep | None,
    follow: bool,
    until: int | None,
    idle: float | None,
    dry_run: bool,
) -> Result:
    """Store a run's checkpoints losslessly, as a small trajectory.

    CHECKPOINTS is a directory of step directories (global_step_N, checkpoint-N, step_N and the like, as trainers name
    them) with safetensors weights in Hugging Face layout. The model's files are stored; what is not stored (such as a trainer's
    state) is listed at the end. When run again, it adds new steps. It reports stored steps that have
    been written again since; --replace takes the new ones. After an interruption it continues where it stopped.

    With --follow it stays beside a running trainer. A step is whole when the trainer's own marker says so, or when its
    files have been the same for five seconds.

    CHECKPOINTS may be hf://ORG/NAME, a repository on the Hub with a revision for each step: one at a time is fetched,
    stored, compared, and deleted.
    """
    if checkpoints is None and not named:
        raise click.UsageError("Give CHECKPOINTS, or --checkpoint STEP=PATH.")
    if (revisions is not None) != (checkpoints or "").startswith(SCHEME):
        raise click.UsageError(f"{SCHEME}ORG/NAME and --revisions go together, as in --revisions 'step_{{step}}'.")
    _check_options(bool(named or replace or verify or dry_run), verify, delete_verified, keep, follow, until, idle)
    model = local(base) if base is not None else None
    if checkpoints is not None and checkpoints.startswith(SCHEME):
        if named or replace or pattern or verify or delete_verified or follow or dry_run:
            raise click.UsageError(
                f"{SCHEME}ORG/NAME goes without --checkpoint, --replace, --pattern, --verify, --delete-verified, --follow "
                "and --dry-run."
            )
        return _from_hub(checkpoints, revisions, verb.Request(out, model, None, {}, steps, None, dtype), resources)
    root = local(checkpoints) if checkpoints is not None else None
    paths = {step: local(path) for step, path in named.items()}
    request = verb.Request(out, model, root, paths, steps, replace, dtype, pattern)
    deleting = (keep or Keep()) if delete_verified else None
    if follow:
        return follow_run(request, partial(follow_steps, request, until, idle, resources), deleting, resources)
    conversion = verb.prepare(request, resources, stages)
    for text in conversion.notes:
        note(text)
    if dry_run:
        return plan(conversion, paths, pattern)
    if deleting is not None:
        require_bytes(conversion)
    done = verb.convert(conversion, stages)
    if done.resumed:
        note("continued from what an interrupted run had finished")
    for text in done.notes:
        note(text)
    freed = Freed()
    if deleting is not None:
        sources = choose(root, request.named or {}, steps, pattern)[0]
        directories = {step: path for step, path in sources.items() if isinstance(path, Path)}
        freed = delete(done.store, directories, step_directories(directories, root, paths), deleting, resources)
    if not verify:
        left = [*freed.rows(), *not_stored(recorded(done.store))]
        return Result(
            partial(_facts, conversion, done, freed),
            partial(_show, conversion, done, left),
            next=(command("backtest", done.store),),
        )
    originals = find_originals(done.store, root, model, pattern=pattern)
    originals = evolve(originals, steps={**originals.steps, **conversion.by_step})
    checked = report(done.store, check(done.store, originals, resources, stages))

    def show_both() -> None:
        _show(conversion, done, [])  # ``checked`` lists what is not stored
        checked.show()

    return evolve(checked, show=show_both)


def _from_hub(address: str, revisions: str | None, request: verb.Request, resources: Resources) -> Result:
    repository = Repository.parse(address, revisions or "")
    return follow_run(request, partial(convert_revisions, repository, request, resources), None, resources)


def _check_options(
    others: bool,
    verify: bool,
    delete_verified: bool,
    keep: Keep | None,
    follow: bool,
    until: int | None,
    idle: float | None,
) -> None:
    """Raise a usage error for options that do not go together."""
    if follow and others:
        raise click.UsageError(
            "--follow goes with CHECKPOINTS, and without --checkpoint, --replace, --verify and --dry-run."
        )
    if not follow and (until is not None or idle is not None):
        raise click.UsageError("--until and --idle need --follow.")
    if keep is not None and not delete_verified:
        raise click.UsageError("--keep needs --delete-verified.")
    if verify and delete_verified:
        raise click.UsageError("--delete-verified compares before it deletes: leave --verify out.")


def _facts(conversion: verb.Conversion, done: verb.ConversionResult, freed: Freed) -> object:
    return {
        "out": conversion.out.shown,
        "added": list(conversion.steps),
        "replaced": list(conversion.forgotten),
        "steps": list(done.store.steps),
        "resumed": done.resumed,
        "bytes": asdict(sizes(done.store)),
        "deleted": freed.to_json(),
        "not_stored": [one.to_json() for one in recorded(done.store)],
    }


def _show(conversion: verb.Conversion, done: verb.ConversionResult, left: list[tuple[str, str]]) -> None:
    size = sizes(done.store)
    smaller = f"{show(size.checkpoints)} of checkpoints ({size.compression:.1f} times smaller)"
    table(
        [
            ("trajectory", conversion.out.shown),
            *replaced(conversion),
            ("added", added(conversion)),
            ("holds", describe_steps(done.store.steps)),
            ("size", f"{show(size.steps)} for {smaller}, and {show(size.base)} for the base"),
            *left,
        ]
    )
