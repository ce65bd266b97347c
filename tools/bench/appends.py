"""Steps added one at a time, as training gives them, against one convert of all: bytes, files, seconds, and the same bits.

usage: python tools/bench/appends.py [--quick] [--scratch DIR] [--json FILE]

Data is made with tools/bench/simulate.py in a temporary directory and removed: 7 GB, --quick 0.4 GB. Figures are printed beside
their bar, never judged (docs/performance.md explains them).
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import READ, RELEXIO, Command, Data, make

#: Layers, hidden size, vocabulary; steps; how many appends make "few" and "many" of them.
FULL = ("40 M", (12, 512, 13760), 75, 8)
QUICK = ("6 M", (8, 256, 3072), 20, 4)


def append(data: Data, step: int, store: Path) -> Command:
    """The command that adds one step."""
    steps = (data.scratch / "data" / "steps", "--steps", str(step))
    return [*RELEXIO, "convert", *steps, "--base", data.scratch / "data" / "base", "-o", store]


def read(data: Data, step: int) -> Command:
    """The command that reads the base and one step."""
    top = data.scratch / "data"
    return ["sh", "-c", READ, "sh", top / "base", top / "steps" / f"global_step_{step}"]


def files(store: Path) -> list[int]:
    """Bytes of each file of a store, the base and what is kept apart."""
    parts = (store / "segments", store / "files")
    return [path.stat().st_size for part in parts for path in part.rglob("*") if path.is_file()]


def measure(data: Data, some: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    work = data.scratch / "work"
    one, many, steps = work / "one", work / "many", data.steps
    data.run("convert", data.convert(one), cold=False)
    for step in range(1, steps + 1):
        data.run(f"append {step}", append(data, step, many), cold=False)
        if step in (some, steps):
            data.run(f"read {step}", read(data, step), cold=False)
    for name, store in (("one", one), ("many", many)):
        for what in ("first", "further"):
            varied = {"first": "nothing", "further": "step"}[what]
            data.run(f"{what} {name}", data.predict(varied, store, work / f"{what}-{name}"), cold=False)
    bits = [(work / f"first-{name}" / "model.safetensors").read_bytes() for name in ("one", "many")]
    seconds = {name: runs[0]["seconds"] for name, runs in data.took.items()}
    early = statistics.mean(seconds[f"append {step}"] for step in range(some - some // 2, some + some // 2 + 1))
    last = statistics.mean(seconds[f"append {step}"] for step in range(1, steps + 1))
    rows = [
        ("store, appends / one convert, bytes", "at most 1.15", sum(files(many)) / sum(files(one))),
        ("files, appends / one convert", "-", len(files(many)) / len(files(one))),
        ("first predict, appends / one convert", "at most 1.3", seconds["first many"] / seconds["first one"]),
        ("further predict, appends / one convert", "at most 1.3", seconds["further many"] / seconds["further one"]),
        ("the same bits predicted", "1", float(bits[0] == bits[1])),
        (f"an append, mean of 1 to {steps} / mean about {some}", "at most 1.5", last / early),
        (f"append {steps} / reading base and step", "-", seconds[f"append {steps}"] / seconds[f"read {steps}"]),
        ("all appends / one convert, seconds", "-", last * steps / seconds["convert"]),
    ]
    shutil.rmtree(work)
    return [{"figure": figure, "bar": bar, "value": value} for figure, bar, value in rows]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch")
    parser.add_argument("--json")
    chosen = parser.parse_args()
    model, shape, steps, some = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory(prefix="relexio-bench-", dir=chosen.scratch) as scratch:
        data = make(model, shape, steps, Path(scratch))
        rows = measure(data, some)
    print(f"{model} parameters, {steps} steps\n\n| figure | value | bar |\n|---|---|---|", file=sys.stdout)
    for row in rows:
        print(f"| {row['figure']} | {row['value']:.3g} | {row['bar']} |")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"model": model, "steps": steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
