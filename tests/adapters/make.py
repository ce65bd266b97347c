"""Make tests/adapters with the real peft: ``python tests/adapters/make.py``. Needs torch, transformers, peft.

Each case has the adapter as peft saved it, and as ``merged/CASE.safetensors`` what peft makes of the directory and the base:
``PeftModel.from_pretrained(base, directory).merge_and_unload()``. The weights are random, so none of the factors is 0.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
#: By name: the base, the type of the factors, and what LoraConfig gets.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("llama-bf16", "float32", {"target_modules": LAYERS, "r": 4}),
    "bf16": ("llama-bf16", "bfloat16", {"target_modules": LAYERS, "r": 4, "lora_alpha": 5}),
    "fp32": ("llama-f32", "float32", {"target_modules": LAYERS, "r": 6, "lora_alpha": 3}),
    "f16": ("llama-f16", "float32", {"target_modules": "all-linear", "r": 3}),
    "patterns": (
        "llama-bf16", "float32",
        {"target_modules": LAYERS, "r": 3, "use_rslora": True, "rank_pattern": {"q_proj": 5, "layers.0.mlp.up_proj": 2},
         "alpha_pattern": {"self_attn.v_proj": 13, r"mlp\..*": 7}},
    ),
    "whole": ("llama-bf16", "float32", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"], "r": 2}),
    "embeddings": ("llama-bf16", "float32", {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4}),
    "bias": ("gpt2", "float32", {"target_modules": ["c_attn", "c_fc"], "bias": "all", "fan_in_fan_out": True, "r": 4}),
    "conv1d": ("gpt2", "float32", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4}),
    "dora": ("llama-bf16", "float32", {"target_modules": LAYERS, "r": 4, "use_dora": True}),
    "dora-bf16": ("llama-bf16", "bfloat16", {"target_modules": ["q_proj", "lm_head"], "r": 4, "use_dora": True}),
    "dora-fp32": (
        "llama-f32", "float32",
        {"target_modules": LAYERS, "r": 3, "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 5}},
    ),
    "dora-f16": ("llama-f16", "float32", {"target_modules": "all-linear", "r": 3, "use_dora": True}),
}  # fmt: skip


def base_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    else:
        config = transformers.LlamaConfig(
            vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, tie_word_embeddings=False,
        )  # fmt: skip
    dtype = {"f32": torch.float32, "f16": torch.float16}.get(kind.rpartition("-")[2], torch.bfloat16)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def make_adapter(base: Path, out: Path, factors: str, seed: int, given: dict[str, Any]) -> None:
    """An adapter of random weights, saved by peft."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = peft.get_peft_model(model, peft.LoraConfig(**given))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data = (parameter * (1 + 0.1 * torch.randn(parameter.shape))).to(getattr(torch, factors))
        elif "lora_" in name:
            parameter.data = (0.2 * torch.randn(parameter.shape)).to(getattr(torch, factors))
        elif parameter.requires_grad:
            parameter.data += (0.1 * torch.randn(parameter.shape)).to(parameter.dtype)
    model.save_pretrained(out)
    (out / "README.md").unlink()
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base.name}, indent=2))


def merge(base: Path, adapter: Path) -> dict[str, Any]:
    """The tensors of the merged model that the base has, by the base's names."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return {name: merged[name].contiguous() for name in load_file(base / "model.safetensors")}


def main() -> None:
    for directory in (path for path in HERE.iterdir() if path.is_dir()):
        shutil.rmtree(directory)
    for seed, (name, (kind, factors, given)) in enumerate(CASES.items()):
        base, out = HERE / kind, HERE / name
        if not base.exists():
            base_model(kind).save_pretrained(base)
            (base / "generation_config.json").unlink(missing_ok=True)
        make_adapter(base, out, factors, seed, given)
        (HERE / "merged").mkdir(exist_ok=True)
        save_file(merge(base, out), HERE / "merged" / f"{name}.safetensors")
    print(f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
