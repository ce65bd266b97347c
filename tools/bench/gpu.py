"""Time fit and predict on a GPU beside the CPU, and how near they come to PCIe and to the GPU's own memory.

usage: python tools/bench/gpu.py [--layers 12] [--hidden 1024] [--vocabulary 17920] [--steps 40] [--repetitions 3]
                           [--scratch DIR] [--json FILE]

Runs the tests marked gpu, makes data with tools/bench/simulate.py in a temporary directory (13 GB of checkpoints), converts
it, times each device in turn, and prints one table. Needs CuPy and a GPU; docs/performance.md explains the figures.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from bench import differing

from relexio.engine.process import cores, resident_bytes
from relexio.engine.resources import Resources
from relexio.fit.fit import fit
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.output import Target
from relexio.verbs.predict import predict

BENCH = Path(__file__).resolve().parent
#: What is compared: name, device, device memory.
DEVICES = (("cpu", "cpu", None), ("cuda", "cuda", None), ("cuda, 256 MB", "cuda", 256_000_000))
COPIED = 1 << 28  # bytes of one copy whose speed is measured
ALLOWED = 2e-6  # share of elements that may differ: sums in another order, on a tie


def problem() -> str | None:
    """Why nothing can be measured here, if so."""
    try:
        import cupy

        cupy.zeros(1).sum().get()
    except Exception as error:  # noqa: BLE001  whatever it is, it is said
        return f"tools/bench/gpu.py needs CuPy and a GPU that works: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def fastest(copy: Callable[[], Any], bytes_moved: int) -> float:
    """GB/s of the fastest of ten copies."""
    import cupy

    stream, taken = cupy.cuda.get_current_stream(), []
    for _ in range(10):
        stream.synchronize()
        begun = time.perf_counter()
        copy()
        stream.synchronize()
        taken.append(time.perf_counter() - begun)
    return bytes_moved / min(taken) / 1e9


def speeds() -> dict[str, float]:
    """GB/s of copies from the host, from pageable and from pinned memory, and within the device (read and written)."""
    import cupy

    there, other = (cupy.zeros(COPIED, np.uint8) for _ in range(2))
    pageable = np.ones(COPIED, np.uint8)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(COPIED), np.uint8, COPIED)
    pinned[:] = 1
    stream = cupy.cuda.get_current_stream()
    return {
        "pageable": fastest(lambda: there.data.copy_from_host(pageable.ctypes.data, COPIED), COPIED),
        "pinned": fastest(lambda: there.data.copy_from_host_async(pinned.ctypes.data, COPIED, stream), COPIED),
        "device": fastest(lambda: other.data.copy_from_device_async(there.data, COPIED, stream), 2 * COPIED),
    }


@contextmanager
def watched() -> Iterator[list[int]]:
    """The largest size of CuPy's pool so far, looked at every few milliseconds."""
    import cupy

    pool, peak, done = cupy.get_default_memory_pool(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], pool.total_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def once(run: Path, out: Path, device: str, device_memory: int | None) -> dict[str, float]:
    """Fit (the Gram pass) and predict, with nothing kept from before: seconds of each, and peak bytes of the pool."""
    shutil.rmtree(run / "cache", ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    store, resources = open_store(run), Resources(device=device, device_memory=device_memory)
    with watched() as peak:
        begun = time.perf_counter()
        fitted = fit(store, store.steps, Recipe(), "gram", resources, silent)
        between = time.perf_counter()
        predict(fitted, [Target(2 * store.steps[-1], out)], resources, silent)
        ended = time.perf_counter()
    return {"fit": between - begun, "predict": ended - between, "pool": float(peak[0])}


def measure(chosen: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Make the data, convert it, and time every device: what --json writes."""
    import cupy

    sizes = chain(*((f"--{name}", str(chosen[name])) for name in ("layers", "hidden", "vocabulary", "steps")))
    subprocess.run([sys.executable, BENCH / "simulate.py", scratch / "data", *sizes], check=True, stdout=sys.stderr)
    request = Request(scratch / "run.zarr", scratch / "data" / "base", scratch / "data" / "steps", {}, None)
    store = convert(prepare(request, Resources(device="cpu"), silent), silent).store
    elements = sum(tensor.size for tensor in store.tensors)
    shutil.rmtree(scratch / "data")
    before = resident_bytes()
    result: dict[str, Any] = {
        "gpu": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "cupy": cupy.__version__,
        "cores": cores(),
        "elements": elements,
        "steps": len(store.steps),
        "window, bytes": sum(tensor.size * tensor.kind.itemsize for tensor in store.tensors) * len(store.steps),
        "copies, GB/s": speeds(),
        "runs": {},
    }
    cupy.get_default_memory_pool().free_all_blocks()
    for number in range(chosen["repetitions"] + 1):
        for name, device, device_memory in DEVICES:
            took = once(scratch / "run.zarr", scratch / name, device, device_memory)
            print(f"  {name}: fit {took['fit']:.2f} s, predict {took['predict']:.2f} s", file=sys.stderr, flush=True)
            if number:  # the first loads the kernels, and the store into the page cache
                result["runs"].setdefault(name, []).append(took)
    result["resident, bytes more"] = resident_bytes() - before  # plan.CUDA is an estimate of it, tiles apart
    truth = scratch / "cpu" / "model.safetensors"
    result["unlike"] = {n: round(differing(scratch / n / truth.name, truth) * elements) for n, *_ in DEVICES}
    return result


def show(result: dict[str, Any]) -> None:
    """Print the machine in a line, and the table as Markdown."""
    copies, window = result["copies, GB/s"], result["window, bytes"]
    print(
        f"{result['gpu']}, CuPy {result['cupy']}, {result['cores']} cores; {result['elements']:,} elements, "
        f"T = {result['steps']}; copies: " + ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in copies.items())
    )
    print(
        "\n| device | work | s | window, GB/s | of the CPU's | of PCIe | of device memory | pool, MB | unlike the CPU's |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, runs in result["runs"].items():
        for work in ("fit", "predict"):
            seconds, cpu = (statistics.median(run[work] for run in some) for some in (runs, result["runs"]["cpu"]))
            speed, pool = window / seconds / 1e9, max(run["pool"] for run in runs) / 1e6
            shares = f"{speed / copies['pinned']:.1%} | {speed / copies['device']:.2%}" if name != "cpu" else "- | -"
            unlike = f"{result['unlike'][name]:,}" if work == "predict" else ""
            print(
                f"| {name} | {work} | {seconds:.2f} | {speed:.2f} | {cpu / seconds:.2f} | {shares} | {pool:.0f} | {unlike} |"
            )


def main() -> None:
    """Test, measure, show, write; exit code 1 where there is no GPU, or a test or prediction is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("layers", 12), ("hidden", 1024), ("vocabulary", 17920), ("steps", 40), ("repetitions", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    for name in ("--scratch", "--json"):
        parser.add_argument(name)
    chosen = vars(parser.parse_args())
    if said := problem():
        sys.exit(said)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], cwd=BENCH.parents[1], stdout=sys.stderr)
    if tests.returncode:
        sys.exit("the tests marked gpu failed")
    with tempfile.TemporaryDirectory(prefix="relexio-gpu-", dir=chosen["scratch"]) as scratch:
        result = measure(chosen, Path(scratch))
    show(result)
    if chosen["json"]:
        Path(chosen["json"]).write_text(json.dumps(result, indent=1) + "\n")
    if max(result["unlike"].values()) > ALLOWED * result["elements"]:
        sys.exit("the predictions do not agree with the CPU's")


if __name__ == "__main__":
    main()
