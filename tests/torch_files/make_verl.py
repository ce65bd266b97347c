"""Makes verl-VERSION.tar.xz with the real libraries: python tests/torch_files/make_verl.py. Needs verl, torch, peft.

A small Qwen2 is trained a step, put under FSDP by verl's own functions in two gloo processes, and saved by verl's
FSDPCheckpointManager; with LoRA, as verl builds it, too. Beside them is what ``verl.model_merger`` makes of the shards, or
peft where there is LoRA. Of verl's dependencies this needs a few: pip install --no-deps verl ray tensordict omegaconf
codetiming orjson pyvers protobuf antlr4-python3-runtime==4.9.3
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_wrap_policy

#: The version of FSDP, and options. On CPUs torch cannot put together what FSDP1 has sharded, as "hf_model" asks.
CASES: dict[str, tuple[int, set[str]]] = {
    "fsdp1": (1, set()), "fsdp2": (2, {"hf_model"}), "tied": (2, {"hf_model", "tied"}),
    "lora-fsdp1": (1, {"lora"}), "lora-fsdp2": (2, {"lora"}), "lora-hf": (2, {"lora", "hf_model"}),
    "lora-only": (2, {"lora", "only"}),
}  # fmt: skip


def build(out: Path, tied: bool) -> None:
    """The base, in bf16, and a tokenizer, which verl's merger asks for."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(out)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(13)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(out)


def trained(base: Path, lora: bool) -> Any:
    """The model in float32, a step of training away from its base; the same in all processes."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    if lora:
        model.enable_input_require_grads()
        options = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": "all-linear", "bias": "none"}
        model = get_peft_model(model, LoraConfig(**options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = torch.arange(8)[None] % 13
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model


def work(rank: int, out: Path, port: int) -> None:
    """Save each case."""
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    for case, (fsdp, options) in CASES.items():
        base, lora = out / ("base-tied" if "tied" in options else "base"), "lora" in options
        model = trained(base, lora)
        if rank == 0 and lora:
            merged = trained(base, lora).merge_and_unload().state_dict()
            (out / "merged").mkdir(exist_ok=True)
            save_file(merged, out / "merged" / f"{case}.safetensors")
        if fsdp == 1:
            policy = get_fsdp_wrap_policy(model, is_lora=lora)
            model = FullyShardedDataParallel(
                model, auto_wrap_policy=policy, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=False
            )
        else:
            apply_fsdp2(model, {"mesh": mesh}, {})
        config = CheckpointConfig(save_contents=["model", *options & {"hf_model"}], save_lora_only="only" in options)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        manager = FSDPCheckpointManager(model, processing_class=tokenizer, checkpoint_config=config)
        manager.save_checkpoint(str(out / case / "global_step_1" / "actor"), global_step=1)
    dist.destroy_process_group()


def main() -> None:
    """Makes them all."""
    with tempfile.TemporaryDirectory() as made:
        out = Path(made)
        build(out / "base", False)
        build(out / "base-tied", True)
        mp.spawn(work, (out, 29541), nprocs=2)
        for case in (case for case, (_, options) in CASES.items() if "lora" not in options):
            actor = out / case / "global_step_1" / "actor"
            command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
            subprocess.run([*command, "--local_dir", actor, "--target_dir", out / "merger" / case], check=True)
        for file in [*out.glob("**/tokenizer*"), *out.glob("**/special_tokens_map.json")]:
            file.unlink()
        with tarfile.open(Path(__file__).parent / f"verl-{version('verl')}.tar.xz", "w:xz") as tar:
            tar.add(made, ".")


if __name__ == "__main__":
    main()
