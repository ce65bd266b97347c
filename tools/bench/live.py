"""What recording costs a training step: seconds in the trainer and in the thread, bytes, memory; beside saving a checkpoint.

usage: python tools/bench/live.py [--quick] [--scratch DIR]

Made-up steps (tools/bench/simulate.py) are held as fp32 torch tensors, as a trainer holds its master weights, and stored with
relexio.Recorder, and beside it saved as a bf16 checkpoint, durably. The two take turns at every step. Needs torch. Data is made
in a temporary directory and removed: 6 GB, --quick 0.2 GB.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from simulate import shapes, simulate

from relexio import Recorder
from relexio.engine.process import resident_bytes
from relexio.words import show

#: Model; layers, hidden size, vocabulary; steps.
TINY = ("1.8 M", (4, 192, 128), 40)
FULL = (TINY, ("150 M", (12, 1024, 17920), 20))


def measure(name: str, shape: tuple[int, int, int], steps: int, scratch: Path) -> str:
    """One row of the table: medians over the steps."""
    simulate(scratch / "data", shapes(*shape), list(range(1, steps + 1)))
    adding, encoding, saving, peak = [], [], [], 0
    with Recorder(scratch / "run.zarr", scratch / "data" / "base") as recorder:
        for step in range(1, steps + 1):
            directory = scratch / "data" / "steps" / f"global_step_{step}"
            saved = load_file(directory / "model.safetensors")
            tensors = {key: tensor.float() for key, tensor in saved.items()}
            before = resident_bytes()
            begun = time.perf_counter()
            recorder.add(step, tensors)
            added = time.perf_counter()
            recorder.flush()
            stored = time.perf_counter()
            peak = max(peak, resident_bytes() - before)
            save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, scratch / "saved")
            with open(scratch / "saved", "rb") as file:
                os.fsync(file.fileno())
            saving.append(time.perf_counter() - stored)
            adding.append(added - begun)
            encoding.append(stored - added)
    total = sum(path.stat().st_size for path in (scratch / "run.zarr" / "segments").rglob("*") if path.is_file())
    add, thread, save = (statistics.median(seconds) for seconds in (adding, encoding, saving))
    size = (scratch / "saved").stat().st_size
    return (
        f"| {name} | {add:.3f} s | {thread:.2f} s | {save:.2f} s | {show(total / steps)} | {show(size)} | "
        f"{size * steps / total:.0f} | {show(peak)} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch")
    chosen = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| parameters | `add` | thread | saving it | bytes a step | a checkpoint | smaller | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape, steps in (TINY,) if chosen.quick else FULL:
        with tempfile.TemporaryDirectory(prefix="relexio-bench-", dir=chosen.scratch) as scratch:
            print(measure(name, shape, steps, Path(scratch)), flush=True)


if __name__ == "__main__":
    main()
