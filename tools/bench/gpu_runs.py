"""What the stages of gpu.py share: the data, one fit and prediction timed and compared, rows of the table."""

import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bench import differing

from relexio.engine import graph
from relexio.engine.plan import DEFAULT_MEMORY
from relexio.engine.process import resident_bytes
from relexio.engine.resources import Resources
from relexio.fit.fit import fit
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.store.schema import Block
from relexio.store.store import Store
from relexio.verbs.output import Target
from relexio.verbs.predict import predict

ALLOWED = 2e-6  # share of elements that may differ: sums in another order, on a tie
Figures = dict[str, Any]


def row(what: str, figures: Figures) -> None:
    """Say one row of the table."""
    print(json.dumps({"what": what, **figures}), flush=True)


@dataclass
class Bench:
    """The data, and what was found wrong; ``held``: bytes that this process had before CUDA, as a command has them."""

    scratch: Path
    models: dict[str, tuple[int, int, int]]
    steps: int
    repetitions: int
    left: list[int]
    held: int = field(default_factory=resident_bytes)
    wrong: list[str] = field(default_factory=list)

    def run(self, model: str) -> Path:
        return self.scratch / model / "run.zarr"

    def forget(self, model: str) -> None:
        """Remove a kept fit, and predictions but the CPU's with which others are compared."""
        shutil.rmtree(self.run(model) / "cache", ignore_errors=True)
        shutil.rmtree(self.scratch / model / "out", ignore_errors=True)

    def resources(self, device: str, workers: int | None = None, **more: Any) -> Resources:
        return Resources(DEFAULT_MEMORY, workers, device, held=self.held, **more)

    def once(self, model: str, resources: Resources, out: str = "out") -> Figures:
        """Fit (the Gram pass) and predict, with nothing kept from before."""
        self.forget(model)
        store, directory = open_store(self.run(model)), self.scratch / model / out
        plan = resources.for_gram(store, len(store.steps)).plan
        with watched(resources.device) as peak:
            begun = time.perf_counter()
            fitted = fit(store, store.steps, Recipe(), "gram", resources, silent)
            between = time.perf_counter()
            predict(fitted, [Target(2 * store.steps[-1], directory)], resources, silent)
            ended = time.perf_counter()
        truth = self.scratch / model / "cpu" / "model.safetensors"
        share = differing(directory / truth.name, truth)
        if share > ALLOWED:
            self.wrong.append(f"{model}: a share of {share:.2g} is not as on the CPU, {resources}")
        return {
            "fit, s": between - begun, "predict, s": ended - between, "share unlike the CPU's": share,
            "workers": plan.workers, "tile, MB": plan.tile_bytes / 1e6, "pool, MB": peak[0] / 1e6,
        }  # fmt: skip

    def compare(self, model: str, runs: dict[str, Resources], repetitions: int) -> None:
        """Rows of medians over repetitions that take turns; where there are several, after one that does not count."""
        took: dict[str, list[Figures]] = {name: [] for name in runs}
        for number in range(repetitions + (repetitions > 1)):
            for name, resources in runs.items():
                figures = self.once(model, resources)
                if number or repetitions == 1:
                    took[name].append(figures)
        for name, some in took.items():
            row(f"{model}, {name}", {key: statistics.median(one[key] for one in some) for key in some[0]})

    def read(self, model: str, workers: int | None = None) -> None:
        """A row: the base and all moves read and decompressed and nothing else, which no device can save."""
        store, resources = open_store(self.run(model)), self.resources("cpu", workers)
        executor = resources.for_gram(store, len(store.steps))
        kernel, begun = partial(_only_read, store), time.perf_counter()
        moves = sum(count for _, count in graph.each(store, len(store.steps), kernel, executor, lambda count: None))
        taken = time.perf_counter() - begun
        row(f"{model}, reading and decompressing alone", {"s": taken, "moves": moves, "workers": executor.plan.workers})


def _only_read(store: Store, block: Block) -> int:
    store.base_bits(block)
    streams = [store.stream(segment, block) for segment in store.segments]
    return sum(len(by) for stream in streams for _, by in zip_longest(stream.when, stream.by, fillvalue=()))


@contextmanager
def watched(device: str) -> Iterator[list[int]]:
    """The largest size of CuPy's pool so far, looked at every few milliseconds."""
    peak, done = [0], threading.Event()
    if device == "cpu":
        yield peak
        return
    import cupy

    pool = cupy.get_default_memory_pool()

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
