"""The same steps in each form that torch writes against plain safetensors: seconds to read them all, and to convert them.

usage: python tools/bench/shards.py [--quick] [--scratch DIR] [--json FILE]

Steps are made in fp32 with tools/bench/simulate.py in a temporary directory, over a base in bf16, written again by torch (needed
for this alone), and removed: 3 GB at a time, --quick 0.1 GB. All is in memory when it is read, as what a disk takes is the same
for all. Figures are printed beside their bar, never judged (docs/performance.md explains them).
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import BENCH, RELEXIO, Command, Data

#: Layers, hidden size, vocabulary; steps; how often they are converted. A read is short and noisy, and is repeated more often.
FULL = ("150 M", (12, 1024, 17920), 2, 5)
QUICK = ("6 M", (8, 256, 3072), 2, 3)
READS = 3
BAR, RANKS = 1.3, 2
#: Reads all tensors of all steps in the pieces in which convert reads them, and does nothing with them.
READ = """
import sys
from pathlib import Path
from relexio.checkpoints.layout import find_steps, open_checkpoint
from relexio.dtypes import tensor_bytes
buffer = memoryview(bytearray(1 << 18))
for step, path in find_steps(Path(sys.argv[1]))[0].items():
    checkpoint = open_checkpoint(path, step)
    for name, tensor in checkpoint.tensors.items():
        nbytes = tensor_bytes(*tensor)
        with checkpoint.held(name, 0, nbytes) as read:
            for first in range(0, nbytes, len(buffer)):
                read(first, buffer[: nbytes - first])
"""


def save_shards(step: Path, state: dict[str, Any], rank: int) -> None:
    """FSDP shards, a file for each rank."""
    import torch

    torch.save(state, step / f"model_world_size_{RANKS}_rank_{rank}.pt")


def save_bin(step: Path, state: dict[str, Any], rank: int) -> None:
    """One torch file, of whole tensors."""
    import torch

    whole = {name: tensor.full_tensor() for name, tensor in state.items()}
    if rank == 0:
        torch.save(whole, step / "pytorch_model.bin")


def save_dcp(step: Path, state: dict[str, Any], rank: int) -> None:
    """DCP, as accelerate writes it."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": state}, checkpoint_id=str(step / "pytorch_model_fsdp_0"))


FORMS: dict[str, Callable[..., None]] = {"FSDP shards": save_shards, "pytorch_model.bin": save_bin, "DCP": save_dcp}


def write(rank: int, form: str, plain: Path, out: Path, port: int) -> None:
    """Write all steps again, all processes together."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    for step in sorted(plain.iterdir()):
        state = {}
        for name, tensor in load_file(step / "model.safetensors").items():
            rows = torch.chunk(tensor, RANKS)[rank].clone()
            whole = {"shape": tensor.shape, "stride": tensor.stride()}
            state[name] = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, **whole)
        (out / step.name).mkdir(parents=True, exist_ok=True)
        FORMS[form](out / step.name, state, rank)
    dist.destroy_process_group()


def convert(data: Data, steps: Path) -> Command:
    """The command that makes a store."""
    store = data.scratch / "store"
    shutil.rmtree(store, ignore_errors=True)
    return [*RELEXIO, "convert", steps, "--base", data.scratch / "data" / "base", "-o", store]


def compare(data: Data, form: str, repetitions: int) -> list[dict[str, Any]]:
    """The rows of one form, which is written, read in turn with plain files, and removed."""
    import torch.multiprocessing as mp

    plain, other = data.scratch / "data" / "steps", data.scratch / "other"
    mp.spawn(write, (form, plain, other, 29561), nprocs=RANKS)
    for number in range(READS * repetitions + 1):
        for name, steps in sorted([("plain", plain), (form, other)], reverse=number % 2 == 1):
            data.run(f"read {name}", [sys.executable, "-c", READ, steps], cold=False)
            if number <= repetitions:
                data.run(f"convert {name}", convert(data, steps), cold=False)
    rows = [row(data, what, form) for what in ("read", "convert")]
    shutil.rmtree(other)
    data.took.clear()
    return rows


def row(data: Data, what: str, form: str) -> dict[str, Any]:
    """Medians, the first run of each left out, and ratios of runs that followed each other: of seconds, and of CPU seconds."""
    ours, plain = (data.took[f"{what} {name}"][1:] for name in (form, "plain"))
    found: dict[str, Any] = {"what": what, "form": form, "bar": BAR}
    for unit in ("seconds", "cpu_seconds"):
        a, b = ([run[unit] for run in runs] for runs in (ours, plain))
        ratios = sorted(x / y for x, y in zip(a, b, strict=True))
        found[unit] = {"form": statistics.median(a), "plain": statistics.median(b), "ratios": ratios}
    return found


def make(model: str, shape: tuple[int, ...], steps: int, scratch: Path) -> Data:
    """Simulate the same run twice: the base is taken in bf16, the steps in fp32."""
    data = Data(model, scratch, steps)
    options = [f for pair in zip(("--layers", "--hidden", "--vocabulary"), map(str, shape), strict=True) for f in pair]
    for dtype, count in (("bf16", 1), ("f32", steps)):
        command: Command = [sys.executable, BENCH / "simulate.py", scratch / dtype, *options]
        data.run("simulate", [*command, "--dtype", dtype, "--steps", str(count)], cold=False)
    (scratch / "data").mkdir()
    (scratch / "bf16" / "base").rename(scratch / "data" / "base")
    (scratch / "f32" / "steps").rename(scratch / "data" / "steps")
    for dtype in ("bf16", "f32"):
        shutil.rmtree(scratch / dtype)
    data.took.clear()
    return data


def cells(found: dict[str, Any]) -> str:
    """Three cells of the table."""
    ratios = found["ratios"]
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"{found['form']:.2f} | {found['plain']:.2f} | {ratio}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch")
    parser.add_argument("--json")
    chosen = parser.parse_args()
    model, shape, steps, repetitions = QUICK if chosen.quick else FULL
    with tempfile.TemporaryDirectory(prefix="relexio-bench-", dir=chosen.scratch) as scratch:
        data = make(model, shape, steps, Path(scratch))
        rows = [row for form in FORMS for row in compare(data, form, repetitions)]
    print(
        f"{model} parameters, {steps} steps in fp32, base in bf16; medians (least to most) of {repetitions} conversions, "
        f"{READS * repetitions} reads\n"
    )
    print(
        "| what | form | s | plain, s | ratio | CPU s | plain, CPU s | ratio | bar |\n|---|---|---|---|---|---|---|---|---|"
    )
    for r in rows:
        print(f"| {r['what']} | {r['form']} | {cells(r['seconds'])} | {cells(r['cpu_seconds'])} | at most {BAR} |")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"model": model, "steps": steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
