"""Reading checkpoints from a disk that is far away: 20 ms a read, and a bandwidth of 200 MB/s (tools/bench/slow_disk.py).

usage: python tools/bench/far.py [--quick] [--delay MS] [--bandwidth MB] [--scratch DIR] [--json FILE]

The same commands are run without the delay and with it: what differs is what the delay costs. ``cat`` and a reader with 32 reads
of 1 MB in flight are beside them. Needs Linux and root. Data is made with tools/bench/simulate.py in a temporary directory and
removed: 2 GB, --quick 0.3 GB. docs/performance.md explains the figures.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import READ, RELEXIO, Command, Data, make
from slow_disk import slow_disk

#: Model; layers, hidden size, vocabulary; steps; repetitions.
FULL = ("40 M", (12, 512, 13760), 20, 3)
QUICK = ("6 M", (8, 256, 3072), 20, 1)
IN_FLIGHT, AT_ONCE = 32, 1 << 20
MANY, MEMORY = 8, "512MB"  # workers, and the memory that all commands are held to


def read_all(directories: list[Path]) -> None:
    """Read all files, many parts of them at the same time."""

    def read(part: tuple[int, int]) -> None:
        os.pread(part[0], AT_ONCE, part[1])

    files = [os.open(path, os.O_RDONLY) for top in directories for path in sorted(top.rglob("*")) if path.is_file()]
    parts = [(file, at) for file in files for at in range(0, os.fstat(file).st_size, AT_ONCE)]
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(read, parts))


def commands(data: Data, far: Path, late: bool) -> dict[str, tuple[Command, list[Path]]]:
    """What is run: the command, and the directories that it reads once."""
    base, steps = far / "base", [far / "steps" / f"global_step_{step + 1}" for step in range(data.steps)]
    convert: Command = [*RELEXIO, "convert", far / "steps", "--base", base, "--memory", MEMORY]
    one, many = (data.scratch / f"store-{late}-{workers}" for workers in (0, MANY))
    most, last = f"1:{data.steps - 1}", str(data.steps)
    return {
        "cat": (["sh", "-c", READ, "sh", base, steps[0]], [base, steps[0]]),
        f"{IN_FLIGHT} reads in flight": ([sys.executable, __file__, "--read", base, *steps], [base, *steps]),
        "convert": ([*convert, "-o", one, "--steps", most], [base, *steps[:-1]]),
        "an append": ([*convert, "-o", one, "--steps", last], [base, *steps[-2:]]),
        f"convert --workers {MANY}": (
            [*convert, "-o", many, "--steps", most, "--workers", str(MANY)],
            [base, *steps[:-1]],
        ),
        f"an append --workers {MANY}": (
            [*convert, "-o", many, "--steps", last, "--workers", str(MANY)],
            [base, *steps[-2:]],
        ),
    }


def measure(data: Data, delay: float, bandwidth: float, repetitions: int) -> list[dict[str, Any]]:
    """Seconds of each command without and with the delay, the bytes it reads, and its peak memory."""
    far, rows = data.scratch / "far", []
    far.mkdir()
    for number in range(repetitions):
        for late in (False, True) if number % 2 else (True, False):
            for name, (command, _) in commands(data, far, late).items():
                with slow_disk(data.scratch / "data", far, delay if late else 0.0, bandwidth):
                    data.run(f"{name}, {'late' if late else 'at once'}", command, cold=False)
            data.run("remove", ["sh", "-c", f"rm -r {data.scratch}/store-*"], cold=False)
    for name, (_, directories) in commands(data, far, True).items():
        size = 2 * data.parameters * len(directories)
        runs = [data.took[f"{name}, {when}"] for when in ("at once", "late")]
        at_once, delayed = (statistics.median(run["seconds"] for run in some) for some in runs)
        peak = max(run["peak_mb"] for some in runs for run in some)
        seconds = {"at_bandwidth": size / bandwidth, "at_once": at_once, "late": delayed}
        rows.append({"command": name, "MB": size / 1e6, **seconds, "peak_mb": peak})
    return rows


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--read"]:
        read_all([Path(path) for path in sys.argv[2:]])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--delay", type=float, default=20, metavar="MS")
    parser.add_argument("--bandwidth", type=float, default=200, metavar="MB")
    parser.add_argument("--scratch")
    parser.add_argument("--json")
    chosen = parser.parse_args()
    model, shape, steps, repetitions = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory(prefix="relexio-far-", dir=chosen.scratch) as scratch:
        data = make(model, shape, steps, Path(scratch))
        rows = measure(data, chosen.delay / 1000, chosen.bandwidth * 1e6, repetitions)
    print(f"{model} parameters, {steps} steps; {chosen.delay:g} ms a read, {chosen.bandwidth:g} MB/s\n")
    print(
        "| command | MB read | s at that bandwidth | s, answered at once | s, answered late | late / at once | peak MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        _, *figures, peak = row.values()
        print(
            f"| {row['command']} | {' | '.join(f'{f:.3g}' for f in (*figures, row['late'] / row['at_once'], peak))} |"
        )
    if chosen.json:
        settings = {"model": model, "steps": steps, "delay_ms": chosen.delay, "bandwidth_MB": chosen.bandwidth}
        Path(chosen.json).write_text(json.dumps({**settings, "rows": rows, "took": data.took}, indent=1) + "\n")


if __name__ == "__main__":
    main()
