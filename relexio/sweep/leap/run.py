"""The leap itself: train from the current model, store the steps, search along their line, go on from what scored best."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Protocol

from relexio import atomic
from relexio.checkpoints.layout import choose, open_checkpoint, open_step
from relexio.checkpoints.protocol import Checkpoint
from relexio.engine.resources import Resources
from relexio.errors import BaseItselfError, CheckpointError, EvaluationError, MissingError, RequestError, TrainingError
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.sweep.candidates import Candidate
from relexio.sweep.evaluate import evaluate
from relexio.sweep.leap.request import Files, Request
from relexio.sweep.leap.table import Leap, Round, Setting, parse
from relexio.sweep.leap.train import Trained, last_line, train
from relexio.sweep.plan import SweepPlan, prepare
from relexio.sweep.run import Watch, sweep
from relexio.sweep.table import Sweep
from relexio.verbs import convert
from relexio.verbs.convert.request import existing_store
from relexio.verbs.restore import restore
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
            open_checkpoint(request.base)
            table = Leap(_setting(request), work.score(request.base, "base"))
            events.ended(table)
        _save(files, table)
        files.tidy(len(table.rounds))
        _require_model(files, table)
        while len(table.rounds) < request.rounds:
            table = replace(table, rounds=(*table.rounds, work.round(table)), test=None, tests=None)
            _save(files, table)
            files.tidy(len(table.rounds))
            events.ended(table)
        asked = None if request.test is None else without_secrets(request.test)
        if request.test is not None and table.test != asked:
            last = files.model(len(table.rounds))
            tests = (work.score(request.base, "test-base", request.test), work.score(last, "test", request.test))
            table = replace(table, test=asked, tests=tests)
            _save(files, table)
    return table


def _require_model(files: Files, table: Leap) -> None:
    """Raise MissingError where the model that the last round ended with has gone, with the command that makes it again."""
    number = len(table.rounds)
    if not number or (model := files.model(number)).exists():
        return
    last, store = table.rounds[-1], quote(str(files.store(number)))
    what = (
        f"predict {store} --method {last.method} --step {last.step}"
        if last.taken
        else f"restore {store} --step {last.last}"
    )
    raise MissingError(f"{model}: has gone; make it again: relexio {what} -o {quote(str(model))}")


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
            option, tail = "--eval" if command is None else "--test", last_line(found.tail)
            raise EvaluationError(f"{option} fails on {checkpoint}: {found.failed}{tail} (see {log}); mend the command")
        return found.score

    def round(self, table: Leap) -> Round:
        """The next round."""
        number, begun = len(table.rounds) + 1, time.monotonic()
        model, out = self.files.model(number - 1) if table.rounds else self.request.base, self.files.model(number)
        trained = train(
            self.request, self.files, number, model, partial(self.events.training, number, model), self.note
        )
        store = self.stored(number, model, trained)
        atomic.remove_tree(out)  # of a round that was interrupted
        found = self.search(number, store)
        if any(result.score is None for result in found.results):  # once more, before a round is decided by it
            found = self.search(number, store)
        last, best = found.last_observed, found.best
        if last is None or last.score is None or best is None or best.score is None:
            raise EvaluationError(
                f"--eval failed on all that it was to choose from in round {number} (see {self.files.sweep(number) / 'logs'}); "
                f"mend the command, and run the same again: nothing is trained anew"
            )
        gain, errors = found.gain(best), [found.error(result) or 0.0 for result in (best, last)]
        taken = gain is not None and gain > max(errors)
        if taken:
            (self.files.sweep(number) / "best").rename(out)
            atomic.sync(out.parent)
        else:
            restore(store, store.steps[-1], out, self.resources, self.stages, complete=True)
        evaluated = sum(result.seconds for result in found.results)
        took = max(time.monotonic() - begun, trained.seconds + evaluated)  # some of it maybe before an interruption
        scored = len(found.find(lambda _: True))
        return Round(
            best.candidate.method, trained.train, trained.steps, store.steps[-1], last.score, best.candidate.at, best.score,
            found.error(best), taken, scored, len(found.results) - scored, trained.seconds, round(evaluated, 3), round(took, 3),
        )  # fmt: skip

    def stored(self, number: int, model: Path, trained: Trained) -> Store:
        """The trajectory of what was trained. Raises TrainingError where nothing was that can be gone on from."""
        steps, out = self.files.round(number) / trained.out, self.files.store(number)
        try:
            found = {step: open_step(step, at, steps, {}) for step, at in choose(steps, {}, None)[0].items()}
            store = existing_store(out) or self.convert(found, model, out)
            asked = self.request.sweep(store.steps, self.files.sweep(number))
            prepare(store, asked, self.resources, self.stages)  # a method may not take these steps
        except (CheckpointError, MissingError, RequestError) as error:
            self.files.trained(number).unlink()  # it is trained again
            log = self.files.round(number) / "train.log"
            raise TrainingError(
                f"--train left nothing to go on from in round {number}: {error} (its output: {log}). It must write whole step "
                f"directories that count from 1, such as checkpoint-{self.request.steps}, into {{out}}"
            ) from error
        return store

    def convert(self, steps: dict[int, Checkpoint], model: Path, out: Path) -> Store:
        """A new trajectory of steps; those that are the base itself, bit for bit, are left out unless all are."""
        while True:
            try:
                conversion = convert.prepare(convert.Request(out, model, named=steps), self.resources, self.stages)
                done = convert.convert(conversion, self.stages)
            except BaseItselfError as error:
                if len(steps) < 2 or error.step is None:
                    raise
                self.note(f"step {error.step} is the model that it began from, bit for bit, and left out")
                steps = {step: checkpoint for step, checkpoint in steps.items() if step != error.step}
                continue
            for text in (*conversion.notes, *done.notes):
                self.note(text)
            return done.store

    def search(self, number: int, store: Store) -> Sweep:
        """The sweep of a round."""
        asked = self.request.sweep(store.steps, self.files.sweep(number))
        plan = prepare(store, asked, self.resources, self.stages)
        return sweep(plan, self.stages, self.events.searching(number, plan), self.note)
