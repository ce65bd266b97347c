"""The sweep itself: write a checkpoint, evaluate it, record the score, keep it if it is the best, remove it if not."""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from relexio import atomic
from relexio.checkpoints.write import write_files
from relexio.engine import plan
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, EvaluationError, RequestError, StorageError
from relexio.fit.fit import Fit, fit
from relexio.methods import Recipe
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.sweep.candidates import BASE, Candidate, Request, filled
from relexio.sweep.command import Ended, run
from relexio.sweep.files import Files
from relexio.sweep.score import read_score
from relexio.sweep.table import Result, Setting, Sweep
from relexio.verbs import predict
from relexio.verbs.output import Target
from relexio.verbs.restore import restore
from relexio.words import show

#: Told of each evaluation when its checkpoint is written (no result yet), and after it: its number, how many there are,
#: and the table so far.
Watch = Callable[[int, int, Candidate, Result | None, Sweep], None]
_CARD = 1 << 16  # bytes of model card and provenance, and some


@dataclass(frozen=True)
class Prospect:
    """What a sweep will do: all that was asked for, what of it is still to be evaluated, and what that takes."""

    known: Sweep
    candidates: tuple[Candidate, ...]
    waiting: tuple[Candidate, ...]
    bytes_needed: int
    bytes_free: int
    plan: plan.Plan
    device: str

    @property
    def failed(self) -> int:
        """How many of those that wait have failed before."""
        return sum(self.known.of(candidate) is not None for candidate in self.waiting)


def prospect(store: Store, request: Request, resources: Resources) -> Prospect:
    """Check a sweep and say what it takes; no tensor is read, nothing is written.

    Raises RequestError for a step, method, strength or rank that the window does not allow and for a directory that
    holds another sweep, ExistsError for one that holds something else, BudgetError and StorageError for too little
    memory or disk.
    """
    if not (request.steps and request.strengths and request.methods):
        raise RequestError("nothing to predict: a sweep takes a step, a strength and a method at least")
    for method in request.methods:
        for strength in request.strengths:
            Recipe(method=method, rank=request.rank, strength=strength).check(
                np.array(request.window), list(request.steps)
            )
    files = Files(request.out)
    files.check()
    known = _known(store, request, files)
    candidates = request.candidates(store.steps)
    waiting = [c for c in candidates if (found := known.of(c)) is None or found.score is None]
    needed, free = _disk(store, request, files)
    first = Recipe(method=request.methods[0], rank=request.rank, strength=request.strengths[0])
    target = Target(request.steps[0], files.candidate("none"))
    one = predict.prospect(store, request.window, first, "auto", [target], resources)
    return Prospect(known, tuple(candidates), tuple(waiting), needed, free, one.plan, one.device)


def sweep(
    store: Store,
    request: Request,
    resources: Resources,
    stages: Stages,
    watch: Watch,
    note: Callable[[str], None],
) -> Sweep:
    """Evaluate all that has no score yet, and return the table. An evaluation that fails is recorded, and no error.

    Raises as ``prospect`` does, and BusyError while another sweep uses the directory. Interrupted at any moment, even
    killed, the same call goes on.
    """
    prospect(store, request, resources)  # before there is a directory
    files = Files(request.out)
    with files.opened(), atomic.storage_errors(request.out):
        ahead = prospect(store, request, resources)  # what it holds now, with nobody else writing
        known, total = ahead.known, len(ahead.candidates)
        work = _Work(store, request, files, resources, stages, note)
        try:
            files.save(known)
            work.settle(known)
            for number, candidate in enumerate(ahead.candidates, 1):
                if candidate in ahead.waiting:
                    checkpoint = work.write(candidate)
                    watch(number, total, candidate, None, known)
                    result = work.evaluate(candidate, checkpoint)
                    known = known.added(result)
                    files.save(known)
                    work.settle(known)
                    watch(number, total, candidate, result, known)
        finally:
            files.clear()
    return known


def _known(store: Store, request: Request, files: Files) -> Sweep:
    """What is known of this sweep already. Raises RequestError where the directory holds scores of another one."""
    window = tuple((step, _content(store, step)) for step in request.window)
    setting = Setting(store.base_content, window, request.rank, request.command)
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
        raise RequestError(f"{files.top}: holds scores of a sweep with {other}; give another -o, or ask for that again")
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
            f"--disk {show(request.disk)}: the candidate and the best so far take {show(needed)} at once; "
            f"give --disk {needed} at least"
        )
    ours = sum(map(atomic.tree_bytes, (files.best, files.candidate("none").parent)))
    free = atomic.free_bytes(request.out) + ours
    if free < needed:
        raise StorageError(
            f"{request.out}: {show(needed)} are needed for the candidate and the best so far, and "
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

    def evaluate(self, candidate: Candidate, checkpoint: Path) -> Result:
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
            return Result(candidate, None, str(error), ended.seconds, line, ended.tail, content)
        return Result(candidate, score, None, ended.seconds, ended.line, content=content)

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
            side = predict.lacking(store, store.checkpoints(store.find(step)[0])[step])
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


def _line(ended: Ended, timeout: float | None) -> str:
    """The line that holds the score. Raises EvaluationError for a command that did not end well."""
    if ended.code is None:
        raise EvaluationError(f"no score within {timeout:g} seconds")
    if ended.code:
        number = -ended.code if ended.code < 0 else ended.code - 128
        names = {int(known): known.name for known in signal.Signals}
        raise EvaluationError(f"exit code {ended.code}" + (f" ({names[number]})" if number in names else ""))
    return ended.line
