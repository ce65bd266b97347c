"""Where the CPU time of a command goes: seconds of all its threads by section, and what no section covers.

usage: python tools/bench/sections.py COMMAND ARGUMENT...

Runs ``relexio COMMAND ARGUMENT...`` in this process, with the functions of SECTIONS timed. What one of them does inside another
counts once, where it is done. Prints a table; the command's own output goes to stderr. Linux.
"""

import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from relexio import atomic
from relexio.checkpoints.write import Output
from relexio.cli.main import main as command_line
from relexio.loops import Reader, Walk
from relexio.store import chunks, read
from relexio.store.storage.local import LocalStorage
from relexio.verbs.convert import before, encode, merge


class Hash:
    """An XXH3 whose updates are timed."""

    def __init__(self) -> None:
        self._hash = xxh3_128()
        self.digest = self._hash.digest

    def update(self, data: Any) -> None:
        """Take more bytes."""
        self._hash.update(data)


#: Where a function is, its name, and what it is called in the table.
SECTIONS: tuple[tuple[Any, str, str], ...] = (
    (os, "preadv", "read checkpoints"), (os, "posix_fadvise", "ask for what is read next"), (Hash, "update", "hash states"),
    (encode, "find", "compare states, make moves of what differs"), (chunks, "encode", "compress chunks"),
    (chunks, "decode", "decompress chunks"), (chunks, "short_hash", "hash chunks"), (LocalStorage, "get", "read the store"),
    (LocalStorage, "put", "write the store"), (atomic, "sync_tree", "sync"), (Output, "write", "write the result"),
    (Reader, "take", "order moves by element"), (read, "advance", "put a state together"), (merge, "pack", "merge moves"),
    (Walk, "gram", "Gram matrices"), (Walk, "predict", "weigh and round"), (before, "doubt_of_base", "look at the base"),
)  # fmt: skip


class Clock:
    """CPU seconds and calls by section, each thread's own time counted once."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._threads, self._lock = threading.local(), threading.Lock()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted under a name."""

        @wraps(function)
        def run(*arguments: Any, **more: Any) -> Any:
            inner = self._threads.__dict__.setdefault("inner", [])
            inner.append(0.0)
            start = time.thread_time()
            try:
                return function(*arguments, **more)
            finally:
                took = time.thread_time() - start
                own = took - inner.pop()
                if inner:
                    inner[-1] += took
                with self._lock:
                    self.seconds[name] += own
                    self.calls[name] += 1

        return run


def age() -> float:
    """Seconds since this process began, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Time the sections of a command, and print them."""
    clock = Clock()
    vars(encode)["xxh3_128"] = Hash
    for where, name, title in SECTIONS:
        setattr(where, name, clock.timed(title, getattr(where, name)))
    start_up = time.process_time()
    with redirect_stdout(sys.stderr):
        try:
            command_line(sys.argv[1:])
        except SystemExit as end:
            if end.code:
                raise
    wall, cpu = age(), time.process_time()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    rows = [*clock.seconds.most_common(), ("Python's start and imports", start_up)]
    rows.append(("all else", cpu - sum(seconds for _, seconds in rows)))
    print("| section | CPU s | share | calls |\n|---|---|---|---|")
    for name, seconds in sorted(rows, key=lambda row: -row[1]):
        print(f"| {name} | {seconds:.2f} | {seconds / cpu:.0%} | {clock.calls[name] or ''} |")
    print(f"\nall: {cpu:.2f} CPU s ({usage.ru_stime:.2f} of them in the kernel), {wall:.2f} s")


if __name__ == "__main__":
    main()
