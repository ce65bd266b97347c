"""Tries to lose steps of a running training: relexio follows it, is killed again and again, and deletes what it has stored.

usage: python tools/attack/following.py [--kills N] [--seed S] [--scratch DIR]

A process writes steps like a trainer, its weights in two halves, and goes on while `relexio convert --follow` is killed at
random moments and started again. Two runs: in one, relexio deletes what it has stored (--delete-verified), and no step may be
missing at the end; in the other the trainer keeps its last three steps only, and every step that was stored must be right.
Prints one line for each. Ends with 1 if anything was lost.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import Event, Process
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import relexio

PAUSE = 0.4  # seconds between the trainer's steps
SHAPES = {f"model.layers.{i}.w": (300, 200) for i in range(4)} | {"model.norm.weight": (200,)}
Tensors = dict[str, np.ndarray]


def tensors(step: int) -> Tensors:
    """The model at a step; 0 is the base."""
    rng = np.random.default_rng(0)
    made = {}
    for name, shape in SHAPES.items():
        base, direction = rng.standard_normal((2, *shape))
        made[name] = (0.02 * base + 2e-5 * step * direction).astype(np.float32).astype(ml_dtypes.bfloat16)
    return made


def train(root: Path, kept: int | None, stop: EventType) -> None:
    """Write step after step, until told to stop; keep the last few."""
    for step in range(1, 10_000):
        if stop.is_set():
            return
        directory = root / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        save_file(tensors(step), root / "next")
        data = (root / "next").read_bytes()
        with open(directory / "model.safetensors", "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(PAUSE / 2)
            file.write(data[len(data) // 2 :])
        (directory / "optimizer.pt").write_bytes(b"state")
        (directory / "trainer_state.json").write_text("{}")
        if kept is not None and step > kept:
            shutil.rmtree(root / f"checkpoint-{step - kept}")
        time.sleep(PAUSE / 2)


def killed_again_and_again(command: list[str], kills: int, rng: random.Random) -> None:
    """Start the command, and kill it at a random moment: at once, while it works, while it waits."""
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.2, 2))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        _, err = process.communicate()
        if process.returncode not in (-signal.SIGKILL, 128 + signal.SIGTERM):
            sys.exit(f"it ended by itself: {err.decode()}")


def wrong_steps(store: Path) -> list[int]:
    """The stored steps that are not what was written."""
    trajectory, base, wrong = relexio.open(store), tensors(0), set[int]()
    truth = {step: tensors(step) for step in trajectory.steps}
    for name, start in base.items():
        for step, delta in zip(trajectory.steps, trajectory.delta(name).compute(), strict=True):
            if (delta != (truth[step][name].astype(float) - start.astype(float)).reshape(-1)).any():  # both exact
                wrong.add(step)
    return sorted(wrong)


def attack(scratch: Path, kills: int, kept: int | None, rng: random.Random) -> bool:
    """One run; whether all is well."""
    base, root, store = scratch / "base", scratch / "run", scratch / "run.zarr"
    base.mkdir(parents=True)
    save_file(tensors(0), base / "model.safetensors")
    stop = Event()
    trainer = Process(target=train, args=(root, kept, stop))
    trainer.start()
    command = [sys.executable, "-m", "relexio", "convert", str(root), "--base", str(base), "-o", str(store), "--follow"]
    command += ["--delete-verified"] if kept is None else []
    killed_again_and_again(command, kills, rng)
    stop.set()
    trainer.join()
    done = subprocess.run([*command, "--idle", "3s"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"it failed: {done.stderr}")
    written = {int(path.name.split("-")[1]) for path in root.glob("checkpoint-*")}
    steps, wrong = set(relexio.open(store).steps), wrong_steps(store)
    left = [*root.glob("checkpoint-*/*.safetensors")]
    missing = sorted(written - steps)
    what = f"{len(left)} weight files left, " if kept is None else ""
    print(f"{kills} kills, {'deleting' if kept is None else f'{kept} steps kept by the trainer'}: {len(steps)} steps stored, "
          f"{what}missing {missing or 'none'}, wrong {wrong or 'none'}", flush=True)  # fmt: skip
    states = all((path / "optimizer.pt").exists() for path in root.glob("checkpoint-*"))
    return not missing and not wrong and states and not (kept is None and left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory(dir=given.scratch) as name:
        well = [attack(Path(name, str(kept)), given.kills, kept, rng) for kept in (None, 3)]
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
