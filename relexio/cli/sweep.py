"""``relexio sweep``."""

import sys
from functools import partial
from typing import Any

import click

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, printable, quiet, seconds, stages, table
from relexio.engine.resources import Resources
from relexio.fit.fit import command
from relexio.methods import AUTO
from relexio.store.storage import local
from relexio.store.store import Store
from relexio.sweep import Candidate, Evaluation, Request, Sweep, SweepPlan, default_directory, prepare
from relexio.sweep import sweep as verb
from relexio.sweep.curve import curve, number
from relexio.words import Selection, describe_steps, show, without_secrets

_MOST_STEPS = 10_000


class _Steps(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """Some steps, or ``auto``: none."""

    name = "steps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The steps of an expression, ascending; wrong text is a usage error."""
        if isinstance(value, tuple) or value == AUTO:
            return value if isinstance(value, tuple) else ()
        steps: Selection = options.STEPS.convert(value, param, ctx)
        if sum(map(len, steps.parts)) > _MOST_STEPS:
            self.fail(f"{steps.text}: too many steps (at most {_MOST_STEPS:,}); give an end and a stride", param, ctx)
        return tuple(sorted({step for part in steps.parts for step in part}))


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
    options.evaluation,
    click.option(
        "--steps",
        type=_Steps(),
        default=AUTO,
        show_default=True,
        help="Steps to predict, e.g. 100,200,400 or 100:400:50. auto goes farther until scores drop.",
    ),
    click.option(
        "--strengths",
        type=_Listed(float),
        default=(),
        help="Strengths, e.g. 0.25,0.5,1.  [default: 1; for auto, as recommended]",
    ),
    click.option(
        "--methods",
        type=_Listed(str),
        default=(AUTO,),
        show_default=True,
        help="Methods, e.g. auto,relex: auto is the recipe that relexio backtest recommends.",
    ),
    click.option(
        "-o", "--out", help="Directory for table, logs and the best checkpoint.  [default: run.sweep for run.zarr]"
    ),
    options.rank,
    options.judging,
    click.option(
        "--disk", type=options.SIZE, help="Limit on disk space for checkpoints; two must fit.  [default: what is free]"
    ),
    options.device,
    options.dry_run,
    scheduler=False,
)
def sweep(store: Store, resources: Resources, out: str | None, dry_run: bool, **asked: Any) -> Result:
    """Evaluate predictions with your own command; keep the best.

    Writes one candidate at a time, runs COMMAND on it, and takes the last line that it prints as the score: a number,
    or JSON. The base and the last observed checkpoint are evaluated first. Then follow predictions by the recommended
    recipe, each farther than the one before, until one is worse than the best by more than its standard error, and at
    last one or two next to the best. When run again, it continues with what has no score.
    """
    if options.is_given("rank") and AUTO in asked["methods"]:
        raise click.UsageError("--rank goes with --methods NAME: auto takes it from the backtest.")
    request = Request(out=local(out) if out else default_directory(store.address), **asked)
    plan = prepare(store, request, resources, stages)
    if plan.why is not None:
        note(f"recommended by the backtest: {plan.why}")
    if dry_run:
        return Result(partial(_plan_facts, plan), partial(_show_plan, plan))
    if plan.done or plan.failed:
        again = f"; {plan.failed} failed before and will be tried again" if plan.failed else ""
        note(f"{plan.done}{'' if plan.searching else f' of {plan.most}'} evaluations are done already{again}")
    with Progress(plan) as progress:
        found = verb(plan, stages, progress, note)
    facts = {**found.to_json(), "out": str(request.out)}
    return Result(lambda: facts, partial(_show, request, found), _errors(request, found), _next(store, found))


class Progress:
    """Reports on stderr what is evaluated, how it went, and the time left, if evaluations take as long as those so far."""

    def __init__(self, plan: SweepPlan) -> None:
        self.plan, self.inside_line = plan, False
        self.number, self.took = plan.done, list[float]()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)  # click ends that line
        if self.inside_line and not interrupted:
            click.echo(err=True)

    def __call__(self, candidate: Candidate, evaluation: Evaluation | None, table: Sweep) -> None:
        """An evaluation begins, or has ended."""
        if quiet():
            return
        of = "/" if not self.plan.searching else " of at most "
        head = f"[{self.number + (evaluation is None)}{of}{self.plan.most}] {candidate.label}: "
        if evaluation is None:
            self.number += 1
            if sys.stderr.isatty():
                click.echo(f"{head}evaluating ...", err=True, nl=False)
                self.inside_line = True
            return
        clear = "\r\x1b[K" if self.inside_line else ""
        self.took.append(evaluation.seconds)
        click.echo(clear + printable(head + self._outcome(evaluation, table) + self._left()), err=True)
        self.inside_line = False

    def _left(self) -> str:
        count, most = self.plan.most - self.number, "" if not self.plan.searching else "at most "
        return f", {most}{seconds(count * sum(self.took) / len(self.took))} left" if count > 0 else ""

    def _outcome(self, evaluation: Evaluation, table: Sweep) -> str:
        if evaluation.score is None:
            line = next((line.strip() for line in reversed(evaluation.tail.splitlines()) if line.strip()), "")
            reason = f": {line[:120]}" if line and evaluation.line is None else ""
            return f"failed: {evaluation.failed}{reason} (full output: {self.plan.request.out / evaluation.log})"
        last, error = table.last_observed, table.error(evaluation)
        score = number(evaluation.score) + (f" ± {error:.2g}" if error else "")
        if last is None or last.score is None or not evaluation.candidate.predicted:
            return score
        return f"{score} (last observed {number(last.score)})"


def _plan_facts(plan: SweepPlan) -> dict[str, Any]:
    return {
        "window": list(plan.request.window),
        "out": str(plan.request.out),
        "candidates": [candidate.name for candidate in plan.candidates],
        "waiting": [candidate.name for candidate in plan.waiting],
        "lines": [{**line.recipe.to_json(), "first": line.first, "ahead": line.ahead} for line in plan.lines],
        "bytes_needed": plan.bytes_needed,
        "bytes_free": plan.bytes_free,
        "memory_projected": plan.plan.projected,
        "memory_allowed": plan.plan.allowed,
        "workers": plan.plan.workers,
        "device": plan.device,
    }


def _show_plan(plan: SweepPlan) -> None:
    references = sum(not candidate.predicted for candidate in plan.candidates)
    predictions = f"{'at most ' if plan.searching else ''}{plan.most - references} predictions"
    timeout = plan.request.timeout
    limit = "no time limit" if timeout is None else f"at most {seconds(timeout)} each"
    names = ", ".join(candidate.name for candidate in plan.candidates[:4]) + (", ..." if plan.most > 4 else "")
    table(
        [
            ("window", describe_steps(plan.request.window)),
            ("evaluations", f"{references} references and {predictions}, {plan.done} done already, {limit}"),
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


def _next(store: Store, found: Sweep) -> tuple[str, ...]:
    """The last observed step, to be evaluated beside the best on problems that chose neither."""
    step = found.setting.window[-1][0]
    return (command("restore", store, f"--step {step} -o step-{step}"),)


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
        gained = (
            f"none: no prediction beats the last observed checkpoint (step {step}: {number(last.score)}); keep that"
        )
    failed = sum(evaluation.score is None for evaluation in found.results if evaluation.candidate.predicted)
    without = f", {failed} more failed" if failed else ""
    rows = [
        ("best", f"{best.candidate.label}: {number(best.score)}"),
        ("gain", gained),
        ("chosen", f"the best of {len(found.predicted)} prediction{'s' * (len(found.predicted) > 1)}{without}"),
    ]
    if len(found.predicted) > 1 and (gain is None or gain > 0):
        rows.append(("", f"the best of several looks better than it is; compare it with step {step} on other problems"))
    click.echo("\n".join([*curve(found), ""]))
    table([*rows, ("wrote", f"{request.out / 'best'}, {request.out / 'results.csv'} and results.json")])
