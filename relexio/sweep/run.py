"""The sweep itself: write a checkpoint, evaluate it, record the score, keep it if it is the best, remove it if not."""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from relexio import atomic
from relexio.checkpoints.side import lacking
from relexio.checkpoints.write import write_files
from relexio.engine import plan
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, EvaluationError, RequestError, StorageError
from relexio.fit.fit import Fit, fit
from relexio.methods import Recipe
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.sweep.candidates import BASE, Candidate, Request, filled
from relexio.sweep.command import CommandResult, run
from relexio.sweep.files import Files
from relexio.sweep.score import read_score
from relexio.sweep.table import Evaluation, Setting, Sweep
from relexio.verbs import predict
from relexio.verbs.output import Target
from relexio.verbs.restore import restore
from relexio.words import show, without_secrets

#: Told of each evaluation when its checkpoint is written (no result yet), and after it: its number, how many there are,
#: and the table so far.
Watch = Callable[[int, int, Candidate, Evaluation | None, Sweep], None]
_CARD = 1 << 16  # bytes of model card and provenance, and some


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do: the table so far, all candidates, those still to be evaluated, and what they need.

    ``bytes_needed`` and ``bytes_free`` are of disk; ``plan`` is that of one prediction, on ``device``.
    """

    store: Store
    request: Request
    resources: Resources
    candidates: tuple[Candidate, ...]
    plan: plan.Plan
    device: str
    table: Sweep
    bytes_needed: int
    bytes_free: int

    @property
    def waiting(self) -> tuple[Candidate, ...]:
        """The candidates that have no score yet."""
        known = {evaluation.candidate for evaluation in self.table.find(lambda _: True)}
        return tuple(candidate for candidate in self.candidates if candidate not in known)

    @property
    def failed(self) -> int:
        """How many of those that wait have failed before."""
        return sum(self.table.of(candidate) is not None for candidate in self.waiting)

    def as_of_now(self) -> "SweepPlan":
        """The same with what the directory holds now, which another process may have changed since."""
        files = Files(self.request.out)
        needed, free = _disk(self.store, self.request, files)
        return replace(self, table=_known(self.store, self.request, files), bytes_needed=needed, bytes_free=free)


def prepare(store: Store, request: Request, resources: Resources) -> SweepPlan:
    """Check a sweep and plan it; no tensor is read, nothing is written.

    Raises RequestError for a step, method, strength or rank that the window does not allow and for a directory that
    holds another sweep, ExistsError for one that holds something else, BudgetError and StorageError for too little
    memory or disk.
    """
    if not (request.steps and request.strengths and request.methods):
        raise RequestError("nothing to predict: a sweep needs at least one step, one strength and one method")
    recipes = [Recipe(method, request.rank, strength) for method in request.methods for strength in request.strengths]
    for recipe in recipes:
        recipe.check(np.array(request.window), list(request.steps))
    files = Files(request.out)
    files.check()
    table = _known(store, request, files)
    needed, free = _disk(store, request, files)
    target = Target(request.steps[0], files.candidate("none"))
    most = max(
        recipes, key=lambda recipe: recipe.way.whole
    )  # what needs most memory: a method that takes no less than all
    one = predict.prepare(store, request.window, most, "auto", [target], resources)
    candidates = tuple(request.candidates(store.steps))
    return SweepPlan(store, request, resources, candidates, one.plan, one.executor.device, table, needed, free)


def sweep(plan: SweepPlan, stages: Stages, watch: Watch, note: Callable[[str], None]) -> Sweep:
    """Evaluate all that has no score yet, and return the table. A failed evaluation is recorded and is no error.

    Raises as ``prepare`` does, and BusyError while another sweep uses the directory. After an
    interruption, even a kill, the same call continues.
    """
    files = Files(plan.request.out)
    with files.opened(), atomic.storage_errors(plan.request.out):
        plan = plan.as_of_now()
        table, waiting, total = plan.table, plan.waiting, len(plan.candidates)
        work = _Work(plan.store, plan.request, files, plan.resources, stages, note)
        try:
            files.save(table)
            work.settle(table)
            for number, candidate in enumerate(plan.candidates, 1):
                if candidate in waiting:
                    checkpoint = work.write(candidate)
                    watch(number, total, candidate, None, table)
                    evaluation = work.evaluate(candidate, checkpoint)
                    table = table.added(evaluation)
                    files.save(table)
                    work.settle(table)
                    watch(number, total, candidate, evaluation, table)
        finally:
            files.clear()
    return table


def _known(store: Store, request: Request, files: Files) -> Sweep:
    """What is known of this sweep already. Raises RequestError where the directory holds scores of another one."""
    window = tuple((step, _content(store, step)) for step in request.window)
    setting = Setting(store.base_content, window, request.rank, without_secrets(request.command))
    fresh = Sweep(store.shown, setting, request.metric, request.lower_is_better)
    found = files.load()
    if found is None:
        return fresh
    other = setting.unlike(found.setting)
    if other is None:
        judged = found.judged(request.metric, request.lower_is_better)
        same = tuple(r for r in judged.results if r.content == _content_of(store, r.candidate))
        return replace(judged, trajectory=store.shown, results=same)
    if found.find(lambda result: True):
        raise RequestError(
            f"{files.top}: holds scores of a sweep with {other}; give another -o, or sweep with that again"
        )
    return fresh


def _content(store: Store, step: int) -> str:
    group, column = store.find(step)
    return group.content[column]


def _content_of(store: Store, candidate: Candidate) -> str | None:
    if candidate.predicted or candidate.method == BASE:
        return None
    return _content(store, candidate.step) if candidate.step in store.steps else ""


def _disk(store: Store, request: Request, files: Files) -> tuple[int, int]:
    """Bytes that two checkpoints take, and bytes to be had. Raises BudgetError, StorageError where that is too little."""
    records = [store.base()]
    for candidate in request.candidates(store.steps):
        if not candidate.predicted and candidate.method != BASE:
            records.append(store.checkpoints(store.find(candidate.step)[0])[candidate.step])
    side = {array for record in records for array in record.beside.values()}
    around = sum(store.array(array).shape[0] for array in side) + _CARD
    needed = 2 * (max(record.nbytes(store.table) for record in records) + around)
    if request.disk is not None and request.disk < needed:
        raise BudgetError(
            f"--disk {show(request.disk)} is too small: the candidate and the best so far need {show(needed)} "
            f"together; give --disk {needed} or more"
        )
    ours = sum(map(atomic.tree_bytes, (files.best, files.candidate("none").parent)))
    free = atomic.free_bytes(request.out) + ours
    if free < needed:
        raise StorageError(
            f"{request.out}: the candidate and the best so far need {show(needed)} together, but only "
            f"{show(free)} are free; free space, or give another -o"
        )
    return needed, free


@dataclass
class _Work:
    """What evaluations share: fits, one for each method, and which checkpoint stands as the best."""

    store: Store
    request: Request
    files: Files
    resources: Resources
    stages: Stages
    note: Callable[[str], None]
    fits: dict[str, Fit] = field(default_factory=dict)
    placed: Candidate | None = None

    def evaluate(self, candidate: Candidate, checkpoint: Path) -> Evaluation:
        """Run the command on a checkpoint."""
        environment = {
            "RELEXIO_STEP": str(candidate.step),
            "RELEXIO_METHOD": candidate.method,
            "RELEXIO_STRENGTH": "" if candidate.strength is None else repr(candidate.strength),
        }
        command = filled(self.request.command, checkpoint, candidate.step)
        ended = run(command, environment, self.files.log(candidate.name), self.request.timeout)
        content = _content_of(self.store, candidate)
        try:
            score = read_score(_line(ended, self.request.timeout), self.request.metric)
        except EvaluationError as error:
            line = ended.line if ended.code == 0 else None
            return Evaluation(candidate, None, str(error), ended.seconds, line, ended.tail, content)
        return Evaluation(candidate, score, None, ended.seconds, ended.line, content=content)

    def settle(self, known: Sweep) -> None:
        """Let the best checkpoint be that of the table, and remove the others. It is predicted again if need be."""
        best = known.best
        if best is not None and best.candidate != self.placed:
            chosen = best.candidate
            facts = {"step": chosen.step, "method": chosen.method, "strength": chosen.strength}
            if not self.files.best_is(facts):
                there = self.files.candidate(chosen.name)
                if not there.exists():
                    self.files.clear()  # what a killed sweep has left would be a third checkpoint
                    self.write(chosen)
                self.files.take(there)
            self.placed = chosen
        self.files.clear()

    def write(self, candidate: Candidate) -> Path:
        """Write a prediction, or an observed checkpoint as it was; where that lacks side files it gets the base's."""
        out = self.files.candidate(candidate.name)
        if candidate.predicted:
            target = Target(candidate.step, out)
            predict.predict(self._fitted(candidate), [target], self.resources, self.stages)
            return out
        store, step = self.store, None if candidate.method == BASE else candidate.step
        restore(store, step, out, self.resources, self.stages)
        if step is not None:
            side = lacking(store.base(), store.record(step), store.file)
            write_files(out, ((name, store.pieces(array)) for name, array in side.items()))
        return out

    def _fitted(self, candidate: Candidate) -> Fit:
        recipe = Recipe(method=candidate.method, rank=self.request.rank, strength=candidate.strength or 0.0)
        if candidate.method not in self.fits:
            found = fit(self.store, self.request.window, recipe, "auto", self.resources, self.stages)
            self._tell(found.notes)
            self.fits[candidate.method] = found
        return replace(self.fits[candidate.method], recipe=recipe)

    def _tell(self, notes: Iterable[str]) -> None:
        said = {text for found in self.fits.values() for text in found.notes}
        for text in notes:
            if text not in said:
                self.note(text)


def _line(ended: CommandResult, timeout: float | None) -> str:
    """The line that holds the score. Raises EvaluationError for a command that did not end well."""
    if ended.code is None:
        raise EvaluationError(f"no score within {timeout:g} seconds")
    if ended.code:
        number = -ended.code if ended.code < 0 else ended.code - 128
        names = {int(known): known.name for known in signal.Signals}
        raise EvaluationError(f"exit code {ended.code}" + (f" ({names[number]})" if number in names else ""))
    return ended.line
