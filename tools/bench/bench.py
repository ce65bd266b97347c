"""Time and memory of relexio beside plain reading and beside the dense two-pass method (tools/bench/yardstick.py).

usage: python tools/bench/bench.py [--quick] [--scratch DIR] [--json FILE] [--plot FILE] [--from FILE]

Data is made with tools/bench/simulate.py in a temporary directory and removed: 20 GB, --quick 0.5 GB. --from shows an earlier
run's JSON instead of measuring. Figures are printed beside their bar, never judged (docs/performance.md explains them).
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
CACHES = Path("/proc/sys/vm/drop_caches")
RELEXIO = [sys.executable, "-m", "relexio"]
#: Model; layers, hidden size, vocabulary; steps to make; for several T: how many repetitions, and whether all is compared.
Model = tuple[str, tuple[int, int, int], int, tuple[tuple[int, int, bool], ...]]
TINY: Model = ("tiny", (1, 32, 64), 3, ((3, 3, False),))
#: 290 tensors: what is judged is a matter of their number, not of their size.
MANY: Model = ("5 M", (24, 128, 8192), 40, ((40, 3, False),))
SMALL: Model = ("2 M", (4, 192, 2048), 20, ((20, 1, False),))
QUICK: tuple[Model, ...] = (TINY, SMALL, ("6 M", (8, 256, 3072), 20, ((10, 1, False), (20, 2, True))))
FULL: tuple[Model, ...] = (
    *(TINY, MANY, ("10 M", (12, 256, 7168), 40, ((40, 1, False),))),
    ("40 M", (12, 512, 13760), 200, ((10, 1, False), (20, 1, False), (40, 3, True), (80, 1, False), (200, 1, False))),
    ("150 M", (12, 1024, 17920), 40, ((40, 3, True),)),
)
SCALED = ("convert", "first predict", "predict another step", "yardstick")
VARIED = ("step", "strength", "window")
#: Rows of the table: figure, bar, what is measured, summed over these commands, divided by the sum over those.
ROWS = """
convert / reading the same files            | at most 1.15           | seconds | convert                | read
yardstick / (convert + first predict)       | at least 1             | seconds | yardstick              | convert + first predict
yardstick / predict another step            | at least 8             | seconds | yardstick step         | predict another step
yardstick / predict another strength        | at least 8             | seconds | yardstick strength     | predict another strength
yardstick / predict another window          | at least 8             | seconds | yardstick window       | predict another window
predict another step / (read store + write) | -                      | seconds | predict another step   | read store and write
store / checkpoints in bytes, base apart    | at most 1/40 at T = 40 | share   | store                  |
elements unlike the yardstick's, share      | a few in 10,000        | share   | unlike                 |
convert --memory 512MB, peak MB             | at most 512            | peak_mb | convert in 512MB       |
first predict --memory 512MB, peak MB       | at most 512            | peak_mb | first predict in 512MB |
predict again --memory 512MB, peak MB       | at most 512            | peak_mb | predict another step in 512MB |
inspect --memory 512MB, peak MB             | at most 512            | peak_mb | inspect in 512MB       |
predict on a tiny store, s                  | at most 0.6            | seconds | predict another step   |
backtest of 290 tensors, s                  | at most 2              | seconds | backtest               |
report of 290 tensors, s                    | at most 6              | seconds | report                 |
"""
READ = 'find "$@" -type f -exec cat {} + > /dev/null'
WRITE = 'head -c $0 /dev/zero | dd of="$1" bs=1M iflag=fullblock conv=fsync; shift; '
Command = list[str | Path]


@dataclass
class Data:
    """The first ``steps`` steps of a simulated run in ``scratch/data``, and what commands on it ``took``."""

    model: str
    scratch: Path
    steps: int
    parameters: int = 0
    took: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))

    def run(self, name: str, command: Command, cold: bool = True) -> None:
        """Run a command alone, with no data in memory if ``cold``, and keep what it took. Ends the benchmark if it fails."""
        os.sync()
        if cold:
            drop_caches(self.scratch)
        environment, begun = {**os.environ, "PYTHONPATH": str(BENCH.parents[1])}, time.perf_counter()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begun
            process.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            if process.returncode:
                sys.exit(f"{name} failed: {' '.join(map(str, command))}\n{errors.read().decode()}")
        print(f"  {self.model}, T = {self.steps}: {name}, {seconds:.2f} s", file=sys.stderr, flush=True)
        peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
        cpu = usage.ru_utime + usage.ru_stime
        self.took[name].append({"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak})

    def read(self) -> Command:
        """The command that reads, one after the other, the files that ``convert`` reads."""
        steps = (self.scratch / "data" / "steps" / f"global_step_{i + 1}" for i in range(self.steps))
        return ["sh", "-c", READ, "sh", self.scratch / "data" / "base", *steps]

    def convert(self, store: Path) -> Command:
        """The command that makes a store."""
        steps = (self.scratch / "data" / "steps", "--steps", f"1:{self.steps}")
        return [*RELEXIO, "convert", *steps, "--base", self.scratch / "data" / "base", "-o", store]

    def varied(self, what: str) -> list[str]:
        """Step and options of a prediction in which one thing is other than in the first."""
        step, first = (3 if what == "step" else 2) * self.steps, self.steps // 4 + 1 if what == "window" else 1
        return [str(step), "--window", f"{first}:{self.steps}", "--strength", "0.5" if what == "strength" else "1"]

    def predict(self, what: str, store: Path, out: Path) -> Command:
        """The command that makes a prediction from the store."""
        return [*RELEXIO, "predict", store, "-o", out, "--method", "relex", "--step", *self.varied(what)]

    def yardstick(self, what: str, out: Path) -> Command:
        """The command that makes the same prediction the dense way."""
        (step, *options), data = self.varied(what), self.scratch / "data"
        return [sys.executable, BENCH / "yardstick.py", data / "steps", data / "base", step, out, *options]


def drop_caches(below: Path) -> str:
    """Forget file contents held in memory: all as root on Linux, the programs apart, else those of a directory. Says how."""
    if os.access(CACHES, os.W_OK):
        CACHES.write_text("3")
        subprocess.run(
            [sys.executable, "-c", "import safetensors, relexio.verbs.convert, relexio.verbs.predict"], check=True
        )
        return "all page caches dropped, Python and its packages read back"
    if not hasattr(os, "posix_fadvise"):
        return "page caches not dropped"
    for path in (path for path in below.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "posix_fadvise DONTNEED on the data"


def make(model: str, shape: tuple[int, ...], steps: int, scratch: Path) -> Data:
    """Simulate a training run."""
    data, sizes = Data(model, scratch, steps), map(str, (*shape, steps))
    options = chain(*zip(("--layers", "--hidden", "--vocabulary", "--steps"), sizes, strict=True))
    data.run("simulate", [sys.executable, BENCH / "simulate.py", scratch / "data", *options], cold=False)
    with open(scratch / "data" / "base" / "model.safetensors", "rb") as file:  # header's length, header, elements
        data.parameters = (os.fstat(file.fileno()).st_size - 8 - int.from_bytes(file.read(8), "little")) // 2
    return data


def pairs(data: Data, work: Path) -> Iterator[tuple[list[tuple[str, Command]], list[tuple[str, Command]]]]:
    """What is compared: named commands of ours, in order, and those that do the same the dense way."""
    store = work / "store"
    ours = [("convert", data.convert(store)), ("first predict", data.predict("nothing", store, work / "first"))]
    yield ours, [("yardstick", data.yardstick("nothing", work / "dense first"))]
    for what in VARIED:
        ours = [(f"predict another {what}", data.predict(what, store, work / what))]
        yield ours, [(f"yardstick {what}", data.yardstick(what, work / f"dense {what}"))]


def compare(data: Data, number: int, whole: bool) -> None:
    """One repetition, the yardstick first in every second one; ``whole`` if not only what the scaling takes."""
    work = data.scratch / "work"
    for ours, theirs in pairs(data, work):
        for name, command in theirs + ours if number % 2 else ours + theirs:
            if whole or name in SCALED:
                data.run(name, command, cold=name != "first predict")
    if data.model == MANY[0]:
        data.run("backtest", [*RELEXIO, "backtest", work / "store"], cold=False)
        data.run("report", [*RELEXIO, "report", work / "store", "-o", work / "report.html"], cold=False)
    if whole:
        first, dense = (work / name / "model.safetensors" for name in ("first", "dense first"))
        data.run("read", data.read())
        data.run(
            "read store and write",
            ["sh", "-c", WRITE + READ, str(first.stat().st_size), work / "zeros", work / "store"],
        )
        data.took["unlike"].append({"share": differing(first, dense)})
        segments = sum(path.stat().st_size for path in (work / "store" / "segments").rglob("*") if path.is_file())
        data.took["store"].append({"share": segments / (2 * data.parameters * data.steps)})
    shutil.rmtree(work)


def differing(one: Path, other: Path) -> float:
    """The share of elements in which two bf16 files with headers of the same length differ."""
    import numpy as np  # not before: Linux counts a child's memory from that of its parent on

    with open(one, "rb") as file:
        first, last = 8 + int.from_bytes(file.read(8), "little"), one.stat().st_size
    parts = (
        (np.fromfile(path, "<u2", 1 << 20, offset=at) for path in (one, other)) for at in range(first, last, 2 << 20)
    )
    return sum(int(np.count_nonzero(a != b)) for a, b in parts) / ((last - first) // 2)


def budget(data: Data) -> None:
    """Every command under a small --memory."""
    work = data.scratch / "work"
    (first, _), (again, _), *_ = pairs(data, work)
    inspect: Command = [*RELEXIO, "inspect", work / "store"]
    for name, command in [*first, *again, ("inspect", inspect)]:
        data.run(f"{name} in 512MB", [*command, "--memory", "512MB"], cold=False)
    shutil.rmtree(work)


def machine(data: Data) -> dict[str, Any]:
    """What the figures depend on: cores, memory, versions, and the speed of the disk on this data and on zeros."""
    data.run("write", ["sh", "-c", WRITE, str(1 << 30), data.scratch / "zeros"])
    reading, writing = (min(run["seconds"] for run in data.took[name]) for name in ("read", "write"))
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory, GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "disk reads, GB/s": round(2 * data.parameters * (data.steps + 1) / reading / 1e9, 2),
        "disk writes, GB/s": round((1 << 30) / writing / 1e9, 2),
        "cold": drop_caches(data.scratch),
        "versions": f"python {platform.python_version()}, numpy {version('numpy')}, zarr {version('zarr')}",
    }


def measure(quick: bool, scratch: Path) -> dict[str, Any]:
    """Run everything: what --json writes."""
    found = []
    for model, shape, steps, parts in QUICK if quick else FULL:
        data = make(model, shape, steps, scratch)
        for count, repetitions, whole in parts:
            found.append(replace(data, steps=count, took=defaultdict(list)))
            for number in range(repetitions):
                compare(found[-1], number, whole)
            if whole:
                budget(found[-1])
        shutil.rmtree(scratch / "data")
    found.sort(key=lambda data: (data.parameters, data.steps))
    runs = [{"model": d.model, "parameters": d.parameters, "steps": d.steps, "took": d.took} for d in found]
    return {"quick": quick, "machine": machine(found[-1]), "table": list(chain(*map(table, runs))), "runs": runs}


def table(point: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows that runs on one model and number of steps give."""
    took, tiny = point["took"], point["model"] == "tiny"
    for line in ROWS.strip().splitlines():
        figure, bar, what, above, below = (cell.strip() for cell in line.split("|"))
        names = [side.split(" + ") if side else [] for side in (above, below)]
        if took.keys() >= set(chain(*names)) and ("tiny" in figure) == tiny:
            sums = ([sum(r[what] for r in rs) for rs in zip(*map(took.get, side), strict=True)] for side in names)
            values = [a / b for a, b in zip_longest(*sums, fillvalue=1.0)]
            yield {"figure": figure, "data": f"{point['model']}, T = {point['steps']}", "bar": bar, "values": values}


def median(point: dict[str, Any], command: str, what: str) -> float:
    """Of the repetitions of a command."""
    return statistics.median(run[what] for run in point["took"][command])


def show(result: dict[str, Any]) -> None:
    """Print machine, table and scaling as Markdown."""
    print("\n".join(f"- {name}: {value}" for name, value in result["machine"].items()))
    print("\n| figure | data | min | median | max | bar |\n|---|---|---|---|---|---|")
    for row in result["table"]:
        values = " | ".join(f"{f(row['values']):.3g}" for f in (min, statistics.median, max))
        print(f"| {row['figure']} | {row['data']} | {values} | {row['bar']} |")
    print(f"\n| model | T | {' | '.join(SCALED)} |\n|---|---|{'---|' * len(SCALED)}")
    for point in result["runs"]:
        cells, size = [], point["parameters"] * point["steps"]
        for seconds, peak in ((median(point, name, "seconds"), median(point, name, "peak_mb")) for name in SCALED):
            cells.append(f"{seconds:.2f} s, {seconds * 1e9 / size:.2f} ns, {peak:.0f} MB")
        print(f"| {point['model']} | {point['steps']} | {' | '.join(cells)} |")


def plot(result: dict[str, Any], out: str) -> None:
    """Draw seconds and peak memory against T for one model, and against model size at one T: those with most points."""
    import matplotlib.pyplot as plt

    points = [point for point in result["runs"] if point["model"] != "tiny"]
    model, steps = (statistics.mode(point[what] for point in points) for what in ("model", "steps"))
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex="col", sharey="row")
    for column, chosen, across, ticks, label in (
        (0, [p for p in points if p["model"] == model], "steps", "steps", f"steps observed (T), {model} parameters"),
        (1, [p for p in points if p["steps"] == steps], "parameters", "model", f"parameters, T = {steps}"),
    ):
        x = [point[across] for point in chosen]
        for panel, what in zip(panels[:, column], ("seconds", "peak_mb"), strict=True):
            for name, colour, mark in zip(SCALED, ("#2a6fbb", "#5aa469", "#d9822b", "#8a8f98"), "os^D", strict=True):
                panel.plot(x, [median(p, name, what) for p in chosen], mark + "-", color=colour, label=name)
            panel.set_xscale("log")
        panels[1, column].set(xlabel=label, xticks=x, xticklabels=[point[ticks] for point in chosen])
        panels[1, column].minorticks_off()
    panels[0, 0].set(ylabel="seconds", yscale="log")
    panels[0, 0].yaxis.set_major_formatter("{x:g}")
    panels[1, 0].set(ylabel="peak memory, MB", ylim=(0, None))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, dpi=130)


def main() -> None:
    """Measure, or take an earlier run; then print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    for name in ("--scratch", "--json", "--plot", "--from"):
        parser.add_argument(name)
    chosen = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="relexio-bench-", dir=chosen["scratch"]) as scratch:
        result = (
            json.loads(Path(chosen["from"]).read_text()) if chosen["from"] else measure(chosen["quick"], Path(scratch))
        )
    show(result)
    if chosen["json"]:
        Path(chosen["json"]).write_text(json.dumps(result, indent=1) + "\n")
    if chosen["plot"]:
        plot(result, chosen["plot"])


if __name__ == "__main__":
    main()
