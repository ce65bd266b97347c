"""The stages of gpu.py, each in a process of its own: python gpu_stages.py STAGE SCRATCH SIZES. A line of JSON for each row.

``data`` comes before those that need it. A stage ends with exit code 1 where a test failed, a prediction is not the CPU's, or
an error is not a clear one.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gpu_profile
import numpy as np
from gpu_runs import Bench, Figures, row
from simulate import shapes, simulate

from relexio.engine.process import cores
from relexio.engine.resources import Resources
from relexio.errors import BudgetError, RelexioWarning
from relexio.fit.fit import fit
from relexio.loops import COMPILED
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.output import Target
from relexio.verbs.predict import predict
from tests.support import device as others

ROOT = Path(__file__).resolve().parents[2]
COPIED = 1 << 28  # bytes of one copy whose speed is measured
SMALLER = 8_000_000_000


def environment(bench: Bench) -> None:
    """What is there: card, driver, versions, cores; how fast copies are."""
    import cupy

    runtime = cupy.cuda.runtime
    row("card", {
        "name": runtime.getDeviceProperties(0)["name"].decode(), "free, GB": runtime.memGetInfo()[0] / 1e9,
        "CuPy": cupy.__version__, "driver's CUDA": runtime.driverGetVersion(), "CUDA": runtime.runtimeGetVersion(),
    })  # fmt: skip
    if query := shutil.which("nvidia-smi"):
        asked = "driver_version,pcie.link.gen.max,pcie.link.width.max"
        done = subprocess.run([query, f"--query-gpu={asked}", "--format=csv,noheader"], capture_output=True, text=True)
        row("nvidia-smi", {asked: done.stdout.strip()})
    row("machine", {
        "cores": cores(), "memory, GB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "Python": platform.python_version(), "NumPy": np.__version__, "loops": "compiled" if COMPILED else "NumPy",
    })  # fmt: skip
    with cupy.cuda.Stream(non_blocking=True) as stream:
        row("copies, GB/s", _copies(cupy, stream))


def _copies(cupy: Any, stream: Any) -> Figures:
    """GB/s to and from the device, from pageable and pinned memory, and within it (read and written)."""
    there, pageable = cupy.zeros(COPIED, np.uint8), np.ones(COPIED, np.uint8)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(COPIED), np.uint8, COPIED)
    pinned[:] = 1
    copies: dict[str, Callable[[], Any]] = {
        "up, pageable": lambda: there.set(pageable), "up, pinned": lambda: there.set(pinned),
        "down, pinned": lambda: there.get(out=pinned), "within": lambda: there.copy(),
    }  # fmt: skip
    speeds = {}
    for name, copy in copies.items():
        taken = []
        for _ in range(6):
            stream.synchronize()
            begun = time.perf_counter()
            copy()
            stream.synchronize()
            taken.append(time.perf_counter() - begun)
        speeds[name] = COPIED * (1 + (name == "within")) / min(taken) / 1e9
    return speeds


def tests(bench: Bench) -> None:
    """The tests marked gpu; one that is skipped is wrong here."""
    report = bench.scratch / "tests.xml"
    options = ["-o", "addopts=", "--strict-markers", "--import-mode=importlib", "-p", "no:cacheprovider", "-v"]
    command = [sys.executable, "-m", "pytest", *options, "-m", "gpu", f"--junitxml={report}", "tests/test_gpu.py"]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # whatever else is installed
    code = subprocess.run(command, cwd=ROOT, env=alone, stdout=sys.stderr).returncode
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [(case, end) for case in cases for end in case if end.tag in ("failure", "error", "skipped")]
    row("tests", {"run": len(cases), "not passed": len(bad), "exit code": code})
    for case, end in bad:
        row(case.get("name", ""), {end.tag: end.get("message", "")[:300]})
    if code or bad or not cases:
        bench.wrong.append("not all tests marked gpu passed")


def data(bench: Bench) -> None:
    """Make every model's run, convert it, and predict on the CPU what all else is compared with; how fast the disk is."""
    for model, sizes in bench.models.items():
        made, begun = bench.scratch / model / "data", time.perf_counter()
        simulate(made, shapes(*sizes), list(range(1, bench.steps + 1)))
        between = time.perf_counter()
        request = Request(bench.run(model), made / "base", made / "steps", {}, None)
        store = convert(prepare(request, Resources(device="cpu"), silent), silent).store
        ended, window = time.perf_counter(), _bytes(made / "steps")
        shutil.rmtree(made)
        row(model, {
            "elements": sum(tensor.size for tensor in store.tensors), "steps": len(store.steps), "window, GB": window / 1e9,
            "store, MB": _bytes(bench.run(model)) / 1e6, "simulate, s": between - begun, "convert, s": ended - between,
        })  # fmt: skip
        truth = bench.scratch / model / "cpu"
        fitted = fit(store, store.steps, Recipe(), "gram", bench.resources("cpu"), silent)
        predict(fitted, [Target(2 * store.steps[-1], truth)], bench.resources("cpu"), silent)
    zeros, begun = bytes(_bytes(truth)), time.perf_counter()
    with open(bench.scratch / "zeros", "wb") as file:
        file.write(zeros)
        os.fsync(file.fileno())
    row(f"{model}, a prediction's bytes written and synced", {"s": time.perf_counter() - begun, "MB": len(zeros) / 1e6})


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def sizes(bench: Bench) -> None:
    """Every model on both devices with all cores, and reading alone; the largest also with smaller tiles, for less memory."""
    for model in bench.models:
        runs = {device: bench.resources(device, cores()) for device in ("cpu", "cuda")}
        if model == list(bench.models)[-1]:
            runs["cuda, --device-memory 8GB"] = bench.resources("cuda", cores(), device_memory=SMALLER)
        bench.compare(model, runs, bench.repetitions)
        bench.read(model, cores())


def profile(bench: Bench) -> None:
    """Where one worker's time goes on each device, and what the device did while all worked."""
    model = list(bench.models)[1]
    for device in ("cpu", "cuda"):
        for name, figures in gpu_profile.profile(device, partial(bench.once, model, bench.resources(device, 1))):
            row(f"{model}, {device}, one worker, {name}", figures)
    for name, figures in gpu_profile.trace(partial(bench.once, model, bench.resources("cuda"))):
        row(f"{model}, cuda, {name}", figures)


def commands(bench: Bench) -> None:
    """A first ``predict`` as a command, on each device: what --device auto should choose, and how much memory it takes."""
    for model in bench.models:
        for device in ("cuda", "cpu") * 2:
            bench.forget(model)
            words: list[str | Path] = ["predict", bench.run(model), "--method", "relex", "--step", str(2 * bench.steps)]
            words += ["-o", bench.scratch / model / "out", "--device", device]
            begun = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", "relexio", *words], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            taken, process.returncode = time.perf_counter() - begun, os.waitstatus_to_exitcode(status)
            if process.returncode:
                bench.wrong.append(f"{model}: predict --device {device} failed")
            figures = {"s": taken, "CPU s": usage.ru_utime + usage.ru_stime, "peak, MB": usage.ru_maxrss * 1024 / 1e6}
            row(f"{model}, predict --device {device}", figures)


def memory(bench: Bench) -> None:
    """--device-memory 256MB on the largest window."""
    small, *_, large = bench.models
    bench.once(small, bench.resources("cuda"))
    limited = bench.resources("cuda", device_memory=256_000_000)
    bench.compare(large, {"cuda, --device-memory 256MB": limited}, 1)


def taken(bench: Bench) -> None:
    """Another allocation has the device's memory, before or after a pass is planned: a right result, or a clear error."""
    import cupy

    model = list(bench.models)[1]
    for left in bench.left:
        for when, taking in (("before", others.taken), ("after", others.taken_late)):
            with warnings.catch_warnings(record=True) as said, taking(cupy, left):
                warnings.simplefilter("always", RelexioWarning)
                try:
                    figures = bench.once(model, bench.resources("cuda"))
                except BudgetError as error:
                    figures = {"error": str(error)}
                except Exception as error:  # noqa: BLE001  the next amount is tried all the same
                    figures = {"not a clear error": f"{type(error).__name__}: {error}"}
                    bench.wrong.append(f"{type(error).__name__} where {left} bytes are left {when} planning")
            row(f"{model}, {left / 1e6:g} MB left {when} planning", {**figures, "warnings": len(said)})


def workers(bench: Bench) -> None:
    """The largest model with eight, four and two workers on each device."""
    small, *_, large = bench.models
    bench.once(small, bench.resources("cuda"))
    for count in (8, 4, 2):
        runs = {f"{device}, {count} workers": bench.resources(device, count) for device in ("cpu", "cuda")}
        bench.compare(large, runs, 3 if count == 8 else 1)
        bench.read(large, count)


def resident(bench: Bench) -> None:
    """What CUDA adds to this fresh process, in memory and seconds: what plan.CUDA estimates."""
    model, before = next(iter(bench.models)), time.perf_counter()

    def now(what: str) -> None:
        nonlocal before
        seconds, lines = time.perf_counter() - before, Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        names = ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmHWM")
        row(what, {"s": seconds, **{f"{name}, MB": int(status[name].split()[0]) * 1024 / 1e6 for name in names}})
        before = time.perf_counter()

    now("imports")
    import cupy

    now("CuPy imported")
    bench.once(model, bench.resources("cpu", 1))
    now("a prediction on the CPU, one worker")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        there = cupy.zeros((64, 64))
        stream.synchronize()
        now("context, stream, an array")
        (there @ there).get()
    now("a product (cuBLAS)")
    for count in (1, 1, 8):
        bench.once(model, bench.resources("cuda", count))
        now(f"a prediction on the device, workers {count}")


STAGES: dict[str, Callable[[Bench], None]] = {stage.__name__: stage for stage in (
    environment, tests, data, sizes, workers, profile, commands, memory, taken, resident,
)}  # fmt: skip


def main() -> None:
    name, scratch, chosen = sys.argv[1:]
    bench = Bench(Path(scratch), **json.loads(chosen))
    STAGES[name](bench)
    if bench.wrong:
        row("wrong", {"because": "; ".join(bench.wrong)})
        sys.exit(1)


if __name__ == "__main__":
    main()
