"""``relexio sweep``."""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relexio.cli import options
from relexio.cli.show import note, printable, seconds, stages, table
from relexio.words import Selection

if TYPE_CHECKING:
    from relexio.sweep import Candidate, Prospect, Request, Result, Sweep

_MOST_STEPS = 10_000


class _Listed(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """Several of one type, with commas between them; one that is given twice counts once."""

    def __init__(self, one: type, name: str) -> None:
        self.one, self.name = one, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Parse; wrong text is wrong usage."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(self.one(piece.strip()) for piece in value.split(",") if piece.strip()))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.25,0.5,1", param, ctx)


@click.command()
@click.argument("trajectory", type=click.Path())
@click.option(
    "--eval", "command", required=True, metavar="COMMAND", help="Shell command with {checkpoint}; it prints the score."
)
@click.option("--steps", type=options.STEPS, required=True, help="Steps to predict, e.g. 100,200,400 or 100:400:50.")
@click.option(
    "--strengths", type=_Listed(float, "list"), default="1", show_default=True, help="Strengths, e.g. 0.25,0.5,1."
)
@click.option(
    "--methods", type=_Listed(str, "list"), default="relex", show_default=True, help="Methods, e.g. relex,pinned."
)
@click.option(
    "-o", "--out", help="Directory for table, logs and the best checkpoint.  [default: run.sweep of run.zarr]"
)
@options.window
@options.rank
@click.option("--metric", metavar="NAME", help="Number to take of a JSON object, e.g. gsm8k.exact_match.")
@click.option("--lower-is-better", is_flag=True, help="The score is a loss.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End an evaluation after that long.",
)
@click.option(
    "--disk", type=options.SIZE, help="Disk that checkpoints may take: room for two.  [default: what is free]"
)
@options.device
@options.memory
@options.workers
@options.dry_run
@options.as_json
def sweep(
    trajectory: str,
    command: str,
    steps: Selection,
    strengths: tuple[float, ...],
    methods: tuple[str, ...],
    out: str | None,
    window: Selection | None,
    rank: int,
    metric: str | None,
    lower_is_better: bool,
    timeout: float | None,
    disk: int | None,
    device: str,
    device_memory: int | None,
    memory: int,
    workers: int | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Evaluate predictions with your own command; keep the best.

    Writes one candidate at a time, runs COMMAND on it, and takes the last line that it prints as the score: a number,
    or JSON. The base and the observed checkpoints are evaluated first. Run again, it goes on with what has no score.
    """
    if timeout is not None and not isfinite(timeout):
        raise click.UsageError(f"--timeout {timeout} is not a number of seconds.")
    count = sum(map(len, steps.parts))
    if count > _MOST_STEPS:
        raise click.UsageError(f"--steps {steps.text}: more steps than anyone evaluates; give an end and a stride")
    from relexio import sweep as verb
    from relexio.engine.resources import Resources
    from relexio.fit.fit import choose_window
    from relexio.store.storage import local
    from relexio.store.store import open_store

    store = open_store(trajectory)
    chosen = tuple(sorted({step for part in steps.parts for step in part}))
    request = verb.Request(
        choose_window(store, window), chosen, strengths, methods, command, local(out or _beside(trajectory)), rank, metric,
        lower_is_better, timeout, disk,
    )  # fmt: skip
    with Resources(memory, workers, device, device_memory) as resources, _stopped_like_ctrl_c():
        ahead = verb.prospect(store, request, resources)
        if dry_run:
            _show_plan(request, ahead, as_json)
            return 0
        _tell_resumed(ahead)
        with _Said(request) as said:
            found = verb.sweep(store, request, resources, stages, said, note)
    return _show_result(request, found, as_json)


def _beside(trajectory: str) -> str:
    """Where results go: beside a trajectory, or here if it is on object storage."""
    from relexio.words import stem

    if "://" in trajectory:
        return f"{stem(trajectory)}.sweep"
    path = Path(trajectory)
    return str(path.with_name(path.name.removesuffix(".zarr") + ".sweep"))


@contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """Let the other ways to ask a program to end do what Ctrl-C does: an evaluation must not go on by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    like = signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # and not as under nohup
            before[number] = signal.signal(number, like if callable(like) else signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_resumed(ahead: "Prospect") -> None:
    done = len(ahead.candidates) - len(ahead.waiting)
    if done or ahead.failed:
        again = f"; {ahead.failed} failed before and will be tried again" if ahead.failed else ""
        note(f"{done} of {len(ahead.candidates)} evaluations are done already{again}")


class _Said:
    """Says what is evaluated, and how it went, on stderr."""

    def __init__(self, request: "Request") -> None:
        self.request, self.within = request, False

    def __enter__(self) -> "_Said":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.within and not (
            kind and issubclass(kind, KeyboardInterrupt)
        ):  # what comes now is a line of its own; click sees to Ctrl-C
            click.echo(err=True)

    def __call__(
        self, number: int, total: int, candidate: "Candidate", result: "Result | None", known: "Sweep"
    ) -> None:
        head = f"[{number}/{total}] {candidate.label}: "
        if result is None:
            if sys.stderr.isatty():
                click.echo(f"{head}evaluating ...", err=True, nl=False)
                self.within = True
            return
        clear = "\r\x1b[K" if self.within else ""
        click.echo(clear + printable(head + self._outcome(result, known)), err=True)
        self.within = False

    def _outcome(self, result: "Result", known: "Sweep") -> str:
        from relexio.sweep.curve import number

        if result.score is None:
            last = next((line.strip() for line in reversed(result.tail.splitlines()) if line.strip()), "")
            said = f": {last[:120]}" if last and result.line is None else ""
            return f"failed: {result.failed}{said} (all of it: {self.request.out / result.log})"
        last_observed = known.last_observed
        beside = ""
        if last_observed is not None and last_observed.score is not None and result.candidate.predicted:
            beside = f" (last observed {number(last_observed.score)})"
        return f"{number(result.score)}{beside}"


def _show_plan(request: "Request", ahead: "Prospect", as_json: bool) -> None:
    from relexio.words import describe_steps, show

    if as_json:
        facts = {
            "window": list(request.window),
            "out": str(request.out),
            "candidates": [candidate.name for candidate in ahead.candidates],
            "waiting": [candidate.name for candidate in ahead.waiting],
            "bytes_needed": ahead.bytes_needed,
            "bytes_free": ahead.bytes_free,
            "memory_projected": ahead.plan.projected,
            "memory_allowed": ahead.plan.allowed,
            "workers": ahead.plan.workers,
            "device": ahead.device,
        }
        click.echo(json.dumps(facts))
        return
    references = sum(not candidate.predicted for candidate in ahead.candidates)
    predictions = len(ahead.candidates) - references
    done = len(ahead.candidates) - len(ahead.waiting)
    limit = "no limit of time" if request.timeout is None else f"at most {seconds(request.timeout)} each"
    table(
        [
            ("window", describe_steps(request.window)),
            ("evaluations", f"{references} references and {predictions} predictions, {done} done already, {limit}"),
            (
                "",
                ", ".join(candidate.name for candidate in ahead.candidates[:4]) + (", ..." if predictions > 2 else ""),
            ),
            ("command", request.command),
            ("results", str(request.out)),
            ("disk", f"{show(ahead.bytes_needed)} for two checkpoints, {show(ahead.bytes_free)} free"),
            ("memory", f"{show(ahead.plan.projected)} projected, {show(ahead.plan.allowed)} allowed"),
            ("device", ahead.device),
        ]
    )


def _show_result(request: "Request", found: "Sweep", as_json: bool) -> int:
    from relexio.errors import EvaluationError
    from relexio.sweep.curve import curve

    if as_json:
        click.echo(json.dumps({**found.to_json(), "out": str(request.out)}))
    elif found.predicted:
        click.echo("\n".join([*curve(found), ""]))
        table(_verdict(request, found))
    if found.predicted:
        return 0
    failed = [result for result in found.results if result.candidate.predicted]
    last = failed[-1]
    raise EvaluationError(
        f"none of {len(failed)} predictions has a score; {last.candidate.label}: {last.failed} (see {request.out / last.log})"
    )


def _verdict(request: "Request", found: "Sweep") -> list[tuple[str, str]]:
    from relexio.sweep.curve import number

    best, last = found.best, found.last_observed
    if best is None or best.score is None:
        return []
    gain = found.gain(best)
    step = found.setting.window[-1][0]
    if gain is None or last is None or last.score is None:
        said = f"not known: step {step}, the last observed, has no score"
    elif gain > 0:
        said = f"+{number(gain)} over the last observed checkpoint (step {step}: {number(last.score)})"
    else:
        said = f"none: no prediction beats the last observed checkpoint (step {step}: {number(last.score)})"
    failed = sum(result.score is None for result in found.results if result.candidate.predicted)
    without = f", {failed} more failed" if failed else ""
    rows = [
        ("best", f"{best.candidate.label}: {number(best.score)}"),
        ("gain", said),
        ("chosen", f"the best of {len(found.predicted)} predictions{without}"),
    ]
    if len(found.predicted) > 1:
        rows.append(
            ("", "the best of several on the same problems is flattered: evaluate it once more on other problems")
        )
    return [*rows, ("wrote", f"{request.out / 'best'}, {request.out / 'results.csv'} and results.json")]
