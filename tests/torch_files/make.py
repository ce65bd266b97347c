"""Makes the fixtures in this directory with the real libraries: python -m tests.torch_files.make

The torch that runs it gives their archive the name of its version. Four gloo processes on one machine; nothing else is needed.
"""

import json
import os
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.support.torch_model import many_types, model, values


def build() -> Any:
    """A module with the tensors of the formula."""
    top = torch.nn.Module()
    for name, array in model().items():
        *path, last = name.split(".")
        inner = top
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, torch.nn.Module())
            inner = getattr(inner, part)
        tensor = torch.from_numpy(array.copy())
        if array.dtype.kind == "i":
            inner.register_buffer(last, tensor)
        else:
            inner.register_parameter(last, torch.nn.Parameter(tensor))
    return top


def shard_two(mesh: Any) -> Any:
    """Under FSDP2, in two groups."""
    made = build()
    fully_shard(made.model.layers, mesh=mesh)
    return fully_shard(made, mesh=mesh)


def save(out: Path, name: str, state: Any) -> None:
    """One file for each rank, as verl names them."""
    where = out / name / "actor"
    where.mkdir(parents=True, exist_ok=True)
    world, rank = dist.get_world_size(), dist.get_rank()
    if rank == 0 or not name.startswith("odd"):
        torch.save(state, where / f"model_world_size_{world}_rank_{rank}.pt")
    if rank == 0:
        (where / "huggingface").mkdir(exist_ok=True)
        (where / "huggingface" / "config.json").write_text("{}\n")
        (where / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}))
    dist.barrier()


def fsdp_one(mesh: Any, strategy: ShardingStrategy) -> Any:
    """The state dict of FSDP1 as verl asks for it."""
    made = FullyShardedDataParallel(
        build(), device_mesh=mesh, sharding_strategy=strategy, device_id=torch.device("cpu"), use_orig_params=False
    )
    with FullyShardedDataParallel.state_dict_type(
        made, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    ):
        return made.state_dict()


def odd(mesh: Any) -> dict[str, Any]:
    """Placements that are refused."""
    whole = torch.arange(16.0).reshape(4, 4)
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = {
        "columns": distribute_tensor(whole, mesh, [Shard(1)]),
        "partial": DTensor.from_local(whole, mesh, [Partial()]),
        "twice": distribute_tensor(whole, two, [Shard(0), Shard(0)]),
        "replicated": distribute_tensor(whole, two, [Replicate(), Replicate()]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.tensor.placement_types import _StridedShard

        local = whole[:2].clone()
        found["strided"] = DTensor.from_local(
            local, mesh, [_StridedShard(0, split_factor=2)], run_check=False, shape=torch.Size((4, 4)), stride=(4, 1)
        )
    return found


def work(rank: int, world: int, out: Path, port: int) -> None:
    """All that a number of processes write together."""
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    save(out, f"fsdp2-{world}", shard_two(mesh).state_dict())
    if world < 4:
        save(out, f"fsdp1-{world}", fsdp_one(mesh, ShardingStrategy.FULL_SHARD))
    if world == 2:
        where = out / "dcp" / "checkpoint-3" / "pytorch_model_fsdp_0"
        dcp.save({"model": shard_two(mesh).state_dict()}, checkpoint_id=str(where))
        write_chunks(out, shard_two(mesh).state_dict())
    if world == 4:
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
        save(out, "hsdp2", shard_two(hybrid).state_dict())
        save(out, "hsdp1", fsdp_one(hybrid, ShardingStrategy.HYBRID_SHARD))
        for name, tensor in odd(mesh).items():
            save(out, f"odd-{name}", {"w": tensor})
    dist.destroy_process_group()


def write_chunks(out: Path, state: Any) -> None:
    """DCP in safetensors, as NeMo-RL and torchtitan write it, where torch can."""
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
    except ImportError:
        return
    where = str(out / "chunks" / "step-3" / "sharded")
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(where, save_distributed=True))


def write_bins(out: Path) -> None:
    """Single torch files."""
    tensors = {}
    for name, array in many_types().items():
        kind = getattr(torch, array.dtype.name)
        tensors[name] = torch.from_numpy(np.asarray(array.astype("f8"))).to(kind)
    tensors["rows"] = torch.from_numpy(values(3, (4, 5)))[:, 1:4]
    (out / "bin").mkdir(parents=True)
    torch.save(tensors, out / "bin" / "pytorch_model.bin")
    two = out / "bins"
    two.mkdir()
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    made = {
        name: torch.nn.Parameter(torch.from_numpy(array), requires_grad=array.dtype.kind == "f")
        for name, array in model().items()
    }
    made["model.embed_tokens.weight"].note = "a parameter with a state"
    parts = [dict(list(made.items())[n::2]) for n in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, two / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    (two / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    small = {"w": torch.ones(2, 3)}
    for name, state, options in (
        ("legacy", small, {"_use_new_zipfile_serialization": False}), ("sparse", {"w": small["w"].to_sparse()}, {}),
        ("columns", {"w": torch.ones(4, 6).t()}, {}), ("trainer", {"model": small, "step": 3}, {}),
        ("module", torch.nn.Linear(2, 2), {}), ("shared", {"w": small["w"], "v": small["w"][1]}, {}),
    ):  # fmt: skip
        (out / name).mkdir()
        torch.save(state, out / name / "pytorch_model.bin", **options)


def main() -> None:
    """Makes them all."""
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    with tempfile.TemporaryDirectory() as made:
        write_bins(Path(made))
        for world, port in ((1, 29511), (2, 29512), (4, 29513)):
            mp.spawn(work, (world, Path(made), port), nprocs=world)
        with tarfile.open(Path(__file__).parent / f"torch-{version}.tar.xz", "w:xz") as tar:
            tar.add(made, ".")


if __name__ == "__main__":
    main()
