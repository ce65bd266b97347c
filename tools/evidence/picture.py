"""Draw the README's picture from the demo's run: the coefficient over steps with its line, and task accuracy.

usage: python tools/evidence/picture.py docs/demo.png     (needs matplotlib)
"""

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import relexio
from relexio.methods import Recipe
from relexio.progress import silent
from relexio.verbs.demo.run import TARGET, WINDOW_END, run

BLUE, ORANGE, GREY = "#2a6fbb", "#d9822b", "#8a8f98"


def coefficients(path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps, the coefficient at each along the window's direction, and what the line says at the target.

    Over all tensors: directions weighted by how far each tensor moved along its own.
    """
    trajectory = relexio.open(path)
    steps = np.array(trajectory.steps)
    window = trajectory.fit(f"1:{WINDOW_END}", method="relex")
    ahead = window.weights(TARGET)
    along, reached = np.zeros(len(steps)), 0.0
    for name in trajectory.tensors:
        deltas = trajectory.delta(name).compute()
        predicted = ahead[name] @ deltas[: len(window.steps)]
        along += deltas @ predicted
        reached += predicted @ predicted
    return steps, along / np.sqrt(reached), float(np.sqrt(reached))


def main(out: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        found = run(Path(name, "demo"), silent, lambda line: None)
        steps, along, reached = coefficients(Path(name, "demo", "run.zarr"))
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(3, 2))
    seen = steps <= WINDOW_END
    slope, intercept = np.polyfit(steps[seen], along[seen], 1)
    reach = np.array([0, TARGET])
    left.plot(reach, slope * reach + intercept, color=BLUE, lw=1.5, label="line through what was observed")
    left.plot(steps[seen], along[seen], "o", color=BLUE, ms=5, label=f"observed, steps 5 to {WINDOW_END}")
    left.plot(TARGET, reached, "D", color=ORANGE, ms=7, label=f"predicted, step {TARGET}")
    left.plot(steps[~seen], along[~seen], "o", mfc="white", mec=GREY, ms=7, label=f"really trained, step {TARGET}")
    left.set(xlabel="training step", ylabel="way along the direction", ylim=(0, None))
    left.legend(frameon=False, loc="upper left")
    base, last, *predicted, trained = found.measured
    shown = [base, last, next(one for one in predicted if one.recipe == Recipe()), trained]
    names = ["base", f"step {WINDOW_END}", f"predicted\n{TARGET}", f"trained\n{TARGET}"]
    bars = right.bar(names, [100 * one.accuracy for one in shown], color=[GREY, BLUE, ORANGE, GREY], width=0.65)
    right.bar_label(bars, fmt="%.0f %%", padding=2)
    right.set(ylabel="task accuracy, %", ylim=(0, 65))
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1])
