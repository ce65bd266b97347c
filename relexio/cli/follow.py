"""``relexio convert --follow`` and ``--delete-verified``: one line about a running training, and what was deleted."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click

from relexio.cli.command import Result
from relexio.cli.show import not_stored, note, printable, quiet, seconds, stages, table
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, MissingError, RequestError
from relexio.fit.fit import command
from relexio.progress import Stages, silent
from relexio.store.store import Store
from relexio.verbs.backtest import judge
from relexio.verbs.convert import Conversion, Request
from relexio.verbs.convert.delete import Deleted, Keep, delete_verified
from relexio.verbs.convert.follow import Added, Looked
from relexio.verbs.convert.left import recorded
from relexio.verbs.inspect import sizes
from relexio.words import describe_steps, show

_FEWEST, _MORE = 6, 1.25  # steps before there is a verdict, and how many times as many before the next
_RECENT = 10  # steps whose pace is shown


@dataclass
class Freed:
    """What was deleted so far, and the problems that were told."""

    steps: list[int] = field(default_factory=list)
    bytes: int = 0
    refused: dict[int, str] = field(default_factory=dict)

    def add(self, deleted: Deleted, clear: Callable[[], None] = lambda: None) -> None:
        """Count what became of a step, or tell why its files stay."""
        self.bytes += deleted.bytes
        if deleted.problem is None:
            self.steps.append(deleted.step)
        else:
            self.refused[deleted.step] = deleted.problem
            clear()
            note(deleted.problem)

    def rows(self) -> list[tuple[str, str]]:
        """A row for people; none where nothing was deleted."""
        return (
            [("deleted", f"weights of {describe_steps(tuple(self.steps))}, {show(self.bytes)}")] if self.steps else []
        )

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"steps": self.steps, "bytes": self.bytes, "left": [*self.refused.values()]}


def step_directories(
    models: Mapping[int, Path], root: Path | None, named: Mapping[int, Path] | None = None
) -> dict[int, Path]:
    """The directory of each step, given those of its models: the one in ``root``, or that which was named."""
    named = named or {}
    return {
        step: named[step] if step in named or root is None else root / model.relative_to(root).parts[0]
        for step, model in models.items()
    }


def delete(
    store: Store, models: Mapping[int, Path], tops: Mapping[int, Path], keep: Keep, resources: Resources
) -> Freed:
    """Delete what the store has given back, and tell what is left."""
    freed = Freed()
    for deleted in delete_verified(store, models, tops, keep, resources, stages):
        freed.add(deleted)
    return freed


def require_bytes(conversion: Conversion) -> None:
    """Raise RequestError where the store could not give the very bytes of the steps back, so that none may be deleted."""
    cast = next((checkpoint for checkpoint in conversion.checkpoints if checkpoint.cast), None)
    if cast is not None:
        raise RequestError(
            f"{cast.label}: --delete-verified: it has {cast.cast}, and is stored rounded to other types: the trajectory could "
            f"not give these bytes back; leave --delete-verified out, or keep the types with --dtype stored and another -o"
        )


class _StatusLine:
    """One line on stderr: redrawn on a terminal, else printed where it says something new."""

    def __init__(self) -> None:
        self._terminal, self._text = sys.stderr.isatty(), ""

    def show(self, text: str, waiting: str = "") -> None:
        """Show a text; what is ``waiting`` beside it only where the line can be redrawn."""
        if quiet():
            return
        if self._terminal:
            line = printable(text + waiting)[: max(shutil.get_terminal_size().columns - 1, 20)]
            click.echo(f"\r\x1b[2K{line}", nl=False, err=True)
        elif text != self._text:
            click.echo(printable(text), err=True)
        self._text = text

    def clear(self) -> None:
        """Make room for another line."""
        if self._terminal and self._text:
            click.echo("\r\x1b[2K", nl=False, err=True)

    def end(self) -> None:
        """Leave the line where it is."""
        if self._terminal and self._text:
            click.echo(err=True)

    def stages(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Progress of a stage, in the place of the line."""
        self.clear()
        return stages(name, total)


class _Run:
    """What the line says: last step, size, pace, and how the verdict stands."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._times: list[tuple[int, float]] = []
        self._judged, self._verdict = 0, ""
        self._seal, self._words = "", ""

    def added(self, added: Added) -> None:
        """Take note of new steps, and when they came."""
        now = time.monotonic()
        self._times = [*self._times, (len(added.result.store.steps), now)][-_RECENT:]
        steps = added.result.store.steps
        if len(steps) >= max(_FEWEST, _MORE * self._judged):
            self._judged = len(steps)
            self._verdict = f"verdict: {self._judge(added.result.store)}"

    def _judge(self, store: Store) -> str:
        try:
            judged = judge(store, store.steps, self._resources, silent)
        except BudgetError:
            return "needs more --memory"
        if judged.verdict is None or judged.advised is None:
            return "do not extrapolate yet"
        return f"to step {judged.verdict.farthest}, {judged.verdict.sure}"

    def words(self, store: Store) -> str:
        """The line."""
        if self._seal != store.seal:
            self._seal, self._words = store.seal, self._say(store)
        return self._words

    def _say(self, store: Store) -> str:
        size, pace = sizes(store), ""
        (few, begun), (many, last) = (self._times[0], self._times[-1]) if self._times else ((0, 0.0), (0, 0.0))
        if many > few:
            pace = f", every {(last - begun) / (many - few):.2g} s"
        parts = [f"step {store.steps[-1]} stored: {len(store.steps)} in {show(size.steps)}{pace}", self._verdict]
        return "; ".join(part for part in parts if part)


#: What happens to a run, given how progress is shown.
Events = Callable[[Stages], Iterator[Added | Looked | str]]


def follow_run(request: Request, events: Events, keep: Keep | None, resources: Resources) -> Result:
    """Show what happens until it ends, and give what is there then. ``keep``: None to delete nothing."""
    line, run, freed, since = _StatusLine(), _Run(resources), Freed(), time.monotonic()
    store: Store | None = None
    told: set[str] = set()
    try:
        for event in events(line.stages):
            if isinstance(event, Looked):
                store = event.store
                if store and keep is not None:
                    done = {*freed.refused, *freed.steps}  # what a user puts back stays
                    left = {step: path for step, path in event.directories.items() if step not in done}
                    tops = step_directories(left, request.root)
                    for deleted in delete_verified(store, left, tops, keep, resources, line.stages):
                        freed.add(deleted, line.clear)
                text = run.words(store) if store else f"waiting for the first step in {request.root}"
                line.show(text, f"; waiting {seconds(time.monotonic() - since)}")
                continue
            line.clear()
            for text in [text for text in _texts(event) if text not in told]:
                note(text)
                told.add(text)
            if isinstance(event, Added):
                if keep is not None:
                    require_bytes(event.conversion)
                since, store = time.monotonic(), event.result.store
                run.added(event)
                line.show(run.words(store))
    finally:
        line.end()
    if store is None:
        raise MissingError(f"{request.root}: no step was whole by then; {request.out} was not made")
    return Result(partial(_facts, store, freed), partial(_show, store, freed), next=(command("backtest", store),))


def _texts(event: Added | str) -> tuple[str, ...]:
    return (event,) if isinstance(event, str) else (*event.conversion.notes, *event.result.notes)


def _facts(store: Store, freed: Freed) -> object:
    return {
        "out": store.shown,
        "steps": list(store.steps),
        "bytes": asdict(sizes(store)),
        "deleted": freed.to_json(),
        "not_stored": [one.to_json() for one in recorded(store)],
    }


def _show(store: Store, freed: Freed) -> None:
    size = sizes(store)
    words = f"{show(size.steps)} for {show(size.checkpoints)} of checkpoints, and {show(size.base)} for the base"
    table(
        [
            ("trajectory", store.shown),
            ("holds", describe_steps(store.steps)),
            ("size", words),
            *freed.rows(),
            *not_stored(recorded(store)),
        ]
    )
