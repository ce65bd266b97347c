"""All that has to be seen on a GPU, in one command: the tests marked gpu, agreement with the CPU, memory, times, a profile.

usage: python tools/bench/gpu.py OUT [--wheels DIR] [--scratch DIR] [--rehearse]

Needs CuPy, a GPU, and 16 GB in the temporary directory or in --scratch; it takes at most eight minutes. Each stage of
gpu_stages.py is a process with a time of its own. OUT/gpu.json and the table in OUT/gpu.md are written anew after every figure,
so that they have what there was, however it ends; OUT/gpu.log has what was printed. --wheels: what wheels.py has downloaded for
a machine without a network; it is installed for this run only. --rehearse: every stage on little data, on the tests' stand-in
for CuPy, and without limits of time; its figures are about no GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
TOTAL = 455  # seconds for all stages
#: In order, what is most needed first, and seconds for each.
STAGES = {
    "environment": 40, "tests": 100, "data": 110, "sizes": 100, "workers": 90, "profile": 70, "commands": 80, "memory": 40,
    "taken": 50, "resident": 30,
}  # fmt: skip
#: Models by name as layers, hidden size and vocabulary; steps; repetitions; bytes that another program leaves.
FULL: dict[str, Any] = {
    "models": {"2 M": (4, 192, 2048), "40 M": (12, 512, 13760), "160 M": (12, 1024, 27648)},
    "steps": 40, "repetitions": 3, "left": (2_000_000_000, 300_000_000, 0),
}  # fmt: skip
SMALL: dict[str, Any] = {
    "models": {"3 k": (1, 16, 64), "58 k": (1, 64, 256), "243 k": (2, 96, 512)},
    "steps": 6, "repetitions": 1, "left": (1_000_000, 10_000, 0),
}  # fmt: skip
REHEARSAL = "A rehearsal on the tests' stand-in for CuPy: there was no GPU, and no figure is about one."
#: What stands in for CuPy in every process of a rehearsal.
STAND_IN = "import sys\nfrom tests.support.device import StandIn\nsys.modules[__name__] = StandIn()\n"
WORKS = "import cupy\nwith cupy.cuda.Stream(non_blocking=True): cupy.zeros(1).sum().get()"
COMPILED = "import sys, relexio.loops\nsys.exit(0 if relexio.loops.COMPILED else 'no compiled loops')"
COMPILE = "from setuptools import setup\nsetup()"


@dataclass
class Record:
    """What was found, in files that are whole after every figure."""

    out: Path
    rehearsal: bool
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self) -> None:
        """Write JSON and table."""
        facts = {"rehearsal": self.rehearsal, "stages": self.stages}
        for name, text in (("gpu.json", json.dumps(facts, indent=1) + "\n"), ("gpu.md", self.table())):
            self.out.joinpath(name + ".part").write_text(text)
            self.out.joinpath(name + ".part").replace(self.out / name)

    def table(self) -> str:
        """All figures as a table in Markdown."""
        lines = [f"**{REHEARSAL}**", ""] if self.rehearsal else []
        lines += ["| stage | what | figures |", "|---|---|---|"]
        for name, stage in self.stages.items():
            label = f"(rehearsal) {name}" if self.rehearsal else name
            lines.append(f"| {label} | | {cell(stage['ended'])} |")
            for row in stage["rows"]:
                figures = "; ".join(f"{key} {number(value)}" for key, value in row.items() if key != "what")
                lines.append(f"| {label} | {cell(row['what'])} | {cell(figures)} |")
        return "\n".join(lines) + "\n"


def number(value: object) -> str:
    """A figure with four digits, or as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(text: str) -> str:
    """Text that a table can hold."""
    return " ".join(text.replace("|", "\\|").split())


def python(code: str, variables: dict[str, str], *arguments: str) -> str:
    """Run some lines of Python in the root of the tree; the last that it said if it failed, else nothing."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["no word"])[-1] if done.returncode else ""


def prepare(scratch: Path, wheels: str | None, rehearse: bool) -> dict[str, str]:
    """Install wheels, put the stand-in in CuPy's place, compile the loops; the environment for all processes."""
    paths = [str(ROOT), str(scratch / "site"), os.environ.get("PYTHONPATH", "")]
    if wheels:
        files = sorted(Path(wheels).glob("*.whl"))
        options = ["-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", paths[1]]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], check=True, stdout=sys.stderr)
    if rehearse:
        (scratch / "stand-in").mkdir()
        (scratch / "stand-in" / "cupy.py").write_text(STAND_IN)
        paths.insert(0, str(scratch / "stand-in"))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if problem := python(WORKS, variables):
        sys.exit(f"tools/bench/gpu.py needs CuPy and a GPU that works: {problem}")
    if python(COMPILED, variables):
        built = python(COMPILE, variables, "build_ext", "--inplace")
        if problem := python(COMPILED, variables):
            sys.exit(f"tools/bench/gpu.py needs the compiled loops: {built or problem}")
    return variables


def run(
    name: str, seconds: float, arguments: list[str], variables: dict[str, str], log: IO[str], record: Record
) -> None:
    """Run one stage, and keep its figures as they come. What it still does when its time is over is ended."""
    stage: dict[str, Any] = {"ended": "was under way", "rows": []}
    record.stages[name], begun = stage, time.perf_counter()
    record.write()
    command = [sys.executable, str(BENCH / "gpu_stages.py"), name, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=log, text=True, process_group=0
    ) as process:
        assert process.stdout is not None
        late = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        try:
            for line in process.stdout:
                if line.startswith('{"what"'):
                    stage["rows"].append(json.loads(line))
                    record.write()
            code = process.wait()
        finally:
            ended_itself = late.is_alive()
            late.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    took = time.perf_counter() - begun
    how = "out of time" if not ended_itself else "right" if code == 0 else "wrong: see its last rows and the log"
    stage |= {"ended": f"{how}, {took:.1f} s", "seconds": took, "code": code}
    record.write()
    print(f"{name}: {stage['ended']}", file=sys.stderr, flush=True)


def main() -> None:
    """Run all stages and print the table; exit code 1 if one did not end, a test failed, or a prediction is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels")
    parser.add_argument("--scratch")
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    begun, sizes = time.perf_counter(), SMALL if chosen.rehearse else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a stage is ended too, and the data removed
    with tempfile.TemporaryDirectory(prefix="relexio-gpu-", dir=chosen.scratch) as scratch:
        variables = prepare(Path(scratch), chosen.wheels, chosen.rehearse)
        chosen.out.mkdir(parents=True, exist_ok=True)
        record = Record(chosen.out, chosen.rehearse)
        with open(chosen.out / "gpu.log", "w") as log:
            for name, seconds in STAGES.items():
                left = min(seconds, TOTAL - (time.perf_counter() - begun))
                run(
                    name,
                    86_400 if chosen.rehearse else max(left, 1.0),
                    [scratch, json.dumps(sizes)],
                    variables,
                    log,
                    record,
                )
    print(record.table(), end="")
    if any(stage["code"] for stage in record.stages.values()):
        sys.exit("not all stages ended right")


if __name__ == "__main__":
    main()
