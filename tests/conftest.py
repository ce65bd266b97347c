"""What every test shares: an in-process command line, and a subprocess one; a directory that other users can reach.

None depends on how fast the machine is.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from relexio.cli.main import main

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

#: A line of progress. There are some where a pass takes longer than a second.
PROGRESS = re.compile(r"^[^\n]*: \S+ \S+ of \S+ \S+, \S+ \S+/s, [\d:]+ left\n", re.MULTILINE)


def without_progress(text: str) -> str:
    """What a command said on stderr, without its lines of progress."""
    return PROGRESS.sub("", text)


@dataclass(frozen=True)
class Outcome:
    """How a command ended; ``err`` is without lines of progress."""

    code: int
    out: str
    err: str


Relexio = Callable[..., Outcome]


@pytest.fixture
def relexio(capsys: pytest.CaptureFixture[str]) -> Relexio:
    """The command line, in this process."""

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(int(end.value.code or 0), out, without_progress(err))

    return run


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A directory that other users can reach, as those of pytest are not."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    folder = Path(tempfile.mkdtemp(prefix="relexio-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def in_process(*arguments: object, timeout: float = 600) -> Outcome:
    """The command line, in a fresh process."""
    command = [sys.executable, "-m", "relexio", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return Outcome(done.returncode, done.stdout, without_progress(done.stderr))


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
