"""Makes lora-VERSION.tar.xz with the real libraries: python -m tests.torch_files.make_lora. Needs torch, peft, transformers.

Models with LoRA around them under FSDP, saved as verl's FSDPCheckpointManager asks torch for them (verl 1dda039, read in its
source): the sharded state dict, lora_train_meta.json, and, with save_lora_only, the adapter's tensors alone. Beside each
is what peft makes of the same model: merged.safetensors in float32, merged-bf16.safetensors over the base in bf16.
"""

import functools
import json
import os
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
from transformers.pytorch_utils import Conv1D

LAYERS = ["q_proj", "up_proj"]
#: What LoraConfig gets besides rank and alpha.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LAYERS},
    "more": {"target_modules": [*LAYERS, "embed_tokens"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": LAYERS, "use_dora": True},
    "turned": {"target_modules": ["c_attn", "c_proj"]},
    "ranks": {"target_modules": LAYERS, "rank_pattern": {"q_proj": 2}},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mixed.gate"]},
}


class Layer(torch.nn.Module):  # type: ignore[misc]
    """Linear layers, or those of GPT-2."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "turned":
            self.c_attn, self.c_proj = Conv1D(20, 16), Conv1D(16, 16)
        else:
            self.q_proj, self.up_proj = torch.nn.Linear(16, 9), torch.nn.Linear(16, 17, bias=False)
        if kind == "parameters":
            self.mixed = torch.nn.Module()
            self.mixed.gate = torch.nn.Parameter(torch.zeros(2, 16, 4))
        self.norm = torch.nn.Parameter(torch.ones(16))


class Net(torch.nn.Module):  # type: ignore[misc]
    """Names as of a small Llama. Not smaller: torch sums the smallest products in another way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(13, 16)
        self.model.layers = torch.nn.ModuleList([Layer(kind), Layer(kind)])
        self.lm_head = torch.nn.Linear(16, 13, bias=False)


def build(kind: str, dtype: torch.dtype) -> Any:
    """The model with its adapter: weights that bf16 holds, factors in float32. The same for both types."""
    torch.manual_seed(0)
    net = Net(kind)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16().to(dtype)
    model = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=5, **CASES[kind]))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape)
        elif "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
        elif parameter.requires_grad:
            parameter.data = (parameter.float() + 0.1 * torch.randn(parameter.shape)).bfloat16().to(parameter.dtype)
    return model


def fsdp_one(model: Any, mesh: Any) -> dict[str, Any]:
    """Under FSDP1, with the layers of the adapter in units of their own, as they alone are trained."""

    def trained(module: Any) -> bool:
        leaf = not list(module.named_children()) and getattr(module, "weight", None) is not None
        return bool(leaf and module.weight.requires_grad)

    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=trained),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Layer}),
    ]
    made = FullyShardedDataParallel(
        model, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=False,
        auto_wrap_policy=functools.partial(_or_policy, policies=policies),
    )  # fmt: skip
    with FullyShardedDataParallel.state_dict_type(
        made, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    ):
        return dict(made.state_dict())


def fsdp_two(model: Any, mesh: Any) -> dict[str, Any]:
    """Under FSDP2, layer by layer."""
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return dict(model.state_dict())


def save(out: Path, name: str, kind: str, state: dict[str, Any]) -> None:
    where = out / name / "actor"
    where.mkdir(parents=True, exist_ok=True)
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.save(state, where / f"model_world_size_{world}_rank_{rank}.pt")
    if rank == 0:
        (where / "huggingface").mkdir()
        (where / "huggingface" / "config.json").write_text("{}\n")
        (where / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}, indent=4))
        meta = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
        (where / "lora_train_meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=4))
        write_merged(out / name, kind)
    dist.barrier()


def write_merged(where: Path, kind: str) -> None:
    """What peft makes of it, and the base."""
    for dtype, end in ((torch.float32, ""), (torch.bfloat16, "-bf16")):
        base = Net(kind).to(dtype).state_dict()
        model = build(kind, dtype)
        if not end:
            unwrapped = {
                key.removeprefix("base_model.model.").replace("base_layer.", "").replace("original_module.", ""): value
                for key, value in model.state_dict().items()
            }
            save_file({name: unwrapped[name].bfloat16() for name in base}, where / "base.safetensors")
        try:
            merged = model.merge_and_unload().state_dict()
        except RuntimeError:  # lora_bias of a layer without bias: not to be read either
            continue
        save_file({name: merged[name].to(dtype).contiguous() for name in base}, where / f"merged{end}.safetensors")


def work(rank: int, world: int, out: Path, port: int) -> None:
    """All that a number of processes write together."""
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    if world == 1:
        for kind in CASES:
            save(out, f"{kind}-1", kind, build(kind, torch.float32).state_dict())
    else:
        save(out, f"plain-fsdp1-{world}", "plain", fsdp_one(build("plain", torch.float32), mesh))
        for kind in ("plain", "more", "dora"):
            save(out, f"{kind}-fsdp2-{world}", kind, fsdp_two(build(kind, torch.float32), mesh))
        state = fsdp_two(build("plain", torch.float32), mesh)
        save(out, f"only-fsdp2-{world}", "plain", {key: v for key, v in state.items() if "lora_" in key})
    dist.destroy_process_group()


def main() -> None:
    """Makes them all."""
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    with tempfile.TemporaryDirectory() as made:
        for world, port in ((1, 29521), (2, 29522), (4, 29523)):
            mp.spawn(work, (world, Path(made), port), nprocs=world)
        with tarfile.open(Path(__file__).parent / f"lora-{version}.tar.xz", "w:xz") as tar:
            tar.add(made, ".")


if __name__ == "__main__":
    main()
