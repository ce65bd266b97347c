"""A run of the paper's own size, step by step as training writes it: what each command takes, and the authors' code by arithmetic.

usage: python tools/bench/paper.py SCRATCH [--model 1.5B] [--steps 75] [--json FILE]

Each step is made (tools/bench/grow.py), read by `cat`, added by `relexio convert`, and removed when the next one is added; then
step 500 is predicted, a second target, and the trajectory is judged, verified, and one step restored and compared. Every command
has --memory 1GB. When run again it goes on where it stopped. SCRATCH keeps base, master weights, trajectory and the last step:
15 GB for 1.5B, and 3 GB more while it runs.
"""

import argparse
import hashlib
import json
import math
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from bench import BENCH, READ, RELEXIO, Command, Data
from grow import MODELS, shapes

MEMORY = ["--memory", "1GB"]
TARGETS = (500, 300)


def load(record: Path, data: Data) -> dict[int, str]:
    """What an earlier call has measured, and the hash of the file of each step that was added."""
    if not record.exists():
        return {}
    found = json.loads(record.read_text())
    data.took.update(found["took"])
    return {int(step): content for step, content in found["added"].items()}


def save(record: Path, data: Data, added: dict[int, str]) -> None:
    """Keep it."""
    record.with_suffix(".new").write_text(json.dumps({"took": data.took, "added": added}, indent=1) + "\n")
    record.with_suffix(".new").rename(record)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def add(data: Data, step: int) -> str:
    """Make a step, read it beside the base, add it to the trajectory, and remove the one before. The hash of its file."""
    top = data.scratch
    directory = top / "steps" / f"global_step_{step}"
    shutil.rmtree(directory, ignore_errors=True)  # what an earlier call may have left is made again
    grow(data, step)
    data.run("read", ["sh", "-c", READ, "sh", top / "base", directory], cold=False)
    options: Command = ["--base", top / "base", "-o", top / "run.zarr", *MEMORY]
    data.run("append", [*RELEXIO, "convert", top / "steps", *options], cold=False)
    shutil.rmtree(top / "steps" / f"global_step_{step - 1}", ignore_errors=True)
    return digest(directory / "model.safetensors")


def grow(data: Data, step: int) -> None:
    """Make the checkpoint of a step, the base's for 0."""
    made: Command = [sys.executable, BENCH / "grow.py", data.scratch, "--model", data.model, "--step", str(step)]
    data.run("made", made, cold=False)


def ask(data: Data, added: dict[int, str]) -> None:
    """All that is asked of the trajectory, each answer removed. Ends the benchmark where a step is not restored as it was."""
    top, middle = data.scratch, max(added) // 2
    store, out = top / "run.zarr", top / "out"
    commands: dict[str, Command] = {
        f"predict, step {step}": ["predict", store, "--method", "relex", "--step", str(step), "-o", out]
        for step in TARGETS
    }
    commands |= {"backtest": ["backtest", store], "inspect": ["inspect", store], "verify": ["verify", store]}
    commands[f"restore, step {middle}"] = ["restore", store, "--step", str(middle), "-o", out]
    for name, command in commands.items():
        if name not in data.took:
            shutil.rmtree(out, ignore_errors=True)
            data.run(name, [*RELEXIO, *command, *MEMORY])
            if "restore" in name and digest(out / "model.safetensors") != added[middle]:
                sys.exit(f"step {middle} was not restored as it was made")
            save(top / "record.json", data, added)
    shutil.rmtree(out, ignore_errors=True)


def size(path: Path) -> int:
    """Bytes of the files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def show(data: Data) -> None:
    """Print the tables."""
    model = shapes(data.model)
    parameters, steps, count = sum(map(math.prod, model.values())), data.steps, len(data.took["append"])
    store = data.scratch / "run.zarr"
    print(
        f"{data.model}: {parameters:,} parameters, {steps} steps, {parameters * 2 * steps / 1e9:.0f} GB of checkpoints\n"
    )
    print("| an append | median | least | most | / reading base and step, median |\n|---|---|---|---|---|")
    seconds = [[run["seconds"] for run in data.took[name]] for name in ("append", "read")]
    some = max(count // 5, 1)
    for name, first, last in (("all", 0, count), ("the first fifth", 0, some), ("the last fifth", count - some, count)):
        part, read = (times[first:last] for times in seconds)
        ratio = statistics.median(a / b for a, b in zip(part, read, strict=True))
        print(f"| {name} | {statistics.median(part):.1f} s | {min(part):.1f} s | {max(part):.1f} s | {ratio:.2f} |")
    print("\n| command | seconds | CPU seconds | peak MB |\n|---|---|---|---|")
    for name, runs in data.took.items():
        if name not in ("made", "read"):
            wall, cpu = (statistics.median(run[what] for run in runs) for what in ("seconds", "cpu_seconds"))
            peak = max(run["peak_mb"] for run in runs)
            print(f"| {name} | {wall:.1f} | {cpu:.1f} | {peak:.0f} |")
    moves, base = size(store / "segments"), size(store / "base")
    largest = max(map(math.prod, model.values()))
    times, whole = parameters * 2 * steps / moves, parameters * 2 * steps / 1e9
    print(f"\ntrajectory: {moves / 1e9:.2f} GB of steps, {times:.0f} times smaller; {base / 1e9:.2f} GB of base")
    memory = f"{4 * largest * steps / 1e9:.0f} GB of memory for the float32 deltas of the largest tensor"
    print(f"the authors' code, by arithmetic: {memory}, {whole:.0f} GB of checkpoints on the disk at once")


def main() -> None:
    """Measure what has not been measured; then print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--model", choices=MODELS, default="1.5B")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    chosen.scratch.mkdir(parents=True, exist_ok=True)
    data = Data(chosen.model, chosen.scratch, chosen.steps, took=defaultdict(list))
    record = chosen.scratch / "record.json"
    added = load(record, data)
    if not (chosen.scratch / "base" / "model.safetensors").exists():
        grow(data, 0)
    for step in range(len(added) + 1, chosen.steps + 1):
        added[step] = add(data, step)
        save(record, data, added)
    ask(data, added)
    show(data)
    if chosen.json:
        shutil.copy(record, chosen.json)


if __name__ == "__main__":
    main()
