"""Running an evaluation: a shell command in a session of its own, its output in a log, stopped when its time is up."""

import fcntl
import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

#: Seconds that a process group has to end by itself before it is killed.
GRACE = 3.0
_LOOK = 0.05  # seconds between looks at whether the command has ended
_CHUNK = 1 << 16  # bytes that are read at once
_MOST = 1 << 20  # bytes of output, from the end, that a last line is looked for in
_TAIL = 2000  # characters


@dataclass(frozen=True)
class CommandResult:
    """How a command ended: its exit code (None: its time was up), seconds, the last line it printed, and its log's end."""

    code: int | None
    seconds: float
    line: str
    tail: str


def run(command: str, environment: dict[str, str], log: Path, timeout: float | None) -> CommandResult:
    """Run a command with the shell, in this directory, with nothing to read; stdout and stderr go to ``log`` as they come.

    However this ends, all that the command has started ends with it, unless that has a session of its own. Raises OSError
    where the log cannot be written.
    """
    log.unlink(missing_ok=True)  # what still writes to an earlier one does so unseen
    begun = time.monotonic()
    with open(log, "ab", buffering=0) as file:
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file,
            env={"PYTHONUNBUFFERED": "1", **os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        with process, _group_ended(process):
            assert process.stdout is not None
            printed = _follow(process, process.stdout, file, None if timeout is None else begun + timeout)
    seconds = time.monotonic() - begun
    lines = [line for line in _text(printed or b"").replace("\r", "\n").split("\n") if line.strip()]
    return CommandResult(
        None if printed is None else process.returncode, seconds, lines[-1] if lines else "", tail(log)
    )


def _follow(process: "subprocess.Popen[bytes]", out: IO[bytes], log: IO[bytes], deadline: float | None) -> bytes | None:
    """The end of what a command prints, which is written to the log as well; None where it is not done in time.

    It is done when it has ended, even where something it has left behind holds its output open, or goes on to print.
    """
    kept, left = bytearray(), -1  # bytes that were still to be read when it had ended
    while deadline is None or left >= 0 or time.monotonic() < deadline:
        if left < 0 and process.poll() is not None:
            left = _unread(out)
        if not left:
            return bytes(kept)
        if left > 0 or select.select([out], [], [], _LOOK)[0]:
            chunk = os.read(out.fileno(), min(left, _CHUNK) if left > 0 else _CHUNK)
            log.write(chunk)
            kept += chunk
            del kept[:-_MOST]
            if not chunk:  # closed; a shell may close it long before it ends
                return _wait(process, deadline, bytes(kept))
            left -= len(chunk) if left > 0 else 0
    return None


def _unread(out: IO[bytes]) -> int:
    """Bytes that wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(out, termios.FIONREAD, bytes(4)), sys.byteorder)


def _wait(process: "subprocess.Popen[bytes]", deadline: float | None, kept: bytes) -> bytes | None:
    try:
        process.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return None
    return kept


@contextmanager
def _group_ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Leave nothing of a process group behind: ask it to end, then kill it. A second Ctrl-C kills it at once."""
    try:
        yield
    finally:
        try:
            if _signal(process, signal.SIGTERM):
                _await_end(process, time.monotonic() + GRACE)
        finally:
            _signal(process, signal.SIGKILL)


def _await_end(process: "subprocess.Popen[bytes]", until: float) -> None:
    while time.monotonic() < until:
        process.poll()  # or it would stay in its group as a zombie
        if not _signal(process, 0):
            return
        time.sleep(_LOOK)


def _signal(process: "subprocess.Popen[bytes]", number: int) -> bool:
    """Send a signal to a process group; False if nothing is left of it."""
    with suppress(ProcessLookupError, PermissionError):  # the latter is macOS's word for zombies
        os.killpg(process.pid, number)
        return True
    return False


def tail(log: Path) -> str:
    """The end of a log."""
    with open(log, "rb") as file:
        file.seek(max(log.stat().st_size - 4 * _TAIL, 0))
        return _text(file.read())[-_TAIL:]


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
