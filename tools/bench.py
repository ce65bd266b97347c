"""Time and memory of relexio beside plain reading and beside the dense two-pass method (tools/yardstick.py).

usage: python tools/bench.py [--quick] [--repeat N] [--scratch DIR] [--json FILE] [--plot FILE] [--from FILE]

Data is made with tools/simulate.py in a temporary directory and removed. --quick takes under two minutes on two cores,
the whole run about 25 and 20 GB of disk. Numbers are printed beside their bar and never judged. --from shows an earlier
run's JSON instead of measuring. docs/performance.md says what each figure means.
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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
RELEXIO = [sys.executable, "-m", "relexio"]
#: Layers, hidden size and vocabulary, by number of parameters.
MODELS = {"tiny": (1, 32, 64), "2 M": (4, 192, 2048), "6 M": (8, 256, 3072)}
MODELS |= {"10 M": (12, 256, 7168), "40 M": (12, 512, 13760), "150 M": (12, 1024, 17920)}
#: Model, steps to make, those taken by single passes for the scaling, and those taken by the repetitions (0: none).
QUICK = (("2 M", 20, (20,), 0), ("6 M", 20, (10,), 20))
FULL = (("10 M", 40, (40,), 0), ("40 M", 200, (10, 20, 80, 200), 40), ("150 M", 40, (), 40))
SCALED = ("convert", "first predict", "predict another step", "yardstick")
VARIED = ("step", "strength", "window")
#: Rows of the table: figure, bar, what is measured, summed over these commands, divided by the sum over those.
ROWS = """
convert / reading the same files            | at most 1.5            | seconds | convert                    | read
yardstick / (convert + first predict)       | at least 3             | seconds | yardstick                  | convert + first predict
yardstick / predict another step            | at least 10            | seconds | yardstick step             | predict another step
yardstick / predict another strength        | at least 10            | seconds | yardstick strength         | predict another strength
yardstick / predict another window          | at least 10            | seconds | yardstick window           | predict another window
predict another step / (read store + write) | -                      | seconds | predict another step       | read store and write
store / checkpoints in bytes, base apart    | at most 1/40 at T = 40 | share   | store                      |
elements unlike the yardstick's, share      | a few in 10,000        | share   | unlike                     |
predict on a tiny store, s                  | -                      | seconds | start up                   |
convert with --memory 512MB, peak MB        | at most 512            | peak_mb | convert in 512MB           |
first predict with --memory 512MB, peak MB  | at most 512            | peak_mb | first predict in 512MB     |
predict again with --memory 512MB, peak MB  | at most 512            | peak_mb | predict again in 512MB     |
inspect with --memory 512MB, peak MB        | at most 512            | peak_mb | inspect in 512MB           |
"""

Command = list[str | Path]


@dataclass
class Data:
    """The first ``steps`` steps of a simulated run in ``scratch/data``, and what commands on it ``took``."""

    model: str
    scratch: Path
    steps: int
    parameters: int = 0
    took: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def run(self, name: str, command: Command, cold: bool = True) -> float:
        """Run a command alone, with no data in memory if ``cold``: seconds. Ends the benchmark if it fails."""
        os.sync()
        if cold:
            drop_caches(self.scratch)
        with tempfile.TemporaryFile() as errors:
            begun, environment = time.perf_counter(), {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begun
            process.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            if process.returncode:
                sys.exit(f"{name} failed: {' '.join(map(str, command))}\n{errors.read().decode()}")
        print(f"  {self.model}, T = {self.steps}: {name}, {seconds:.2f} s", file=sys.stderr, flush=True)
        peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
        self.note(name, seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime, peak_mb=peak)
        return seconds

    def note(self, name: str, **values: float) -> None:
        """Keep what one repetition took, or came to."""
        self.took.setdefault(name, []).append(values)

    def read(self) -> Command:
        """The command that reads, one after the other, the files that ``convert`` reads."""
        steps = (self.scratch / "data" / "steps" / f"global_step_{i + 1}" for i in range(self.steps))
        return [
            "sh",
            "-c",
            'find "$@" -type f -exec cat {} + > /dev/null',
            "sh",
            self.scratch / "data" / "base",
            *steps,
        ]

    def convert(self, store: Path) -> Command:
        """The command that makes a store."""
        data = self.scratch / "data"
        return [*RELEXIO, "convert", data / "steps", "--steps", f"1:{self.steps}", "--base", data / "base", "-o", store]

    def varied(self, what: str) -> list[str]:
        """Step and options of a prediction in which one thing is other than in the first."""
        step, first = (3 if what == "step" else 2) * self.steps, self.steps // 4 + 1 if what == "window" else 1
        return [str(step), "--window", f"{first}:{self.steps}", "--strength", "0.5" if what == "strength" else "1"]

    def predict(self, what: str, store: Path, out: Path) -> Command:
        """The command that makes a prediction from the store."""
        return [*RELEXIO, "predict", store, "-o", out, "--step", *self.varied(what)]

    def yardstick(self, what: str, out: Path) -> Command:
        """The command that makes the same prediction the dense way."""
        (step, *options), data = self.varied(what), self.scratch / "data"
        return [sys.executable, TOOLS / "yardstick.py", data / "steps", data / "base", step, out, *options]


def drop_caches(below: Path) -> str:
    """Forget file contents held in memory: all as root on Linux, the programs apart, else those of a directory. Says how."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        subprocess.run([sys.executable, "-c", "import safetensors, relexio.convert, relexio.predict"], check=True)
        return "all page caches dropped, Python and its packages read back"
    except OSError:
        if not hasattr(os, "posix_fadvise"):
            return "page caches not dropped"
    for path in (path for path in below.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "posix_fadvise DONTNEED on the data"


def make(model: str, scratch: Path, steps: int) -> Data:
    """Simulate a training run."""
    data, sizes = Data(model, scratch, steps), map(str, (*MODELS[model], steps))
    options = chain(*zip(("--layers", "--hidden", "--vocabulary", "--steps"), sizes, strict=True))
    data.run("simulate", [sys.executable, TOOLS / "simulate.py", scratch / "data", *options], cold=False)
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


def compare(data: Data, number: int | None) -> None:
    """One repetition, the yardstick first in every second one; without a ``number`` only what the scaling takes."""
    work = data.scratch / "work"
    work.mkdir()
    for ours, theirs in pairs(data, work):
        for name, command in theirs + ours if (number or 0) % 2 else ours + theirs:
            if number is not None or name in SCALED:
                data.run(name, command, cold=name != "first predict")
    if number is not None:
        data.run("read", data.read())
        first, dense = (work / name / "model.safetensors" for name in ("first", "dense first"))
        data.run("read store and write", read_and_write(work / "store", work / "zeros", first.stat().st_size))
        data.note("unlike", share=differing(first, dense))
        groups = sum(path.stat().st_size for path in (work / "store" / "groups").rglob("*") if path.is_file())
        data.note("store", share=groups / (2 * data.parameters * data.steps))
    shutil.rmtree(work)


def read_and_write(store: Path, out: Path, size: int) -> Command:
    """The command that reads all files of a store, and writes and syncs as many bytes as a prediction has."""
    script = 'find "$1" -type f -exec cat {} + > /dev/null; head -c $3 /dev/zero | dd of="$2" bs=1M iflag=fullblock conv=fsync'
    return ["sh", "-c", script, "sh", store, out, str(size)]


def differing(one: Path, other: Path) -> float:
    """The share of elements in which two bf16 files with headers of the same length differ."""
    import numpy as np  # not before: Linux counts a child's memory from that of its parent on

    wrong = total = 0
    with open(one, "rb") as a, open(other, "rb") as b:
        for file in (a, b):
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while part := a.read(1 << 20):
            different = np.frombuffer(part, "<u2") != np.frombuffer(b.read(len(part)), "<u2")
            wrong, total = wrong + int(np.count_nonzero(different)), total + different.size
    return wrong / total


def budget(data: Data) -> None:
    """Every command under a small --memory."""
    work = data.scratch / "work"
    work.mkdir()
    store = work / "store"
    for name, command in (
        ("convert", data.convert(store)),
        ("first predict", data.predict("nothing", store, work / "first")),
        ("predict again", data.predict("step", store, work / "again")),
        ("inspect", [*RELEXIO, "inspect", store]),
    ):
        data.run(f"{name} in 512MB", [*command, "--memory", "512MB"], cold=False)
    shutil.rmtree(work)


def start_up(scratch: Path, repeat: int) -> Data:
    """Predictions with nothing to compute."""
    data, work = make("tiny", scratch, 3), scratch / "work"
    data.run("convert", data.convert(work / "store"))
    data.run("first predict", data.predict("nothing", work / "store", work / "first"))
    for number in range(repeat + 2):
        data.run("start up", data.predict("step", work / "store", work / str(number)), cold=False)
    shutil.rmtree(work)
    shutil.rmtree(scratch / "data")
    return data


def machine(data: Data) -> dict[str, Any]:
    """What the figures depend on: cores, memory, versions, and the speed of the disk."""
    zeros, size = data.scratch / "zeros", min(2 * data.parameters * data.steps, 1 << 30)
    reading = data.run("disk read", data.read())
    writing = data.run("disk write", read_and_write(data.scratch / "data" / "base" / "config.json", zeros, size))
    zeros.unlink()
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory, GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "disk reads, GB/s": round(2 * data.parameters * (data.steps + 1) / reading / 1e9, 2),
        "disk writes, GB/s": round(size / writing / 1e9, 2),
        "cold": drop_caches(data.scratch),
        "versions": ", ".join(["python " + platform.python_version(), *(f"{n} {version(n)}" for n in ("numpy", "zarr", "dask"))]),
    }  # fmt: skip


def measure(quick: bool, repeat: int, scratch: Path) -> dict[str, Any]:
    """Run everything: what --json writes."""
    found = [start_up(scratch, repeat)]
    for model, steps, singles, repeated in QUICK if quick else FULL:
        found.append(make(model, scratch, steps))
        if len(found) == 2 or model == "150 M":
            described = machine(found[-1])
        parts = [replace(found[-1], steps=count, took={}) for count in (*singles, repeated) if count]
        for part in parts[: len(singles)]:
            compare(part, None)
        for number in range(repeat if repeated else 0):
            compare(parts[-1], number)
        if repeated:
            budget(parts[-1])
        found += parts
        shutil.rmtree(scratch / "data")
    runs = [{"model": d.model, "parameters": d.parameters, "steps": d.steps, "took": d.took} for d in found]
    return {"quick": quick, "machine": described, "table": list(chain(*map(table, runs))), "runs": runs}


def table(point: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows that runs on one model and number of steps give."""
    took, data = point["took"], f"{point['model']}, T = {point['steps']}"
    for line in ROWS.strip().splitlines():
        figure, bar, what, above, below = (cell.strip() for cell in line.split("|"))
        top, bottom = (side.split(" + ") if side else [] for side in (above, below))
        if took.keys() >= {*top, *bottom}:
            sums = (
                [sum(run[what] for run in runs) for runs in zip(*map(took.get, side), strict=True)]
                for side in (top, bottom)
            )
            values = [a / b for a, b in zip_longest(*sums, fillvalue=1.0)]
            yield {"figure": figure, "data": data, "bar": bar, "values": values}


def scaled(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Models and steps on which everything in SCALED ran, by size, with the medians of it by command and measure."""
    points = sorted(result["runs"], key=lambda point: (point["parameters"], point["steps"]))
    for point in points:
        point["median"] = {
            name: {what: statistics.median(run[what] for run in runs) for what in runs[0]}
            for name, runs in point["took"].items()
        }
    return [point for point in points if point["took"].keys() >= set(SCALED)]


def show(result: dict[str, Any]) -> None:
    """Print machine, table and scaling as Markdown."""
    print("\n".join(f"- {name}: {value}" for name, value in result["machine"].items()))
    print("\n| figure | data | min | median | max | bar |\n|---|---|---|---|---|---|")
    for row in result["table"]:
        values = " | ".join(f"{f(row['values']):.3g}" for f in (min, statistics.median, max))
        print(f"| {row['figure']} | {row['data']} | {values} | {row['bar']} |")
    print(f"\n| model | T | {' | '.join(SCALED)} |\n|---|---|{'---|' * len(SCALED)}")
    for point in scaled(result):
        size = point["parameters"] * point["steps"]
        medians = ((run["seconds"], run["peak_mb"]) for run in map(point["median"].get, SCALED))
        cells = [f"{s:.2f} s, {s * 1e9 / size:.2f} ns, {peak:.0f} MB" for s, peak in medians]
        print(f"| {point['model']} | {point['steps']} | {' | '.join(cells)} |")


def plot(result: dict[str, Any], out: str) -> None:
    """Draw seconds and peak memory against T for one model, and against model size at one T: those with most points."""
    import matplotlib.pyplot as plt

    points = scaled(result)
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
                panel.plot(x, [p["median"][name][what] for p in chosen], mark + "-", color=colour, label=name)
            panel.set_xscale("log")
        panels[1, column].set(xlabel=label, xticks=x, xticklabels=[point[ticks] for point in chosen])
        panels[1, column].minorticks_off()
    panels[0, 0].set(ylabel="seconds", yscale="log")
    panels[1, 0].set(ylabel="peak memory, MB", ylim=(0, None))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, dpi=130)


def main() -> None:
    """Measure, or take an earlier run; then print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeat", type=int)
    for name in ("--scratch", "--json", "--plot", "--from"):
        parser.add_argument(name)
    chosen = vars(parser.parse_args())
    if chosen["from"]:
        result = json.loads(Path(chosen["from"]).read_text())
    else:
        with tempfile.TemporaryDirectory(prefix="relexio-bench-", dir=chosen["scratch"]) as scratch:
            result = measure(chosen["quick"], chosen["repeat"] or (2 if chosen["quick"] else 3), Path(scratch))
    if chosen["json"]:
        Path(chosen["json"]).write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    if chosen["plot"]:
        plot(result, chosen["plot"])


if __name__ == "__main__":
    main()
