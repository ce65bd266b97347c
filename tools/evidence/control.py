"""Is a leap worth more than a larger learning rate? Training and leaps at several rates, from the same base.

usage: python tools/evidence/control.py RUNS -o RESULTS [--tasks TASK ...] [--rates RATE ...] [--seeds N ...] [--kinds KIND ...]

RUNS/TASK/base is the model to start from (train.py). Each run becomes RESULTS/TASK-RATE-SEED-KIND.json, and is made once: several
processes may share RESULTS. The kinds:

plain      training goes on; accuracy after some steps, of the mean of the last ten, and of predictions from the first 15 %
leap       after each segment of ten the best of some points on the line from its first to its last checkpoint is gone on from
restart    the same segments without leaps: what it costs that the optimizer starts anew
leap-5, leap-20     segments of other lengths
pinned, secant      the line is that of the method, fitted to all steps of the segment
moments    as leap, but the optimizer's moments are carried over from segment to segment

What is chosen is chosen on 400 problems, and what is reported comes from 1,000 others; neither are trained on. Time is CPU seconds
of one thread. Needs what train.py needs.
"""

import argparse
import json
import logging
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from evaluate import accuracy
from safetensors.torch import load_file, save_file
from tasks import CHOICE, TASKS, Task
from train import train_grpo

import relexio
from relexio.sweep.search import Scored, next_step

RATES = ("3e-6", "1e-5", "3e-5", "1e-4", "3e-4")
STEPS = 60
SHOWN = (5, 10, 15, 20, 30, 40, 50, 60)
WINDOW = STEPS * 15 // 100
TARGETS = (2 * WINDOW, 3 * WINDOW, STEPS)


@dataclass(frozen=True)
class Leaps:
    """How to leap: after how many steps, by which method's line (None: no leaps), with the optimizer's moments or anew."""

    segment: int = 10
    method: str | None = "scaled-last"
    moments: bool = False


#: None: plain training.
KINDS = {
    "plain": None, "leap": Leaps(), "restart": Leaps(method=None), "leap-5": Leaps(5), "leap-20": Leaps(20),
    "pinned": Leaps(method="pinned"), "secant": Leaps(method="secant"), "moments": Leaps(moments=True),
}  # fmt: skip


class Run:
    """One run in a directory of its own: what it measures, and the CPU seconds of training and of choosing so far."""

    def __init__(self, task: Task, base: Path, rate: str, seed: int, scratch: Path) -> None:
        self.task, self.base, self.rate, self.seed, self.scratch = task, base, rate, seed, scratch
        self.seconds = {"train": 0.0, "choose": 0.0}
        self.points: list[dict[str, Any]] = []
        self.problems = {"report": task.held_out(), "choose": task.choice()}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the CPU seconds of a block."""
        begun = time.process_time()
        yield
        self.seconds[what] += time.process_time() - begun

    def train(self, start: Path, steps: int, number: int = 0, moments: Path | None = None) -> Path:
        """Train on from a checkpoint with problems of its own; every step is saved in a new directory."""
        out = self.scratch / f"trained-{number}"
        with self.timed("train"):
            train_grpo(self.task, start, out, 1000 * self.seed + number, steps, float(self.rate), moments=moments)
        return out

    def accuracy(self, checkpoint: Path, which: str) -> float:
        """The share of problems of one set that a checkpoint solves."""
        return accuracy(checkpoint, self.task, self.problems[which])

    def report(self, trained: int, checkpoint: Path, **more: object) -> None:
        """Measure a checkpoint on the problems that choose nothing."""
        found = self.accuracy(checkpoint, "report")
        self.points.append({"trained": trained, "accuracy": found, **self.seconds, **more})

    def score(self, checkpoint: Path) -> Scored:
        """Measure it on the problems that choose."""
        with self.timed("choose"):
            share = self.accuracy(checkpoint, "choose")
        return Scored(share, math.sqrt(share * (1 - share) / CHOICE))

    def combine(self, weights: dict[Path, float], name: str) -> Path:
        """The sum of checkpoints, each times its weight, in float64, rounded once."""
        found: dict[str, Any] = {}
        for checkpoint, weight in weights.items():
            for tensor, values in load_file(checkpoint / "model.safetensors").items():
                found[tensor] = found.get(tensor, 0) + weight * values.double()
        out = self.scratch / name
        shutil.copytree(next(iter(weights)), out, dirs_exist_ok=True)
        save_file(
            {name: tensor.bfloat16() for name, tensor in found.items()}, out / "model.safetensors", {"format": "pt"}
        )
        return out


def plain(run: Run) -> None:
    """Training alone, the mean of its last steps, and RELEX and pinned from its first 15 %."""
    run.report(0, run.base)
    steps = run.train(run.base, STEPS)
    whole = run.seconds["train"]
    for step in SHOWN:
        run.seconds["train"] = whole * step / STEPS
        run.report(step, steps / f"global_step_{step}")
    run.seconds["train"] = whole
    last = {steps / f"global_step_{step}": 0.1 for step in range(STEPS - 9, STEPS + 1)}
    run.report(STEPS, run.combine(last, "mean"), kind="mean of the last 10")
    trajectory = relexio.convert(steps, run.scratch / "run.zarr", run.base, steps=f"1:{WINDOW}")
    for method in ("relex", "pinned"):
        fit = trajectory.fit(method=method)
        for target in TARGETS:
            out = run.scratch / f"{method}-{target}"
            fit.predict(target).save(out)
            run.report(WINDOW, out, kind=method, step=target)


def leap(run: Run, how: Leaps) -> None:
    """Segments; after each one goes on from the best point of the line that chooses itself beyond its standard error."""
    start, segment = run.base, how.segment
    run.report(0, start)
    for number in range(1, STEPS // segment + 1):
        steps = run.train(start, segment, number, run.scratch / "moments.pt" if how.moments else None)
        last = steps / f"global_step_{segment}"
        best, best_step, tried = last, segment, 0
        if how.method is not None:
            best, best_step, tried = search(run, how.method, start, last)
        kept = run.scratch / f"model-{number}"
        shutil.copytree(best, kept)
        start = kept
        for path in (steps, *run.scratch.glob("step-*"), *run.scratch.glob("*.zarr")):
            shutil.rmtree(path)
        run.report(segment * number, start, step=best_step, tried=tried)


def search(run: Run, method: str, start: Path, last: Path) -> tuple[Path, int, int]:
    """The checkpoint to go on from, its step, and how many predictions were tried."""
    segment = len(list(last.parent.glob("global_step_*")))
    scores: dict[int, Scored] = {}
    best, best_step = last, segment
    known = top = run.score(last)
    fit = None
    if method != "scaled-last":
        with run.timed("choose"):
            fit = relexio.convert(last.parent, run.scratch / "run.zarr", start).fit(method=method)
    while (step := next_step(segment, segment // 2, scores, known)) is not None:
        candidate = run.scratch / f"step-{step}"
        with run.timed("choose"):
            if fit is None:
                run.combine({last: step / segment, start: 1 - step / segment}, candidate.name)
            else:
                fit.predict(step).save(candidate)
        scores[step] = run.score(candidate)
        if scores[step].score > max(top.score, known.score + scores[step].error):
            best, best_step, top = candidate, step, scores[step]
    return best, best_step, len(scores)


def measure(kind: str, run: Run) -> dict[str, Any]:
    """Make a run; what its file holds."""
    how = KINDS[kind]
    if how is None:
        plain(run)
    else:
        leap(run, how)
    facts = {"task": run.task.name, "rate": run.rate, "seed": run.seed, "kind": kind}
    return {**facts, "steps": STEPS, "segment": (how or Leaps()).segment, "points": run.points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["add", "sort", "descend"])
    parser.add_argument("--rates", nargs="+", default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS)[:3])
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for kind in given.kinds:
            for task in given.tasks:
                for rate in given.rates:
                    out = given.out / f"{task}-{rate}-{seed}-{kind}.json"
                    try:
                        out.touch(exist_ok=False)
                    except FileExistsError:
                        continue
                    try:
                        with tempfile.TemporaryDirectory(prefix="relexio-control-") as scratch:
                            base = given.runs / task / "base"
                            found = measure(kind, Run(TASKS[task], base, rate, seed, Path(scratch)))
                        out.write_text(json.dumps(found, indent=1) + "\n")
                    finally:
                        if not out.stat().st_size:  # interrupted: another process may make it
                            out.unlink()
                    print(out.stem, found["points"][-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
