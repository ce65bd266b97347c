"""The leap itself: train from the current model, store the steps, search along their line, go on from what scored best."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from relexio import atomic
from relexio.bounded import loads
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError, EvaluationError, MissingError, RequestError, TrainingError
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.sweep.candidates import Candidate, filled
from relexio.sweep.command import run as run_command
from relexio.sweep.evaluate import evaluate, how_it_ended
from relexio.sweep.leap.request import Files, Request
from relexio.sweep.leap.table import Leap, Round, Setting, parse
from relexio.sweep.plan import SweepPlan, prepare
from relexio.sweep.run import Watch, sweep, write_observed
from relexio.sweep.table import Sweep
from relexio.verbs import convert
from relexio.words import without_secrets


class Events(Protocol):
    """What is told while a leap runs, in this order for each round."""

    def training(self, number: int, model: Path, log: Path) -> None:
        """The training command of a round starts."""

    def searching(self, number: int, plan: SweepPlan) -> Watch:
        """Its steps are stored and the search begins, of which every evaluation goes to the watch."""

    def ended(self, table: Leap) -> None:
        """A round is over, or (no rounds yet) the base is evaluated."""


def load(request: Request) -> Leap | None:
    """The table so far, if it can go on. Raises RequestError for one of another leap, ExistsError for what is none."""
    files = Files(request.out)
    files.check()
    if not files.table.is_file():
        return None
    found = parse(files.table.read_bytes(), str(files.table))
    other = _setting(request).unlike(found.setting)
    if other is None:
        return found
    if not found.rounds:
        return None  # only the base has a score, by a command that may have been mended
    raise RequestError(f"{request.out}: holds rounds of a leap with {other}; go on with that, or give another -o")


def leap(request: Request, resources: Resources, stages: Stages, events: Events, note: Callable[[str], None]) -> Leap:
    """Run all rounds that are missing, and return the table. After an interruption, even a kill, the same call continues.

    A round that was cut off while it trained is trained again, from its first step. Raises TrainingError where the training
    command fails or leaves no checkpoint, EvaluationError where the evaluation fails on the base or on what was trained,
    BusyError while another leap uses the directory, and whatever convert and sweep raise.
    """
    files = Files(request.out)
    with files.opened(), atomic.storage_errors(request.out):
        work = _Work(request, files, resources, stages, events, note)
        table = load(request)
        if table is None:
            table = Leap(_setting(request), work.score(request.base, "base"))
            events.ended(table)
        _save(files, table)
        files.tidy(len(table.rounds))
        while len(table.rounds) < request.rounds:
            table = replace(table, rounds=(*table.rounds, work.round(table)), tests=None)
            _save(files, table)
            files.tidy(len(table.rounds))
            events.ended(table)
        if request.test is not None and table.tests is None and table.rounds:
            last = files.model(len(table.rounds))
            tests = (work.score(request.base, "test-base", request.test), work.score(last, "test", request.test))
            table = replace(table, tests=tests)
            _save(files, table)
    return table


def _setting(request: Request) -> Setting:
    command = without_secrets(request.command)
    return Setting(str(request.base.resolve()), command, request.metric, request.lower_is_better)


def _save(files: Files, table: Leap) -> None:
    data = (json.dumps(table.to_json(), indent=1, allow_nan=False) + "\n").encode()
    atomic.write_file(atomic.staging(files.table), files.table, data)
    copy = files.top / "leap.csv"
    atomic.write_file(atomic.staging(copy), copy, table.to_csv().encode(), durable=False)


@dataclass(frozen=True)
class _Work:
    """What the rounds share."""

    request: Request
    files: Files
    resources: Resources
    stages: Stages
    events: Events
    note: Callable[[str], None]

    def score(self, checkpoint: Path, name: str, command: str | None = None) -> float:
        """The score of a checkpoint that no search has evaluated. Raises EvaluationError where there is none."""
        log = self.files.logs / f"{name}.log"
        asked = self.request.sweep((self.request.steps,), self.files.top, command)
        found = evaluate(Candidate(), checkpoint, asked, log)
        if found.score is None:
            option, tail = "--eval" if command is None else "--test", _last_line(found.tail)
            raise EvaluationError(f"{option} fails on {checkpoint}: {found.failed}{tail} (see {log}); mend the command")
        return found.score

    def round(self, table: Leap) -> Round:
        """The next round."""
        number, begun = len(table.rounds) + 1, time.monotonic()
        model = self.request.base if number == 1 else self.files.model(number - 1)
        train_seconds = self.train(number, model)
        store = self.stored(number, model)
        found = self.search(number, store)
        last, best = found.last_observed, found.best
        if last is None or last.score is None:  # it failed before, and was not tried again
            raise EvaluationError(f"--eval gave step {store.steps[-1]} of round {number} no score; run the same again")
        gain = None if best is None else found.gain(best)
        error = None if best is None else found.error(best)
        taken = gain is not None and gain > (error or 0.0)
        if not (out := self.files.model(number)).exists():
            if taken:
                (self.files.sweep(number) / "best").rename(out)
                atomic.sync(out.parent)
            else:
                write_observed(store, store.steps[-1], out, self.resources, self.stages)
        evaluated = sum(result.seconds for result in found.results)
        took = max(time.monotonic() - begun, train_seconds + evaluated)  # some of it maybe before an interruption
        return Round(
            self.request.method, without_secrets(self.request.train),
            store.steps[-1], last.score, best.candidate.at if best else None, best.score if best else None, error, taken,
            len(found.results), train_seconds, round(evaluated, 3), round(took, 3),
        )  # fmt: skip

    def train(self, number: int, model: Path) -> float:
        """Run the training command, unless it has ended well before; the seconds that it took. Raises TrainingError."""
        done, steps = self.files.trained(number), self.files.steps(number)
        if done.is_file():
            return float(loads(done.read_bytes())["seconds"])
        atomic.remove_tree(self.files.round(number))
        steps.mkdir(parents=True)
        log = self.files.round(number) / "train.log"
        self.events.training(number, model, log)
        command = filled(self.request.train, base=model, steps=self.request.steps, out=steps, round=number)
        ended = run_command(command, {"RELEXIO_ROUND": str(number)}, log, None)
        if ended.code:
            raise TrainingError(
                f"--train fails in round {number}: {how_it_ended(ended.code)}{_last_line(ended.tail)} (see {log}); mend the "
                f"command, and run the same again"
            )
        data = json.dumps({"seconds": round(ended.seconds, 3)}).encode()
        atomic.sync_tree(steps)
        atomic.write_new(done, data)
        return round(ended.seconds, 3)

    def stored(self, number: int, model: Path) -> Store:
        """The trajectory of what was trained. Raises TrainingError where nothing was."""
        request = convert.Request(self.files.store(number), model, self.files.steps(number), {})
        try:
            conversion = convert.prepare(request, self.resources, self.stages)
        except (CheckpointError, MissingError, RequestError) as error:
            self.files.trained(number).unlink()  # it is trained again
            log = self.files.round(number) / "train.log"
            raise TrainingError(
                f"--train left nothing to go on from in round {number}: {error} (its output: {log}). It must write step "
                f"directories, such as checkpoint-{self.request.steps}, into {{out}}"
            ) from error
        if conversion.store and not conversion.steps:
            return conversion.store  # before an interruption
        done = convert.convert(conversion, self.stages)
        for text in (*conversion.notes, *done.notes):
            self.note(text)
        return done.store

    def search(self, number: int, store: Store) -> Sweep:
        """The sweep of a round."""
        asked = self.request.sweep(store.steps, self.files.sweep(number))
        plan = prepare(store, asked, self.resources, self.stages)
        return sweep(plan, self.stages, self.events.searching(number, plan), self.note)


def _last_line(tail: str) -> str:
    """The last line that a failed command has printed, to be added to an error."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return f" ({lines[-1][:120]})" if lines else ""
