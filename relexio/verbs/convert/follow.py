"""``convert --follow``: each step of a running training is stored as soon as it is whole."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from relexio.checkpoints.layout import choose, find_steps, open_checkpoint, open_step
from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.record import CheckpointRecord
from relexio.checkpoints.whole import Stamps, Watch, weight_stamps
from relexio.engine.resources import Resources
from relexio.errors import (
    BaseItselfError,
    CheckpointError,
    IncompleteError,
    MissingError,
    RelexioError,
    RequestError,
    StorageError,
)
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.verbs.convert.base import StoredBase, as_stored
from relexio.verbs.convert.before import require_same
from relexio.verbs.convert.request import Conversion, Request, existing_store, prepare
from relexio.verbs.convert.write import ConversionResult, convert
from relexio.words import describe_steps

#: Seconds between two looks at the directory (network file systems do not tell what changes): a twentieth of the time that
#: has passed since the last step, at least and at most so much.
_SOONEST, _LATEST = 0.1, 1.0
_PATIENCE = 30.0  # seconds after which a step without weights is asked about
_QUIET = 5.0  # seconds for which a step without a marker must be left alone


@dataclass(frozen=True)
class Added:
    """Steps that were stored."""

    conversion: Conversion
    result: ConversionResult


@dataclass(frozen=True)
class Looked:
    """A look at the directory has ended: the store as it is, and the directories of all stored steps that still have weights."""

    store: Store | None
    directories: dict[int, Path]


def follow(
    request: Request, until: int | None, idle: float | None, resources: Resources, stages: Stages
) -> Iterator[Added | Looked | str]:
    """Add steps to a store as they become whole; gives what was added, notes, and after each look where things stand.

    Ends when ``until`` or a later step is stored, or when nothing new has come for ``idle`` seconds. A step that vanishes
    before it could be read is left out, with a note. Raises CheckpointError where a stored step was written again with
    other bits.
    """
    follower = _Follower(request, resources, stages)
    yield from _doubts(request, follower.store)
    last = time.monotonic()
    while True:
        added = False
        for event in follower.look():
            added = added or isinstance(event, Added)
            yield event
        last = time.monotonic() if added else last
        yield Looked(follower.store, follower.stored)
        if until is not None and follower.store and follower.store.steps[-1] >= until:
            return
        if idle is not None and time.monotonic() - last >= idle:
            return
        if not added:
            time.sleep(min(max((time.monotonic() - last) / 20, _SOONEST), _LATEST))


def _doubts(request: Request, store: Store | None) -> Iterator[str]:
    """Raise at once what no waiting would mend, and say what may be wrong with the directory."""
    if store is None and request.base is None:
        raise RequestError(f"{request.out} does not exist yet: a new trajectory needs --base, the model before RL")
    if request.base is not None:
        open_checkpoint(request.base)
    if request.root is not None and request.root.exists():
        try:
            choose(request.root, {}, request.selection, request.pattern)
        except RequestError as error:
            yield f"nothing to store yet: {error}"
        except RelexioError:
            if not request.root.is_dir():
                raise


class _Follower:
    """What is known of a run: its store, and the files of its steps as they were when they were stored or compared."""

    def __init__(self, request: Request, resources: Resources, stages: Stages) -> None:
        self._request, self._resources, self._stages = request, resources, stages
        self._root = request.root or Path()
        self._watch = Watch(self._root, _QUIET)
        self.store = existing_store(request.out)
        self.stored: dict[int, Path] = {}
        self._records = dict[int, CheckpointRecord]()
        for segment in self.store.segments if self.store else ():
            self._records |= self.store.checkpoints(segment) if self.store else {}
        self._done: dict[int, Stamps] = {}
        self._told: set[str] = set()

    def look(self) -> Iterator[Added | str]:
        """Store the steps that are whole and new, and compare those that were written again."""
        ready, self.stored, now = {}, {}, time.monotonic()
        for step, model in self._directories().items():
            stamps = weight_stamps(model)
            record = self._records.get(step)
            if stamps and (self._done.get(step) == stamps or (record and not record.changed_in(stamps))):
                self.stored |= {step: model} if record else {}
            elif stamps and self._watch.is_whole(step, model, stamps, now):
                ready[step] = model, stamps
            elif not stamps and record is None:
                yield from self._ask(step, model, now)
        yield from self._take(ready) if ready else ()

    def _ask(self, step: int, model: Path, now: float) -> Iterator[str]:
        """Say once why there is nothing to read where a trainer wrote something, long after it did."""
        if not self._told and self._watch.quiet_for(step, model, (), now) >= _PATIENCE:
            try:
                open_step(step, model, self._root, {})
            except (CheckpointError, MissingError, OSError) as error:
                self._told.add(str(error))
                yield f"step {step} is left out: {error}"

    def _directories(self) -> dict[int, Path]:
        try:
            return find_steps(self._root, self._request.selection, self._request.pattern)[0]
        except (MissingError, OSError):  # training has not begun, or a step has just gone
            return {}

    def _take(self, ready: dict[int, tuple[Path, Stamps]]) -> Iterator[Added | str]:
        """Store the steps that are new, and compare those that are stored already."""
        with ExitStack() as stack:
            opened: dict[int, Checkpoint] = {}
            for step, (model, stamps) in ready.items():
                try:
                    checkpoint = open_step(step, model, self._root, {})
                    stack.enter_context(checkpoint.kept_open())
                    opened[step] = checkpoint
                except (CheckpointError, MissingError, OSError) as error:
                    yield from self._left_out(step, model, stamps, error)
            try:
                for step in [step for step in opened if self.store and step in self.store.steps]:
                    self._compare(opened.pop(step))
                yield from self._add(opened)
            except (CheckpointError, MissingError, StorageError, FileNotFoundError):
                gone = [step for step, (model, stamps) in ready.items() if weight_stamps(model) != stamps]
                if not gone:
                    raise
                yield f"{describe_steps(tuple(gone))} changed or vanished while being read"
                return
        for step, (model, stamps) in ready.items():
            if self.store and step in self.store.steps:
                self._records[step] = self.store.record(step)
                self._done[step], self.stored[step] = stamps, model

    def _left_out(self, step: int, model: Path, stamps: Stamps, error: Exception) -> Iterator[str]:
        """Say once why a step that seemed whole is not stored. Raises what is no matter of time."""
        if weight_stamps(model) != stamps:
            text = f"step {step} changed or vanished before it could be read"
        elif isinstance(error, IncompleteError):
            text = f"step {step} is not complete: {error}"
        elif isinstance(error, PermissionError):
            text = f"step {step} is left out: {error.filename}: {error.strerror}"
        else:
            raise error
        if text not in self._told:
            self._told.add(text)
            yield text

    def _compare(self, checkpoint: Checkpoint) -> None:
        """A trainer that was restarted writes steps again: the same bits are fine."""
        if self.store is None:
            return
        command = f"relexio convert {quote(str(self._root))} -o {quote(self.store.shown)} --replace {checkpoint.step}:"
        advice = f"training was resumed and wrote it again; to have the new steps, run {command}, then follow again"
        require_same(self.store, as_stored(checkpoint, StoredBase(self.store, going_on=True)), advice)

    def _add(self, opened: dict[int, Checkpoint]) -> Iterator[Added | str]:
        while opened:
            try:
                yield self._convert(opened)
                return
            except BaseItselfError as error:  # before training moves anything, as while its rate warms up from 0
                yield f"step {error.step} is the base itself (bit for bit), and left out"
                step = error.step or 0
                self._done[step] = weight_stamps(Path(opened.pop(step).source))

    def _convert(self, opened: dict[int, Checkpoint]) -> Added:
        begun = self.store is not None and len(self.store.steps) > 1  # by then its base has been asked about
        base = None if begun else self._request.base
        request = Request(self._request.out, base, named=opened, dtype=self._request.dtype)
        conversion = prepare(request, self._resources, self._stages)
        result = convert(conversion, self._stages)
        self.store = result.store
        return Added(conversion, result)
