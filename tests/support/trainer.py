"""A tiny trainer: every weight goes a part of the way to an optimum, step after step, and is saved; and an evaluation of it.

usage: python trainer.py train BASE OUT STEPS RATE [--last]     python trainer.py score CHECKPOINT
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

OPTIMUM = 2.0


def train(base: Path, out: Path, steps: int, rate: float, last: bool) -> None:
    """Write OUT/checkpoint-N after each step, or the last alone."""
    weights = load_file(base / "model.safetensors")
    for step in range(1, steps + 1):
        for name, values in weights.items():
            weights[name] = values + np.float32(rate) * (np.float32(OPTIMUM) - values)
        if step == steps or not last:
            directory = out / f"checkpoint-{step}"
            directory.mkdir(parents=True)
            save_file(weights, directory / "model.safetensors")
            (directory / "config.json").write_bytes((base / "config.json").read_bytes())


def score(checkpoint: Path) -> float:
    """Minus the root mean square distance from the optimum."""
    flat = np.concatenate(
        [values.astype("f8").ravel() for values in load_file(checkpoint / "model.safetensors").values()]
    )
    return -float(np.sqrt(np.mean((flat - OPTIMUM) ** 2)))


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "train":
        train(Path(given[0]), Path(given[1]), int(given[2]), float(given[3]), "--last" in given)
    else:
        print(score(Path(given[0])))
