"""The sweep itself: write a checkpoint, evaluate it, record the score, keep it if it is the best, remove it if not."""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from relexio import atomic
from relexio.engine.resources import Resources
from relexio.errors import EvaluationError, OverflowedError
from relexio.fit.fit import Fit, fit
from relexio.methods import Recipe
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.sweep.candidates import Candidate, Request
from relexio.sweep.evaluate import evaluate
from relexio.sweep.files import Files
from relexio.sweep.plan import SweepPlan, content_of
from relexio.sweep.table import Evaluation, Sweep
from relexio.verbs import predict
from relexio.verbs.output import Target
from relexio.verbs.restore import restore

#: Told of each evaluation before its checkpoint is written (no result yet), and after it; and the table so far.
Watch = Callable[[Candidate, Evaluation | None, Sweep], None]


def sweep(plan: SweepPlan, stages: Stages, watch: Watch, note: Callable[[str], None]) -> Sweep:
    """Evaluate all that has no score yet, and return the table. A failed evaluation is recorded and is no error.

    Raises as ``prepare`` does, BusyError while another sweep uses the directory, and EvaluationError where base and last
    observed step both fail: then it is the command that is broken. After an interruption, even a kill, the same call
    continues.
    """
    files = Files(plan.request.out)
    with files.opened(), atomic.storage_errors(plan.request.out):
        plan = plan.as_of_now()
        table, tried = plan.table, set[Candidate]()
        work = _Work(plan.store, plan.request, files, plan.resources, stages, note)
        try:
            files.save(table)
            work.settle(table)
            while (candidate := plan.next(table, tried)) is not None:
                tried.add(candidate)
                watch(candidate, None, table)
                evaluation = work.evaluate(candidate)
                table = table.added(evaluation)
                files.save(table)
                work.settle(table)
                watch(candidate, evaluation, table)
                _require_command(table, plan.request, tried)
        finally:
            files.clear()
    return table


def _require_command(table: Sweep, request: Request, tried: Container[Candidate]) -> None:
    """Raise EvaluationError where the command fails on base and last observed step; in a search, on the latter alone."""
    base, last = table.of(Candidate()), table.last_observed
    on_base = base is not None and bool(base.failed)
    if last is None or not last.failed or not (on_base or not request.steps):
        return
    if last.candidate not in tried:  # it failed in an earlier run, and will be tried again
        return
    which = "the base and on " if on_base else ""
    ended = next((f" ({line.strip()[:120]})" for line in reversed(last.tail.splitlines()) if line.strip()), "")
    raise EvaluationError(
        f"--eval fails on {which}step {last.candidate.at}, the last observed: {last.failed}{ended} (see {request.out / last.log}); "
        f"mend the command, and run the same sweep again"
    )


@dataclass
class _Work:
    """What evaluations share: fits, one for each line, and which checkpoint stands as the best."""

    store: Store
    request: Request
    files: Files
    resources: Resources
    stages: Stages
    note: Callable[[str], None]
    fits: dict[tuple[Recipe, int | None], Fit] = field(default_factory=dict)
    placed: Candidate | None = None

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Write a checkpoint and run the command on it."""
        try:
            checkpoint = self.write(candidate)
        except OverflowedError as error:
            return Evaluation(candidate, None, f"it was not written: {error}", 0.0)
        content = content_of(self.store, candidate)
        return evaluate(candidate, checkpoint, self.request, self.files.log(candidate.name), content)

    def settle(self, known: Sweep) -> None:
        """Let the best checkpoint be that of the table, and remove the others. It is predicted again if need be."""
        best = known.best
        if best is not None and best.candidate != self.placed:
            chosen = best.candidate
            recipe = chosen.recipe.to_json() if chosen.recipe else {}
            facts = {"step": chosen.at, **recipe, "window": list(self._window(chosen.first))}
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
        if candidate.recipe is not None:
            fitted = self._fitted(candidate.recipe, candidate.first)
            predict.predict(fitted, [Target(candidate.at, out)], self.resources, self.stages)
            return out
        restore(self.store, candidate.step, out, self.resources, self.stages, complete=True)
        return out

    def _window(self, first: int | None) -> tuple[int, ...]:
        return tuple(step for step in self.request.window if first is None or step >= first)

    def _fitted(self, recipe: Recipe, first: int | None) -> Fit:
        key = replace(recipe, strength=1.0), first
        if key not in self.fits:
            found = fit(self.store, self._window(first), recipe, "auto", self.resources, self.stages)
            self._tell(found.notes)
            self.fits[key] = found
        return replace(self.fits[key], recipe=recipe)

    def _tell(self, notes: Iterable[str]) -> None:
        said = {text for found in self.fits.values() for text in found.notes}
        for text in notes:
            if text not in said:
                self.note(text)
