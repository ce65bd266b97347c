"""Where the time of a pass goes: one worker's on the host, section by section; the device's own, by PyTorch's profiler.

The sections are the steps of relexio/engine/blocks.py. Before and after each the stream is waited for, so that what the device
does counts where it was asked for. That takes longer than without; the trace has how long the device really works.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from relexio.engine import blocks, graph
from relexio.engine.tiles import window_tiles
from relexio.loops import plain
from relexio.store.store import Store
from relexio.verbs.output import Sink

#: What is done in a section: where its function is, under which name, and what it is called here.
SECTIONS: tuple[tuple[Any, str, str], ...] = (
    (Store, "base_bits", "read base"), (blocks, "compact", "pick those that move"), (blocks, "on_device", "copy up"),
    (plain, "increments", "increments"), (plain, "dense", "F"), (blocks, "from_float64", "round"),
    (blocks, "nonfinite", "check"), (blocks, "to_host", "copy down"), (Sink, "__call__", "write"),
    (blocks, "gram", "compiled loop"), (blocks, "predict", "compiled loop"),
)  # fmt: skip
#: What follows a section before the next begins, where it is more than bookkeeping.
AFTER = {"F": "product"}
_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
_SHOWN = 12
Figures = dict[str, Any]


class Clock:
    """Seconds and bytes by pass and section, of one worker."""

    def __init__(self, device: str) -> None:
        self.device, self.work, self.last, self.at = device, "", "", 0.0
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.bytes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def _now(self) -> float:
        if self.device == "cuda":
            import cupy

            cupy.cuda.get_current_stream().synchronize()
        return time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what is done inside, and what was done since the section before."""
        begun = self._now()
        if self.last:
            self.seconds[self.work][AFTER.get(self.last, "else")] += begun - self.at
        yield
        self.at, self.last = self._now(), name
        self.seconds[self.work][name] += self.at - begun

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function whose calls are a section."""

        def run(*arguments: Any) -> Any:
            with self.section(name):
                result = function(*arguments)
            if name == "copy up":
                moves, bits, _ = arguments
                self.bytes[self.work][name] += sum(a.nbytes for a in (moves.start, moves.row, moves.by, bits))
            elif name == "copy down":
                self.bytes[self.work][name] += result.nbytes
            return result

        return run

    def tiles(self, tiles: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """``window_tiles``, each of whose tiles is a section."""

        def run(*arguments: Any) -> Iterator[Any]:
            found = tiles(*arguments)
            while True:
                with self.section("decode"):
                    tile = next(found, None)
                if tile is None:
                    return
                yield tile

        return run

    def kernel(self, function: Callable[..., Any], work: str) -> Callable[..., Any]:
        """A kernel of the pass ``work``, whose sections count there."""

        def run(*arguments: Any) -> Any:
            if self.work != work:
                self.work, self.last = work, ""
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
        for owner, name, function in (*wrapped, (blocks, "window_tiles", clock.tiles(window_tiles))):
            stack.enter_context(mock.patch.object(owner, name, function))
        watched = work()
    for name, seconds in clock.seconds.items():
        figures: Figures = {"unwatched, s": alone[f"{name}, s"], "watched, s": watched[f"{name}, s"]}
        figures |= {f"{section}, s": taken for section, taken in sorted(seconds.items(), key=lambda item: -item[1])}
        yield name, figures | {f"{section}, MB": size / 1e6 for section, size in clock.bytes[name].items()}


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
