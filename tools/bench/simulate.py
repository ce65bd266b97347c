"""Write a made-up RLVR run with the shapes of a Qwen2 model: base and checkpoints, as training would save them.

usage: python tools/bench/simulate.py OUT [--layers 12] [--hidden 512] [--steps 40] [--dtype bf16] [--cadence 1] [--shards 1]

Weights move as RLVR moves them: float32 master weights along one direction a tensor at a constant speed, with noise,
and what is saved is rounded. At the default speed about a quarter of the bf16 elements differ after 75 steps.
"""

import argparse
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

SPEED = 4e-7  # of one element and step, root mean square


def shapes(layers: int, hidden: int, vocabulary: int, tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a Qwen2 model with grouped key and value heads."""
    kv, inner = max(hidden // 4, 1), hidden * 8 // 3 // 16 * 16
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        name = f"model.layers.{i}"
        found |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (hidden, hidden),
            f"{name}.self_attn.q_proj.bias": (hidden,),
            f"{name}.self_attn.k_proj.weight": (kv, hidden),
            f"{name}.self_attn.k_proj.bias": (kv,),
            f"{name}.self_attn.v_proj.weight": (kv, hidden),
            f"{name}.self_attn.v_proj.bias": (kv,),
            f"{name}.self_attn.o_proj.weight": (hidden, hidden),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.mlp.gate_proj.weight": (inner, hidden),
            f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
        }
    found["model.norm.weight"] = (hidden,)
    if not tied:
        found["lm_head.weight"] = (vocabulary, hidden)
    return found


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to the saved type's bits, to nearest even."""
    if dtype == "f32":
        return values.view("<u4")
    if dtype == "f16":
        return values.astype("<f2").view("<u2")
    bits = values.view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def simulate(
    out: Path,
    model: dict[str, tuple[int, ...]],
    steps: list[int],
    dtype: str = "bf16",
    shards: int = 1,
    speed: float = SPEED,
) -> None:
    """Write ``out/base`` and ``out/steps/global_step_N`` for every step."""
    directories = {0: out / "base"} | {step: out / "steps" / f"global_step_{step}" for step in steps}
    names = list(model)
    parts = [names[i::shards] for i in range(shards)]
    files = (
        [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    for directory in directories.values():
        directory.mkdir(parents=True)
        (directory / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}\n')
        if shards > 1:
            weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            (directory / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": weight_map})
            )
    for file, part in zip(files, parts, strict=True):
        _write_shard(
            {step: directory / file for step, directory in directories.items()},
            {n: model[n] for n in part},
            dtype,
            speed,
        )


def _write_shard(paths: dict[int, Path], model: dict[str, tuple[int, ...]], dtype: str, speed: float) -> None:
    item, at = (4 if dtype == "f32" else 2), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in model.items():
        end = at + item * int(np.prod(shape))
        header[name] = {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        files = {step: stack.enter_context(open(path, "wb", buffering=0)) for step, path in paths.items()}
        for file in files.values():
            file.write(struct.pack("<Q", len(text)) + text)
        places = (8 + len(text) + header[name]["data_offsets"][0] for name in model)
        list(pool.map(partial(_write_tensor, files, dtype, speed), count(), model.items(), places))


def _write_tensor(
    files: dict[int, FileIO], dtype: str, speed: float, number: int, tensor: tuple[str, tuple[int, ...]], at: int
) -> None:
    name, shape = tensor
    rng, still = np.random.default_rng(number), name.endswith("norm.weight")
    for first in range(0, int(np.prod(shape)), 1 << 20):
        size = min(1 << 20, int(np.prod(shape)) - first)
        weight = np.ones(size, "f4") if still else 0.02 * rng.standard_normal(size, "f4")
        pull = speed * rng.standard_normal(size, "f4") * (not still)
        last = 0
        for step, file in files.items():
            noise = rng.standard_normal(size, "f4")
            weight += pull * np.float32(step - last) + np.float32(0.3 * (step - last) ** 0.5) * np.abs(pull) * noise
            last = step
            bits = to_bits(weight, dtype)
            os.pwrite(file.fileno(), bits.tobytes(), at)
        at += bits.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cadence", type=int, default=1)
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16")
    parser.add_argument("--shards", type=int, default=1)
    chosen = parser.parse_args()
    model = shapes(chosen.layers, chosen.hidden, chosen.vocabulary)
    steps = [chosen.cadence * (i + 1) for i in range(chosen.steps)]
    simulate(chosen.out, model, steps, chosen.dtype, chosen.shards)
    print(f"{chosen.out}: {sum(int(np.prod(s)) for s in model.values()):,} parameters, {chosen.steps} steps")


if __name__ == "__main__":
    main()
