"""What the search of `relexio sweep` finds on a run, beside a full grid: scores, and how many evaluations they took.

usage: python tools/evidence/search.py RUNS/add/seed-1 --base RUNS/add/base --task add --steps 400 -o RUNS/add/seed-1.search.json

RUN is a directory made by `train.py grpo`, of which the first 30 % of the steps are enough. For windows of the first 15 %
and 30 % the search begins at the recipe and step that `relexio backtest` recommends. The grid is relex and pinned at
strengths 0.5 and 1, at 4/3, 2 and 3 times the window's end and at the run's last step. Every checkpoint is evaluated on
the same 1,000 problems. Writes one JSON object. Needs torch and transformers.
"""

import argparse
import json
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from evaluate import accuracy
from study import SHARES, predicted, targets
from tasks import HELD_OUT, TASKS

import relexio
from relexio.api import Trajectory
from relexio.engine.resources import Resources
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.store.opening import open_store
from relexio.sweep.search import Scored, next_step
from relexio.verbs.advice import take_advice

STRENGTHS, METHODS = (0.5, 1.0), ("relex", "pinned")


def study_window(run: Trajectory, end: int, steps: int, known: float, evaluate: Any) -> dict[str, Any]:
    """Search and grid from one window, which ends at ``end`` with a score of ``known``."""

    @cache
    def score(recipe: Recipe, first: int, step: int) -> float:
        fit = run.fit(f"{first}:{end}", method=recipe.method, rank=recipe.rank, strength=recipe.strength,
                      curve=recipe.curve, refit=recipe.refit, last=recipe.last)  # fmt: skip
        return predicted(fit, step, evaluate)

    window = tuple(step for step in run.steps if step <= end)
    advice = take_advice(open_store(run.path), window, Resources(), silent)
    found: dict[int, Scored] = {}
    while (step := next_step(end, advice.step - end, found, scored(known))) is not None:
        found[step] = scored(score(advice.recipe, advice.window[0], step))
    grid = {
        f"{method}, strength {strength:g}, step {step}": score(Recipe(method, strength=strength), 1, step)
        for method in METHODS for strength in STRENGTHS for step in targets(end, steps)
    }  # fmt: skip
    recipe = {"recipe": str(advice.recipe), "strength": advice.recipe.strength, "first": advice.window[0]}
    return {
        "end": end,
        "known": known,
        **recipe,
        "farthest": advice.step,
        "search": {step: one.score for step, one in found.items()},
        "grid": grid,
    }


def scored(share: float) -> Scored:
    """A share of right answers with its standard error."""
    return Scored(share, math.sqrt(share * (1 - share) / HELD_OUT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--steps", type=int, required=True, help="steps of the whole run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    evaluate = partial(accuracy, task=TASKS[given.task])
    store = given.run.with_suffix(".zarr")
    if not store.exists():
        relexio.convert(given.run, store, given.base)
    ends = [round(share * given.steps) for share in SHARES]
    run = relexio.open(store)
    windows = [
        study_window(run, end, given.steps, evaluate(given.run / f"global_step_{end}"), evaluate) for end in ends
    ]
    given.out.write_text(json.dumps({"task": given.task, "windows": windows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
