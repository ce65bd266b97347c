"""What runs in a worker process: what it says of itself, and blocks, within the settings of a pass."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import get_worker
from threadpoolctl import threadpool_limits

from relexio import atomic
from relexio.engine import device as backend
from relexio.engine.device import limited, own_stream
from relexio.engine.executor import limit_threads
from relexio.engine.process import resident_bytes, use_one_heap
from relexio.errors import DeviceError, RelexioError

TOPIC = "relexio"  # of the events by which workers tell of finished blocks
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
    """Runs in a worker, which Dask hands over under that name: what it has."""
    problem, free = "", 0
    try:
        device = backend.resolve(device)
        free = backend.device_limit(None) if device == "cuda" else 0
    except DeviceError as error:
        problem = str(error)
    return Worker(resident_bytes(), dask_worker.state.nthreads, device, problem, free)


def seen(path: Path) -> tuple[int, str] | None:
    """Size of a file and a hash of how it begins; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return path.stat().st_size, hashlib.sha256(file.read(_PIECE)).hexdigest()
    except OSError:
        return None


def unlike(expected: dict[Path, tuple[int, str] | None]) -> Path | None:
    """Runs in a worker: the first of some files that it does not see as the client does."""
    return next((path for path, there in expected.items() if seen(path) != there), None)


def sync_all(directories: list[Path]) -> None:
    """Runs in a worker: what this machine has written below directories is on the disk when it returns."""
    for directory in directories:
        atomic.sync_tree(directory)


@dataclass(frozen=True)
class Settings:
    """What a worker process keeps to while it works on one pass."""

    token: str
    threads: int
    device: str
    device_memory: int


class _Turns:
    """One pass in one worker process: its settings, in force until it ends, and as many blocks at once as planned."""

    def __init__(self, settings: Settings) -> None:
        self.running, self.ended = 0, False
        self._lock, self._turn = threading.Lock(), threading.Semaphore(settings.threads)
        self._stack = ExitStack()
        use_one_heap()  # again: a worker that died may have been replaced
        limit_threads(settings.threads)
        self._stack.enter_context(threadpool_limits(1))
        self._stack.enter_context(limited(settings.device, settings.device_memory))

    @contextmanager
    def take(self) -> Iterator[bool]:
        """Wait for a turn; False if the pass has ended meanwhile."""
        with self._turn:
            with self._lock:
                go = not self.ended
                self.running += int(go)
            try:
                yield go
            finally:
                with self._lock:
                    self.running -= int(go)

    def end(self) -> int:
        """Start nothing any more; how many blocks are still being worked on, and once there is none, undo the settings."""
        with self._lock:
            self.ended = True
            if not self.running:
                self._stack.close()
            return self.running


_passes: dict[str, _Turns | None] = {}  # None for those that have ended: a task that comes late does nothing
_passes_lock = threading.Lock()


def work(settings: Settings, key: str, function: Callable[..., Any], *parts: Any) -> Any:
    """Runs in a worker: one block, within the settings; then tell of it."""
    with _passes_lock:
        if settings.token not in _passes:
            _passes[settings.token] = _Turns(settings)
        turns = _passes[settings.token]
    if turns is None:
        return None
    try:
        own_stream(settings.device)
        with turns.take() as go:
            result = function(*parts) if go else None
    except (RelexioError, OSError) as error:
        error.__cause__ = error.__context__ = None  # of Zarr's and the codecs' errors some cannot be pickled
        raise
    get_worker().log_event(TOPIC, key)
    return result


def end_pass(token: str) -> int:
    """Runs in a worker: end a pass there; how many blocks are still being worked on."""
    with _passes_lock:
        turns = _passes.setdefault(token, None)
        left = turns.end() if turns is not None else 0
        if not left:
            _passes[token] = None
        return left
