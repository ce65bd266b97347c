"""Recording a run while it trains, from memory: no checkpoint has to be written."""

import atexit
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import index
from pathlib import Path
from threading import Semaphore
from typing import Any
from weakref import ref

from relexio.checkpoints.arrays import Arrays, Tensors
from relexio.checkpoints.layout import open_checkpoint
from relexio.checkpoints.match import match, written_from
from relexio.checkpoints.protocol import Checkpoint
from relexio.dtypes import Table
from relexio.engine.plan import DEFAULT_MEMORY
from relexio.engine.process import resident_bytes
from relexio.engine.resources import Resources
from relexio.errors import BaseItselfError, RelexioError, RequestError
from relexio.progress import silent
from relexio.store.storage import local
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.convert.before import require_same
from relexio.verbs.convert.request import existing_store
from relexio.words import describe_steps, parse_size, parse_steps

#: Steps that are held in memory: one that is being encoded, and one that waits.
_HELD = 2
_MOST = 10**15  # steps
_ADVICE = "if training was resumed, make the Recorder with resumed=STEP, the step that it goes on from"
_log = logging.getLogger("relexio")


class Recorder:
    """Stores a run step by step in a trajectory, which is made or added to, from tensors in memory.

    ``base`` is the model before RL: a directory, or tensors by name; a trajectory that exists needs none. A tensor is copied
    when it is added, and rounded to the base's type, to nearest even. A thread encodes what was added, in ``memory`` bytes
    beside at most three copies of the model. ``resumed`` is the step from which training goes on: the steps behind it that are
    stored give way to the first that is added, in one commit. Without it, a step that is stored may be added again
    with the same bits only.

    What was added is durable when ``flush`` or ``close`` returns. Raises a RelexioError that names store, step or tensor;
    the next call raises what failed in the thread. As a context manager it is closed at the end.
    """

    def __init__(
        self,
        out: str | Path,
        base: str | Path | Tensors | None = None,
        *,
        resumed: int | None = None,
        memory: int | str = DEFAULT_MEMORY,
        workers: int | None = None,
    ) -> None:
        self._out, self._resumed, self._workers = out, resumed, workers
        self._memory = parse_size(memory) if isinstance(memory, str) else memory
        store = existing_store(out)
        self._steps = set(store.steps) if store else set[int]()
        self._base: Checkpoint | None = None
        if base is not None:  # that of a trajectory that exists is compared
            like = store.table if store else None
            self._base = open_checkpoint(local(base)) if isinstance(base, str | Path) else Arrays(None, base, like=like)
        if store is not None:
            self._table, self._label = store.table, f"the base of {store.shown}"
        elif self._base is not None:
            self._table, self._label = self._base.tensors, self._base.label
        else:
            raise RequestError(f"{out} does not exist yet: a new trajectory needs a base, the model before RL")
        self._closed = False
        self._last: Checkpoint | None = None
        self._room, self._pool = Semaphore(_HELD), ThreadPoolExecutor(1, "relexio")
        self._adding: list[Future[None]] = []
        # before Python ends its threads; what atexit knows comes after
        getattr(threading, "_register_atexit", atexit.register)(partial(_close, ref(self), os.getpid()))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are stored, ascending."""
        return tuple(sorted(self._steps))

    @property
    def tensors(self) -> Table:
        """Type and shape, by name, of the tensors that each step has."""
        return self._table

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if a model with tensors of these names and shapes could not be added."""
        model = Arrays(None, {})
        model.label = "the model"
        types = {name: self._table.get(written_from(name, self._table), ("F32",))[0] for name in shapes}
        model.tensors = {name: (types[name], shape) for name, shape in shapes.items()}
        match(model, self._table, self._label)

    def add(self, step: int, tensors: Tensors) -> None:
        """Copy the model at a step, NumPy arrays or torch tensors by name (or pairs), to be stored; waits while one waits.

        Raises CheckpointError where it is not a model like the base.
        """
        if self._closed:
            raise RequestError(f"{self._out}: the recorder is closed; make another")
        step = _as_step(step)
        self._raise_failure(wait=False)
        self._room.acquire()
        try:
            checkpoint = match(Arrays(step, tensors, like=self._table), self._table, self._label)
            self._adding.append(self._pool.submit(self._store, step, checkpoint))
        except BaseException:
            self._room.release()
            raise

    def flush(self) -> None:
        """Wait until all that was added is durable."""
        self._raise_failure(wait=True)

    def close(self) -> None:
        """Flush, and take no more steps."""
        self._closed = True
        self._pool.shutdown()
        self._raise_failure(wait=True)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # what went wrong first is what matters
            _close(ref(self), os.getpid())

    def _raise_failure(self, wait: bool) -> None:
        ended = [future for future in self._adding if wait or future.done()]
        failures = [error for error in (future.exception() for future in ended) if error is not None]
        self._adding = [future for future in self._adding if future not in ended]
        if failures:
            raise failures[0]

    def _store(self, step: int, checkpoint: Checkpoint) -> None:
        try:
            store = existing_store(self._out)  # somebody else may have added to it
            steps = store.steps if store else ()
            behind = self._resumed is not None and step > self._resumed and max(steps, default=0) > self._resumed
            if store and step in steps and not behind:
                require_same(store, checkpoint, _ADVICE)
                return
            replaced = parse_steps(f"{self._resumed + 1}:") if self._resumed is not None and behind else None
            request = Request(self._out, self._base, named={step: checkpoint}, replace=replaced)
            resources = Resources(self._memory + resident_bytes(), self._workers, "cpu")
            conversion = prepare(request, resources, silent)
            conversion = replace(conversion, stored=(conversion.stored[0], self._last))  # their hashes are compared
            done = convert(conversion, silent)
            if conversion.forgotten:
                _log.warning("%s: step %d replaces %s", self._out, step, describe_steps(conversion.forgotten))
            for text in done.notes:
                _log.warning("%s: %s", self._out, text)
            self._steps, self._base, self._last = set(done.store.steps), None, checkpoint
            if step > (self._resumed or 0):
                self._resumed = None
        except BaseItselfError:  # nothing has moved yet, as while the rate warms up from 0
            _log.warning("%s: step %d is the base itself (bit for bit), and left out", self._out, step)
        finally:
            self._room.release()


def _as_step(step: Any) -> int:
    """A step as a number. Raises RequestError for what is none."""
    try:
        number = index(step)
    except TypeError:
        number = -1
    if not 0 <= number < _MOST:
        raise RequestError(f"step {step!r}: a step is a whole number from 0 on")
    return number


def _close(recorder: "ref[Recorder]", process: int) -> None:
    """Finish what was added, where a script ends, or fails, without closing its recorder. Not in a process forked from it."""
    left = recorder()
    if left is not None and os.getpid() == process:
        try:
            left.close()
        except RelexioError as error:
            _log.error("%s: %s", left._out, error)
