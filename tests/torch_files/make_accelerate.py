"""Makes accelerate-VERSION.tar.xz with the real libraries: python -m tests.torch_files.make_accelerate. Needs accelerate.

A small Qwen2 in bf16 is trained for two steps by two gloo processes under accelerate's FSDP, and each step is saved by
``Accelerator.save_state``. On CPUs accelerate puts DDP around a model, whatever its plugin says; here its state is told that it
runs FSDP, and all that follows is its own. Beside each step is what ``accelerate merge-weights`` makes of its shards.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import accelerate
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

#: The version of FSDP, and what it saves. transformers names its steps so; it adds files of its own to them.
CASES = {"fsdp2": (2, "SHARDED_STATE_DICT"), "fsdp1": (1, "SHARDED_STATE_DICT"), "fsdp2-full": (2, "FULL_STATE_DICT")}
FOLDER = "pytorch_model_fsdp_0"


def build(out: Path) -> None:
    """The base."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=16,
    )  # fmt: skip
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(out)


def accelerator(case: str) -> accelerate.Accelerator:
    """One that runs FSDP on a CPU."""
    version, kind = CASES[case]
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=version, state_dict_type=kind, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    made = accelerate.Accelerator(cpu=True, mixed_precision="bf16", fsdp_plugin=plugin)
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(distributed_type=accelerate.DistributedType.FSDP, device=torch.device("cpu"))
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    plugin.set_mixed_precision("bf16")
    return made


def work(rank: int, out: Path, case: str, port: int) -> None:
    """Train, and save each step."""
    warnings.filterwarnings("ignore")
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    trainer = accelerator(case)
    model = Qwen2ForCausalLM.from_pretrained(out / "base", dtype=torch.bfloat16)
    if case == "fsdp1":  # it has other parameters than the model
        model = trainer.prepare(model)
        optimizer = trainer.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    else:
        model, optimizer = trainer.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    tokens = torch.arange(8)[None] % 13
    for step in (1, 2):
        trainer.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        trainer.save_state(str(out / case / f"checkpoint-{step}"))
    trainer.end_training()


def merge(step: Path, out: Path) -> None:
    """The model that accelerate makes of its shards; torch's own reading of a state that is whole."""
    if (step / FOLDER).is_dir():
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "merge-weights"]
        subprocess.run([*command, str(step / FOLDER), str(out)], check=True)
    else:
        out.mkdir()
        save_file(torch.load(step / f"{FOLDER[:-2]}.bin"), out / "model.safetensors")


def main() -> None:
    """Makes them all."""
    version = ".".join(accelerate.__version__.split(".")[:2])
    with tempfile.TemporaryDirectory() as made:
        out = Path(made)
        build(out / "base")
        for port, case in enumerate(CASES, 29531):
            mp.spawn(work, (out, case, port), nprocs=2)
            (out / "merged" / case).mkdir(parents=True)
            for step in (out / case).glob("checkpoint-*"):
                merge(step, out / "merged" / case / step.name)
        with tarfile.open(Path(__file__).parent / f"accelerate-{version}.tar.xz", "w:xz") as tar:
            tar.add(made, ".")


if __name__ == "__main__":
    main()
