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

#: Layers, hidden size, vocabulary; steps; repetitions.
FULL = ("150 M", (12, 1024, 17920), 2, 7)
QUICK = ("6 M", (8, 256, 3072), 2, 3)
BAR, RANKS, NAME = 1.3, 2, "global_step_{}"
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


def save_shards(step: Path, state: dict[str, Any], mesh: Any, rank: int) -> None:
    """FSDP shards, a file for each rank."""
    import torch

    torch.save(state, step / f"model_world_size_{RANKS}_rank_{rank}.pt")


def save_bin(step: Path, state: dict[str, Any], mesh: Any, rank: int) -> None:
    """One torch file, of whole tensors."""
    import torch

    whole = {name: tensor.full_tensor() for name, tensor in state.items()}
    if rank == 0:
        torch.save(whole, step / "pytorch_model.bin")


def save_dcp(step: Path, state: dict[str, Any], mesh: Any, rank: int) -> None:
    """DCP, as accelerate writes it."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": state}, checkpoint_id=str(step / "pytorch_model_fsdp_0"))


FORMS: dict[str, Callable[..., None]] = {"FSDP shards": save_shards, "pytorch_model.bin": save_bin, "DCP": save_dcp}


def write(rank: int, form: str, source: Path, out: Path, port: str) -> None:
    """Write a step again, all processes together."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh, state = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",)), {}
    for name, tensor in load_file(source / "model.safetensors").items():
        rows = torch.chunk(tensor, RANKS)[rank].clone()
        state[name] = DTensor.from_local(
            rows, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    FORMS[form](out, state, mesh, rank)
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
    for step in range(1, data.steps + 1):
        where = other / NAME.format(step)
        where.mkdir(parents=True)
        mp.spawn(write, (form, plain / NAME.format(step), where, "29561"), nprocs=RANKS)
    for number in range(repetitions + 1):
        for name, steps in sorted([("plain", plain), (form, other)], reverse=number % 2 == 1):
            data.run(f"read {name}", [sys.executable, "-c", READ, steps], cold=False)
            data.run(f"convert {name}", convert(data, steps), cold=False)
    rows = [row(data, what, form) for what in ("read", "convert")]
    shutil.rmtree(other)
    data.took.clear()
    return rows


def row(data: Data, what: str, form: str) -> dict[str, Any]:
    """Medians, the first run of each left out, and the median of the ratios by pairs."""
    ours, plain = ([run["seconds"] for run in data.took[f"{what} {name}"]][1:] for name in (form, "plain"))
    ratios = sorted(a / b for a, b in zip(ours, plain, strict=True))
    return {
        "what": what, "form": form, "seconds": statistics.median(ours), "plain": statistics.median(plain),
        "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1], "bar": BAR,
    }  # fmt: skip


def make(model: str, shape: tuple[int, ...], steps: int, scratch: Path) -> Data:
    """Simulate the same run twice: the base is taken in bf16, the steps in fp32."""
    data = Data(model, scratch, steps)
    options = [f for pair in zip(("--layers", "--hidden", "--vocabulary"), map(str, shape), strict=True) for f in pair]
    for dtype, count in (("bf16", 1), ("f32", steps)):
        command = [sys.executable, BENCH / "simulate.py", scratch / dtype, *options]
        data.run("simulate", [*command, "--dtype", dtype, "--steps", str(count)], cold=False)
    (scratch / "data").mkdir()
    (scratch / "bf16" / "base").rename(scratch / "data" / "base")
    (scratch / "f32" / "steps").rename(scratch / "data" / "steps")
    for dtype in ("bf16", "f32"):
        shutil.rmtree(scratch / dtype)
    data.took.clear()
    return data


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
    print(f"{model} parameters, {steps} steps in fp32, base in bf16\n")
    print("| what | form | seconds | plain safetensors | ratio (least to most) | bar |\n|---|---|---|---|---|---|")
    for r in rows:
        ratio = f"{r['ratio']:.2f} ({r['least']:.2f} to {r['most']:.2f})"
        print(f"| {r['what']} | {r['form']} | {r['seconds']:.2f} | {r['plain']:.2f} | {ratio} | at most {r['bar']} |")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"model": model, "steps": steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
