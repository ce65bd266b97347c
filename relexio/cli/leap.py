"""``relexio leap``."""

from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import click

from relexio.cli import options
from relexio.cli.command import Result, at_work
from relexio.cli.show import note, printable, quiet, seconds, stages, table
from relexio.cli.sweep import Progress
from relexio.engine.resources import Resources
from relexio.report.leap import write_page
from relexio.store.storage import local
from relexio.sweep import SweepPlan
from relexio.sweep.curve import number
from relexio.sweep.leap import Leap, Request
from relexio.sweep.leap import leap as verb
from relexio.sweep.leap.curve import curve
from relexio.sweep.leap.request import Files
from relexio.sweep.leap.run import load


@at_work(
    click.option("--base", required=True, type=click.Path(), help="The model to begin with: a directory."),
    click.option(
        "--train",
        required=True,
        metavar="COMMAND",
        help="Shell command that trains {steps} steps on from {base} and writes step directories into {out}; "
        "{round} for its seed.",
    ),
    options.evaluation,
    click.option(
        "--segment",
        "steps",
        type=click.IntRange(min=1),
        default=10,
        show_default=True,
        help="Steps that are trained in a round.",
    ),
    click.option("--segments", "rounds", type=click.IntRange(min=1), default=6, show_default=True, help="Rounds."),
    click.option("-o", "--out", required=True, type=click.Path(), help="Directory for all that it makes."),
    click.option(
        "--method",
        default="scaled-last",
        show_default=True,
        help="How to go farther: one of relexio methods. scaled-last needs the last checkpoint of a segment alone.",
    ),
    click.option(
        "--test", metavar="COMMAND", help="As --eval, on problems that choose nothing: for base and last model."
    ),
    options.judging,
    options.device,
    scheduler=False,
)
def leap(resources: Resources, base: str, out: str, **asked: Any) -> Result:
    """Train, extrapolate, evaluate, and train on from the best, round after round.

    Each round trains a segment with your own command, stores its steps, and evaluates points farther and farther along
    the line from the segment's first model to its last, as sweep does. Training goes on from the best of them if that
    beats the last trained step by more than its standard error, else from the last trained step. When run again, it
    continues. A larger learning rate may do as much: docs/evidence.md.
    """
    request = Request(local(base), out=local(out), **asked)
    known = load(request)
    if known is not None:
        note(f"{len(known.rounds)} round{'s' * (len(known.rounds) != 1)} of {request.rounds} done already")
    found = verb(request, resources, stages, _Told(request), note)
    page = write_page(list(found.rows()), found.setting.lower_is_better, request.out / "leap.html", resources)
    facts = {**found.to_json(), "out": str(request.out), "model": str(Files(request.out).model(len(found.rounds)))}
    return Result(lambda: facts, partial(_show, request, found, page), next=_next(request, found))


class _Told:
    """Says on stderr what a leap does."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._progress: Progress | None = None

    def training(self, number: int, model: Path, log: Path) -> None:
        """A training command starts, which may take days and prints to its log alone."""
        self._say(f"round {number} of {self._request.rounds}: training from {model} (output: {log})")

    def searching(self, number: int, plan: SweepPlan) -> Progress:
        """The search of a round begins."""
        return Progress(plan)

    def ended(self, found: Leap) -> None:
        """A round is over."""
        if not found.rounds:
            self._say(f"base: {number(found.base_score)}")
            return
        last = found.rounds[-1]
        how = f"a leap of {last.leap:.3g} times, to {number(last.score)}" if last.taken else "no leap was better"
        took = f"{seconds(last.seconds)}: training {seconds(last.train_seconds)}, evaluating {seconds(last.evaluate_seconds)}"
        self._say(f"round {len(found.rounds)}: trained to {number(last.trained_score)}, {how}; {took}")

    def _say(self, text: str) -> None:
        if not quiet():
            click.echo(printable(text), err=True)


def _show(request: Request, found: Leap, page: str) -> None:
    gain = found.base_score - found.score if found.setting.lower_is_better else found.score - found.base_score
    better = f"{abs(gain):.4g} {'better' if gain >= 0 else 'worse'} than the base"
    taken = sum(one.taken for one in found.rounds)
    rows = [
        ("score", f"{number(found.score)} after {found.trained} trained steps, {better}"),
        ("leaps", f"taken in {taken} of {len(found.rounds)} round{'s' * (len(found.rounds) > 1)}{_failed(found)}"),
    ]
    if found.far > 1:
        rows.append(("", _amounts_to(found)))
    if found.tests is not None:
        base, last = map(number, found.tests)
        rows.append(("test", f"base {base}, last model {last}, on what chose nothing"))
    else:
        rows.append(("", "scores are those of problems that chose: measure the last model on others (--test)"))
    model = Files(request.out).model(len(found.rounds))
    rows += [("wrote", f"{model}, {request.out / 'leap.csv'} and leap.json"), ("", page)]
    click.echo("\n".join([*curve(found), ""]))
    table(rows)


def _amounts_to(found: Leap) -> str:
    """What the leaps are worth as a learning rate."""
    return (
        f"together they went {found.far:.2g} times as far as training did: a learning rate {found.far:.2g} times as large "
        f"might do the same"
    )


def _failed(found: Leap) -> str:
    failed = sum(one.failed for one in found.rounds)
    return f"; {failed} evaluation{'s' * (failed > 1)} failed" if failed else ""


def _next(request: Request, found: Leap) -> tuple[str, ...]:
    """The command for more of it, with all that was asked for."""
    context, words = click.get_current_context(), ["relexio leap"]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if option.name == "rounds":
            value = len(found.rounds) + request.rounds
        elif not options.is_given(option.name or ""):
            continue
        words.append(option.opts[-1] if value is True else f"{option.opts[-1]} {quote(str(value))}")
    return (" ".join(words),)
