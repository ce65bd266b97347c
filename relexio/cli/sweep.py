"""``relexio sweep``."""

import sys
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import click

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, printable, seconds, stages, table
from relexio.engine.resources import Resources
from relexio.store.storage import local
from relexio.store.store import Store
from relexio.sweep import Candidate, Evaluation, Request, Sweep, SweepPlan, prepare
from relexio.sweep import sweep as verb
from relexio.sweep.curve import curve, number
from relexio.words import Selection, describe_steps, show, stem, without_secrets

_MOST_STEPS = 10_000


class _Listed(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """Several of one type, with commas between them; one that is given twice counts once."""

    name = "list"

    def __init__(self, one: type) -> None:
        self.one = one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Parse; wrong text is a usage error."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(self.one(piece.strip()) for piece in value.split(",") if piece.strip()))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.25,0.5,1", param, ctx)


@on_trajectory(
    click.option(
        "--eval",
        "command",
        required=True,
        metavar="COMMAND",
        help="Shell command that contains {checkpoint} and prints the score.",
    ),
    click.option(
        "--steps", type=options.STEPS, required=True, help="Steps to predict, e.g. 100,200,400 or 100:400:50."
    ),
    click.option(
        "--strengths", type=_Listed(float), default="1", show_default=True, help="Strengths, e.g. 0.25,0.5,1."
    ),
    click.option(
        "--methods", type=_Listed(str), default="relex", show_default=True, help="Methods, e.g. relex,pinned."
    ),
    click.option(
        "-o", "--out", help="Directory for table, logs and the best checkpoint.  [default: run.sweep for run.zarr]"
    ),
    options.rank,
    click.option("--metric", metavar="NAME", help="Number to take from a JSON object, e.g. gsm8k.exact_match."),
    click.option("--lower-is-better", is_flag=True, help="The score is a loss."),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Stop an evaluation after this time.",
    ),
    click.option(
        "--disk", type=options.SIZE, help="Limit on disk space for checkpoints; two must fit.  [default: what is free]"
    ),
    options.device,
    options.dry_run,
    scheduler=False,
)
def sweep(store: Store, resources: Resources, steps: Selection, out: str | None, dry_run: bool, **asked: Any) -> Result:
    """Evaluate predictions with your own command; keep the best.

    Writes one candidate at a time, runs COMMAND on it, and takes the last line that it prints as the score: a number,
    or JSON. The base and the observed checkpoints are evaluated first. When run again, it continues with what has no
    score.
    """
    if asked["timeout"] is not None and not isfinite(asked["timeout"]):
        raise click.UsageError(f"--timeout {asked['timeout']} is not a number of seconds.")
    if sum(map(len, steps.parts)) > _MOST_STEPS:
        raise click.UsageError(
            f"--steps {steps.text}: too many steps (at most {_MOST_STEPS:,}); give an end and a stride"
        )
    targets = tuple(sorted({step for part in steps.parts for step in part}))
    request = Request(steps=targets, out=local(out or _beside(store.address)), **asked)
    plan = prepare(store, request, resources)
    if dry_run:
        return Result(partial(_plan_facts, plan), partial(_show_plan, plan))
    done, failed = len(plan.candidates) - len(plan.waiting), plan.failed
    if done or failed:
        again = f"; {failed} failed before and will be tried again" if failed else ""
        note(f"{done} of {len(plan.candidates)} evaluations are done already{again}")
    with _Progress(request) as progress:
        found = verb(plan, stages, progress, note)
    facts = {**found.to_json(), "out": str(request.out)}
    return Result(lambda: facts, partial(_show, request, found), _errors(request, found))


def _beside(trajectory: str) -> str:
    """The default directory of results: beside a trajectory, or here if it is on object storage."""
    if "://" in trajectory:
        return f"{stem(trajectory)}.sweep"
    path = Path(trajectory)
    return str(path.with_name(path.name.removesuffix(".zarr") + ".sweep"))


class _Progress:
    """Reports on stderr what is evaluated, and how it went."""

    def __init__(self, request: Request) -> None:
        self.request, self.inside_line = request, False

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)  # click ends that line
        if self.inside_line and not interrupted:
            click.echo(err=True)

    def __call__(
        self, place: int, total: int, candidate: Candidate, evaluation: Evaluation | None, table: Sweep
    ) -> None:
        head = f"[{place}/{total}] {candidate.label}: "
        if evaluation is None:
            if sys.stderr.isatty():
                click.echo(f"{head}evaluating ...", err=True, nl=False)
                self.inside_line = True
            return
        clear = "\r\x1b[K" if self.inside_line else ""
        click.echo(clear + printable(head + self._outcome(evaluation, table)), err=True)
        self.inside_line = False

    def _outcome(self, evaluation: Evaluation, table: Sweep) -> str:
        if evaluation.score is None:
            line = next((line.strip() for line in reversed(evaluation.tail.splitlines()) if line.strip()), "")
            reason = f": {line[:120]}" if line and evaluation.line is None else ""
            return f"failed: {evaluation.failed}{reason} (full output: {self.request.out / evaluation.log})"
        last = table.last_observed
        if last is None or last.score is None or not evaluation.candidate.predicted:
            return number(evaluation.score)
        return f"{number(evaluation.score)} (last observed {number(last.score)})"


def _plan_facts(plan: SweepPlan) -> dict[str, Any]:
    return {
        "window": list(plan.request.window),
        "out": str(plan.request.out),
        "candidates": [candidate.name for candidate in plan.candidates],
        "waiting": [candidate.name for candidate in plan.waiting],
        "bytes_needed": plan.bytes_needed,
        "bytes_free": plan.bytes_free,
        "memory_projected": plan.plan.projected,
        "memory_allowed": plan.plan.allowed,
        "workers": plan.plan.workers,
        "device": plan.device,
    }


def _show_plan(plan: SweepPlan) -> None:
    references = sum(not candidate.predicted for candidate in plan.candidates)
    predictions, done = len(plan.candidates) - references, len(plan.candidates) - len(plan.waiting)
    timeout = plan.request.timeout
    limit = "no time limit" if timeout is None else f"at most {seconds(timeout)} each"
    names = ", ".join(candidate.name for candidate in plan.candidates[:4]) + (", ..." if predictions > 2 else "")
    table(
        [
            ("window", describe_steps(plan.request.window)),
            ("evaluations", f"{references} references and {predictions} predictions, {done} done already, {limit}"),
            ("", names),
            ("command", without_secrets(plan.request.command)),
            ("results", str(plan.request.out)),
            ("disk", f"{show(plan.bytes_needed)} for two checkpoints, {show(plan.bytes_free)} free"),
            ("memory", f"{show(plan.plan.projected)} projected, {show(plan.plan.allowed)} allowed"),
            ("device", plan.device),
        ]
    )


def _errors(request: Request, found: Sweep) -> tuple[str, ...]:
    """The error where no prediction has a score."""
    if found.predicted:
        return ()
    failed = [evaluation for evaluation in found.results if evaluation.candidate.predicted]
    last = failed[-1]
    return (
        f"none of {len(failed)} predictions has a score; {last.candidate.label}: {last.failed} (see {request.out / last.log})",
    )


def _show(request: Request, found: Sweep) -> None:
    best, last, step = found.best, found.last_observed, found.setting.window[-1][0]
    if best is None or best.score is None:
        return
    gain = found.gain(best)
    if gain is None or last is None or last.score is None:
        gained = f"not known: step {step}, the last observed, has no score"
    elif gain > 0:
        gained = f"+{number(gain)} over the last observed checkpoint (step {step}: {number(last.score)})"
    else:
        gained = f"none: no prediction beats the last observed checkpoint (step {step}: {number(last.score)})"
    failed = sum(evaluation.score is None for evaluation in found.results if evaluation.candidate.predicted)
    without = f", {failed} more failed" if failed else ""
    rows = [
        ("best", f"{best.candidate.label}: {number(best.score)}"),
        ("gain", gained),
        ("chosen", f"the best of {len(found.predicted)} predictions{without}"),
    ]
    if len(found.predicted) > 1:
        rows.append(("", "the best of several looks better than it is; evaluate it again on other problems"))
    click.echo("\n".join([*curve(found), ""]))
    table([*rows, ("wrote", f"{request.out / 'best'}, {request.out / 'results.csv'} and results.json")])
