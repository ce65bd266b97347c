"""Where the time of a pass goes: one worker's on the host, section by section; the device's own, by PyTorch's profiler.

The sections are what relexio/engine/blocks.py does, and what it calls. Before and after each the stream is waited for, so that
what the device does counts where it was asked for. That takes longer than without; the trace has how long the device really works.
"""

import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from relexio.engine import blocks, graph
from relexio.engine.tiles import window_tables
from relexio.loops import Walk, cuda
from relexio.store.store import Store
from relexio.verbs.output import Sink

#: What is done in a section: where its function is, under which name, and what it is called here.
SECTIONS: tuple[tuple[Any, str, str], ...] = (
    (Store, "chunk", "read and decompress"), (Store, "base_bits", "base"), (blocks, "to_device", "copy up"),
    (cuda, "increments", "increments"), (cuda, "predict", "weigh and round"), (blocks, "to_host", "copy down"),
    (Walk, "gram", "moves, Gram matrices"), (Walk, "predict", "moves, weigh and round"), (Sink, "__call__", "write"),
)  # fmt: skip
#: What follows a section before the next begins, where it is more than bookkeeping.
AFTER = {"increments": "product"}
_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
_SHOWN = 12
Figures = dict[str, Any]


class Clock:
    """Seconds by pass and section, of one worker; what a section within another takes counts there alone."""

    def __init__(self, device: str) -> None:
        self.device, self.work, self.worker, self.at, self.open = device, "", 0, 0.0, ["else"]
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def _turn(self) -> None:
        """Count the time since the last turn where it belongs."""
        if self.device == "cuda":
            import cupy

            cupy.cuda.get_current_stream().synchronize()
        now = time.perf_counter()
        if self.at:
            self.seconds[self.work][self.open[-1]] += now - self.at
        self.at = now

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what is done inside."""
        self._turn()
        self.open.append(name)
        yield
        self._turn()
        self.open.pop()
        if len(self.open) == 1:
            self.open[0] = AFTER.get(name, "else")

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function whose calls are a section."""

        def run(*arguments: Any) -> Any:
            if threading.get_ident() != self.worker:
                return function(*arguments)
            with self.section(name):
                return function(*arguments)

        return run

    def tiles(self, tiles: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """``window_tables``, each of whose tiles is a section."""

        def run(*arguments: Any) -> Iterator[Any]:
            found = tiles(*arguments)
            while True:
                with self.section("tables of moves"):
                    tile = next(found, None)
                if tile is None:
                    return
                yield tile

        return run

    def kernel(self, function: Callable[..., Any], work: str) -> Callable[..., Any]:
        """A kernel of the pass ``work``, whose sections count there."""

        def run(*arguments: Any) -> Any:
            if self.work != work:
                self.work, self.worker, self.at = work, threading.get_ident(), 0.0
            return function(*arguments)

        return run


def profile(device: str, work: Callable[[], Figures]) -> Iterator[tuple[str, Figures]]:
    """Of ``work``, which fits and predicts with one worker: seconds by section of both passes, and those without a watch."""
    work()
    alone, clock = work(), Clock(device)
    wrapped = [(owner, name, clock.timed(getattr(owner, name), label)) for owner, name, label in SECTIONS]
    wrapped += [(graph, name, clock.kernel(getattr(graph, name), label)) for name, label in (
        ("gram_block", "fit"), ("combine_block", "predict"),
    )]  # fmt: skip
    with ExitStack() as stack:
        wrapped.append((blocks, "window_tables", clock.tiles(window_tables)))
        for owner, name, function in wrapped:
            stack.enter_context(mock.patch.object(owner, name, function))
        watched = work()
    for name, seconds in clock.seconds.items():
        figures: Figures = {"unwatched, s": alone[f"{name}, s"], "watched, s": watched[f"{name}, s"]}
        figures |= {f"{section}, s": taken for section, taken in sorted(seconds.items(), key=lambda item: -item[1])}
        yield name, figures


def trace(work: Callable[[], Figures]) -> Iterator[tuple[str, Figures]]:
    """What the device did during ``work``, as far as PyTorch is there to tell."""
    try:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as watch
    except ImportError as error:
        yield "the device's own times", {"not known": str(error)}
        return
    work()
    with watch(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watcher:
        begun = time.perf_counter()
        figures = work()
        taken = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "trace.json")
        watcher.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    yield "both passes traced", {"s": taken, "fit, s": figures["fit, s"], "predict, s": figures["predict, s"]}
    yield from device_times(events)


def device_times(events: list[dict[str, Any]]) -> Iterator[tuple[str, Figures]]:
    """From the events of a trace (microseconds): how long the device was busy, with what, and its longest kernels."""
    found = [event for event in events if event.get("cat") in _KINDS]
    busy, until = 0.0, 0.0
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in sorted(found, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        busy, until = busy + max(0.0, end - max(event["ts"], until)), max(end, until)
        kind = "kernels" if event["cat"] == "kernel" else event["name"]
        for table, name in ((sums, kind), (kernels, event["name"])):
            if table is sums or event["cat"] == "kernel":
                table[name][0] += 1
                table[name][1] += event["dur"] / 1e6
    yield "the device's own times", {
        "busy, s": busy / 1e6, **{f"{kind}, s": taken for kind, (_, taken) in sums.items()},
        "kernel calls": sum(count for count, _ in kernels.values()),
    }  # fmt: skip
    for name, (count, taken) in sorted(kernels.items(), key=lambda item: -item[1][1])[:_SHOWN]:
        yield f"kernel {name[:70]}", {"s": taken, "calls": count}
