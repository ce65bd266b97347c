"""What a sweep will do: checked and planned before anything is run, and what to evaluate next once it runs."""

from collections.abc import Container
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from pathlib import Path
from shlex import quote

import numpy as np

from relexio import atomic
from relexio.engine import plan
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, RequestError, StorageError
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.sweep.candidates import Candidate, Line, Request
from relexio.sweep.files import Files
from relexio.sweep.lines import find_lines
from relexio.sweep.search import MOST, Scored, next_step
from relexio.sweep.table import Evaluation, Setting, Sweep
from relexio.verbs import predict
from relexio.verbs.output import Target
from relexio.words import show, without_secrets

_CARD = 1 << 16  # bytes of model card and provenance, and some


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do: the table so far, what is evaluated, and what that needs.

    ``candidates``: all that is certain to be evaluated; ``lines`` of a search add to it. ``why``: what the backtest
    recommended, in words. ``bytes_needed`` and ``bytes_free`` are of disk; ``plan`` is that of one prediction, on ``device``.
    """

    store: Store
    request: Request
    resources: Resources
    candidates: tuple[Candidate, ...]
    lines: tuple[Line, ...]
    why: str | None
    plan: plan.Plan
    device: str
    table: Sweep
    bytes_needed: int
    bytes_free: int

    @property
    def waiting(self) -> tuple[Candidate, ...]:
        """The candidates that have no score yet; those that a search will choose are not among them."""
        known = {evaluation.candidate for evaluation in self.table.find(lambda _: True)}
        return tuple(candidate for candidate in self.candidates if candidate not in known)

    @property
    def searching(self) -> bool:
        """Whether scores decide what is evaluated."""
        return not self.request.steps

    @property
    def most(self) -> int:
        """How many evaluations there are at most."""
        return len(self.candidates) + (MOST * len(self.lines) if self.searching else 0)

    @property
    def done(self) -> int:
        """How many of them have a score already."""
        searched = sum(result.score is not None for result in self._found(self.table))
        return len(self.candidates) - len(self.waiting) + min(searched, self.most - len(self.candidates))

    @property
    def failed(self) -> int:
        """How many have failed before, and will be tried again."""
        before = sum(self.table.of(candidate) is not None for candidate in self.waiting)
        return before + sum(result.score is None for result in self._found(self.table))

    def _found(self, table: Sweep) -> list[Evaluation]:
        """The results of a search."""
        return [
            result for line in self.lines for result in table.results if self.searching and line.holds(result.candidate)
        ]

    def next(self, table: Sweep, tried: Container[Candidate]) -> Candidate | None:
        """What to evaluate next, given all results so far; what was ``tried`` now and failed is not tried again."""
        scored = {result.candidate for result in table.find(lambda _: True)}
        waiting = (candidate for candidate in self.candidates if candidate not in scored and candidate not in tried)
        searched = (self._search(table, tried, line) for line in self.lines if self.searching)
        return next(chain(waiting, filter(None, searched)), None)

    def _search(self, table: Sweep, tried: Container[Candidate], line: Line) -> Candidate | None:
        """The next candidate of a search along one line; None where it is over, or the last observed has no score."""
        known = table.last_observed
        if known is None or known.score is None:
            return None
        here = [result for result in self._found(table) if line.holds(result.candidate)]
        here = [result for result in here if result.score is not None or result.candidate in tried]
        if here and line.recipe.way.fixed:
            return None
        scores = {result.candidate.at: _scored(table, result) for result in here}
        step = next_step(self.request.window[-1], line.ahead, scores, _scored(table, known))
        return None if step is None else Candidate(step, line.recipe, line.first)

    def as_of_now(self) -> "SweepPlan":
        """The same with what the directory holds now, which another process may have changed since."""
        files = Files(self.request.out)
        needed, free = _disk(self.store, self.request, files)
        return replace(self, table=_known(self.store, self.request, files), bytes_needed=needed, bytes_free=free)


def _scored(table: Sweep, result: Evaluation) -> Scored:
    if result.score is None:
        return Scored(-inf)
    return Scored(-result.score if table.lower_is_better else result.score, table.error(result) or 0.0)


def prepare(store: Store, request: Request, resources: Resources, stages: Stages) -> SweepPlan:
    """Check a sweep and plan it; nothing is written but the fit that a backtest needs, where one is asked for.

    Raises RequestError for a step, method, strength or rank that the window does not allow, where the backtest recommends
    nothing, and for a directory that holds another sweep, ExistsError for one that holds something else, BudgetError and
    StorageError for too little memory or disk.
    """
    files = Files(request.out)
    files.check()
    table = _known(store, request, files)
    needed, free = _disk(store, request, files)
    lines, why = find_lines(store, request, resources, stages)
    for line in lines:
        line.recipe.check(np.array(request.window), list(request.steps) or [request.window[-1] + line.ahead])
    most = max(lines, key=lambda line: line.recipe.way.whole)  # a method that takes no less than all needs most memory
    target = Target(request.steps[0] if request.steps else request.window[-1] + most.ahead, files.candidate("none"))
    one = predict.prepare(store, request.window, most.recipe, "auto", [target], resources)
    grid = [
        Candidate(step, line.recipe, line.first)
        for line in lines
        for step in request.steps[: 1 if line.recipe.way.fixed else None]  # it predicts the same for all
    ]
    candidates = (*request.references(store.steps), *grid)
    device = one.executor.device
    return SweepPlan(store, request, resources, candidates, lines, why, one.plan, device, table, needed, free)


def known_scores(store: Store, window: tuple[int, ...], top: Path) -> list[tuple[str, int, float, float | None]]:
    """What a sweep's directory holds: curve, step, score and its standard error of each result that has a score.

    None of a directory that is not there, or holds scores of other checkpoints or of another window. Raises RequestError
    for a damaged table.
    """
    table = Files(top).load()
    if table is None or table.setting.base != store.base_content:
        return []
    if table.setting.window != tuple((step, _content(store, step)) for step in window):
        return []
    scored = [(r, r.score) for r in table.results if r.content == content_of(store, r.candidate)]
    return [(r.candidate.series, r.candidate.at, score, table.error(r)) for r, score in scored if score is not None]


def _known(store: Store, request: Request, files: Files) -> Sweep:
    """What is known of this sweep already. Raises RequestError where the directory holds scores of another one."""
    window = tuple((step, _content(store, step)) for step in request.window)
    setting = Setting(store.base_content, window, without_secrets(request.command))
    fresh = Sweep(store.shown, setting, request.metric, request.lower_is_better, request.problems)
    found = files.load()
    if found is None:
        return fresh
    other = setting.unlike(found.setting)
    if other is None:
        same = tuple(r for r in found.results if r.content == content_of(store, r.candidate))
        return replace(found, results=same).judged(fresh)
    if found.find(lambda result: True):
        raise RequestError(
            f"{files.top}: holds scores of a sweep with {other}; sweep with that again, or give another directory, such as "
            f"-o {quote(f'{files.top}-{request.window[-1]}')}"
        )
    return fresh


def _content(store: Store, step: int) -> str:
    group, column = store.find(step)
    return group.content[column]


def content_of(store: Store, candidate: Candidate) -> str | None:
    """The content hash of an observed step, empty where it is no longer stored; None for the base and predictions."""
    if candidate.predicted or candidate.step is None:
        return None
    return _content(store, candidate.step) if candidate.step in store.steps else ""


def _disk(store: Store, request: Request, files: Files) -> tuple[int, int]:
    """Bytes that two checkpoints take, and bytes to be had. Raises BudgetError, StorageError where that is too little."""
    records = [store.base()]
    for step in filter(None, (candidate.step for candidate in request.references(store.steps))):
        records.append(store.checkpoints(store.find(step)[0])[step])
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
