"""What relexio predicts for one RLVR run, held against what training reached: accuracy, and skill in weights.

usage: python tools/evidence/study.py RUNS/add/seed-1 --base RUNS/add/base -o RUNS/add/seed-1.json

RUN is a directory made by `train.py grpo`. Its steps are converted to RUN.zarr. For windows of the first 15 % and 30 %
of its N steps, `relex` and `pinned` (rank 1, strength 1) predict the steps at 4/3, 2 and 3 times the window's end, and
N; so does what `relexio backtest` recommends for that window, and its farthest step. Each prediction is evaluated, and
so are the base, the steps as trained (those targets, the windows' ends, and every N/20), and rank-1 reconstructions at
N/4, N/2, 3N/4 and N, fitted to the whole run. Writes one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from evaluate import accuracy
from tasks import TASKS

import relexio
from relexio.api import Trajectory, TrajectoryFit

SHARES = (0.15, 0.30)
METHODS = ("relex", "pinned")

Evaluate = Callable[[Path], float]


def targets(end: int, steps: int) -> list[int]:
    """The steps predicted from a window that ends at ``end``, in a run of ``steps``."""
    return [*(target for target in (4 * end // 3, 2 * end, 3 * end) if target < steps), steps]


def predicted(fit: TrajectoryFit, step: int, evaluate: Evaluate) -> float:
    """Accuracy of a predicted or reconstructed checkpoint, which is written and removed."""
    with tempfile.TemporaryDirectory() as scratch:
        fit.predict(step).save(Path(scratch) / "checkpoint")
        return evaluate(Path(scratch) / "checkpoint")


def prediction(name: str, fit: TrajectoryFit, step: int, evaluate: Evaluate) -> dict[str, Any]:
    """One prediction: its accuracy, its skill in weights, and the skill that the backtest has at such a horizon."""
    expected = fit.outlook(step)
    return {
        "method": name,
        "step": step,
        "accuracy": predicted(fit, step, evaluate),
        "skill": fit.skill(step),
        "expected": expected.skill if expected else None,
    }


def advised(run: Trajectory, window: str) -> tuple[TrajectoryFit, dict[str, Any]]:
    """What the backtest of a window recommends, fitted, and in words; where it advises against, the best that it tried."""
    judged = run.judge(window)
    verdict = judged.verdict
    assert verdict is not None  # these windows have dozens of steps
    said = judged.row(verdict.pick)
    options = {name: said[name] for name in ("method", "rank", "refit", "last", "strength")}
    fit = run.fit(said["window"], curve=said["fit"], **options)
    recipe = str(verdict.pick.trial.recipe)
    facts = {"recipe": recipe, "strength": said["strength"], "window": said["window"], "score": said["score"]}
    return fit, {**facts, "sure": verdict.sure, "farthest": verdict.farthest}


def study_window(run: Trajectory, share: float, evaluate: Evaluate) -> dict[str, Any]:
    """All predictions from the first part of a run."""
    steps = run.steps[-1]
    end = round(share * steps)
    fits = {method: run.fit(f"1:{end}", method=method) for method in METHODS}
    tests = {method: fit.backtest() for method, fit in fits.items()}
    fits["advised"], advice = advised(run, f"1:{end}")
    return {
        "share": share,
        "end": end,
        "backtest": {
            method: test.errors(test.trials[0], 1.0).skill if test else None for method, test in tests.items()
        },
        "advice": {**advice, "accuracy": predicted(fits["advised"], advice["farthest"], evaluate)},
        "predictions": [
            prediction(method, fit, target, evaluate) for target in targets(end, steps) for method, fit in fits.items()
        ],
    }


def inspect(store: Path) -> dict[str, Any]:
    """What ``relexio inspect --json`` says of the whole run."""
    command = [sys.executable, "-m", "relexio", "inspect", str(store), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def study(directory: Path, base: Path) -> dict[str, Any]:
    """Convert a run and measure everything."""
    store = directory.with_suffix(".zarr")
    command = [sys.executable, "-m", "relexio", "convert", str(directory), "--base", str(base), "-o", str(store)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    run, whole = relexio.open(store), inspect(store)
    settings = json.loads((directory / "log.json").read_text())
    log, steps = settings.pop("log"), settings["steps"]
    if run.steps != tuple(range(1, steps + 1)):
        raise SystemExit(f"{directory}: not every step from 1 to {steps} is there")
    evaluate = partial(accuracy, task=TASKS[settings["task"]])
    windows = [study_window(run, share, evaluate) for share in SHARES]
    trained = {end for window in windows for end in (window["end"], *targets(window["end"], steps))}
    trained |= {window["advice"]["farthest"] for window in windows}
    trained |= {k * steps // 20 for k in range(1, 21)}
    return {
        **settings,
        "model": json.loads((base / "config.json").read_text())["architectures"][0],
        "parameters": whole["parameters"],
        "seconds_per_step": statistics.median(entry["seconds"] for entry in log),
        "energy": whole["energy"],
        "changed": {str(step): whole["changed"][str(step)] for step in (1, *sorted(trained))},
        "base": evaluate(base),
        "trained": {str(step): evaluate(directory / f"global_step_{step}") for step in sorted(trained)},
        "reconstructed": {
            str(step): predicted(run.fit(method="reconstruct"), step, evaluate)
            for step in (k * steps // 4 for k in range(1, 5))
        },
        "windows": windows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    given.out.write_text(json.dumps(study(given.run, given.base), indent=1) + "\n")


if __name__ == "__main__":
    main()
