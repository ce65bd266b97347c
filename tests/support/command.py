"""The command line in tests: in this process, and in a fresh one."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from relexio.store.opening import open_store

#: A line of progress. There are some where a pass takes longer than a second.
PROGRESS = re.compile(r"^[^\n]*: (\S+ \S+ of \S+ \S+, \S+ \S+/s, [\d:]+ left|100 %, done in [\d:]+)\n", re.MULTILINE)


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


def in_process(*arguments: object, timeout: float = 600) -> Outcome:
    """The command line, in a fresh process."""
    command = [sys.executable, "-m", "relexio", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return Outcome(done.returncode, done.stdout, without_progress(done.stderr))


#: The command line as a program that writes no block before a file is there: its first argument.
HELD = """import sys, time, relexio.verbs.convert.write as write
from pathlib import Path
real, go = write.encode_block, Path(sys.argv.pop(1))
def held(*arguments):
    while not go.exists():
        time.sleep(0.01)
    return real(*arguments)
write.encode_block = held
from relexio.cli.main import main
main()"""


def in_turn(*deeds: Callable[..., object]) -> Callable[..., None]:
    """Does all of these, one after the other, each with the same arguments."""

    def do(*arguments: object) -> None:
        for deed in deeds:
            deed(*arguments)

    return do


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def refused(done: Outcome, *words: str) -> None:
    """One clear line that has all of these words, and 1."""
    assert done.code == 1 and "Traceback" not in done.err, done.err
    (line,) = (line for line in done.err.splitlines() if not line.startswith("note:"))
    assert line.startswith("error:") and all(word in line for word in words), line


def whole(relexio: Relexio, store: Path, steps: tuple[int, ...]) -> None:
    assert open_store(store).steps == steps
    done = relexio("verify", store)
    assert done.code == 0 and "left by" not in done.err, done.err
    assert not [name for name in os.listdir(store.parent) if name.endswith("partial")]  # noqa: PTH208
