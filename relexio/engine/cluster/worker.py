"""What runs in a worker process: what it reports about itself, and blocks, within the limits of a pass."""

import hashlib
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import get_worker

from relexio import atomic
from relexio.engine import device as backend
from relexio.engine.device import own_stream
from relexio.engine.executor import Executor
from relexio.engine.process import resident_bytes, use_one_heap
from relexio.errors import DeviceError, RelexioError

TOPIC = "relexio"  # of the events by which workers report finished blocks
_PIECE = 4096  # bytes of a file by which two machines see whether they mean the same one


@dataclass(frozen=True)
class Worker:
    """What one worker process says of itself: bytes resident, threads, device (or why there is none), bytes to use of it."""

    held: int
    threads: int
    device: str
    problem: str
    free: int


def look(device: str, dask_worker: Any) -> Worker:
    """Runs in a worker, which Dask passes as an argument of this name: what the worker has."""
    problem, free = "", 0
    try:
        device = backend.resolve(device)
        free = backend.device_limit(None) if device == "cuda" else 0
    except DeviceError as error:
        problem = str(error)
    return Worker(resident_bytes(), dask_worker.state.nthreads, device, problem, free)


def fingerprint(path: Path) -> tuple[int, str] | None:
    """Size of a file and a hash of how it begins; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return path.stat().st_size, hashlib.sha256(file.read(_PIECE)).hexdigest()
    except OSError:
        return None


def unlike(expected: dict[Path, tuple[int, str] | None]) -> Path | None:
    """Runs in a worker: the first of these files that it does not see as the client does."""
    return next((path for path, known in expected.items() if fingerprint(path) != known), None)


def sync_all(directories: list[Path]) -> None:
    """Runs in a worker: what this machine has written below directories is on the disk when it returns."""
    for directory in directories:
        atomic.sync_tree(directory)


class _Pass:
    """One pass in one worker process: its limits, in force until it ends, and as many blocks at once as planned."""

    def __init__(self, limits: Executor) -> None:
        self.running = 0
        self.turn = threading.Semaphore(limits.plan.workers)
        self.stack = ExitStack()
        use_one_heap()  # again: a worker that died may have been replaced
        self.stack.enter_context(limits.limits())


_passes: dict[str, _Pass] = {}
_ended: set[str] = set()  # a task that comes late does nothing
_lock = threading.Lock()


def work(limits: Executor, token: str, key: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs in a worker: one block of a pass, within its limits, and when it is its turn; then report it."""
    with _lock:
        if token in _ended:
            return None
        if token not in _passes:
            _passes[token] = _Pass(limits)
        this = _passes[token]
    own_stream(limits.device)
    with this.turn:
        with _lock:
            if token in _ended:
                return None
            this.running += 1
        try:
            result = function(*arguments)
        except (RelexioError, OSError) as error:
            error.__cause__ = error.__context__ = None  # of Zarr's and the codecs' errors some cannot be pickled
            raise
        finally:
            with _lock:
                this.running -= 1
    get_worker().log_event(TOPIC, key)
    return result


def end_pass(token: str) -> int:
    """Runs in a worker: start no more blocks of a pass; the number of those still in progress."""
    with _lock:
        _ended.add(token)
        running = _passes[token].running if token in _passes else 0
        if not running and token in _passes:
            _passes.pop(token).stack.close()
        return running
