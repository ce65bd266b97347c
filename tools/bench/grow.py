"""Make one checkpoint more of a made-up run with the shapes of a model that people train: one at a time, as training does.

usage: python tools/bench/grow.py OUT --model 1.5B --step N

Step 0 writes OUT/base, step N OUT/steps/global_step_N from what the steps before left in OUT/master: float32, as a trainer
holds it. Weights move as those of simulate.py do, with noise of a simpler kind. A step that was cut off is continued.
"""

import argparse
import json
import math
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from simulate import SPEED, to_bits

BLOCK = 1 << 20  # elements
TILE = 1 << 16  # of them worked on at a time: what fits a core's cache
#: layers, hidden, inner, heads' size together, key and value heads' size, biases, norms in the heads, a head tied to the embedding
MODELS = {
    "tiny": (2, 64, 128, 64, 32, True, False, True),
    "1.5B": (28, 1536, 8960, 1536, 256, True, False, True),  # Qwen2.5-Math-1.5B
    "4B": (36, 2560, 9728, 4096, 1024, False, True, True),  # Qwen3-4B
    "8B": (36, 4096, 12288, 4096, 1024, False, True, False),  # Qwen3-8B
}
VOCABULARY = 151_936
HEAD_SIZE = 128


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a model by name."""
    layers, hidden, inner, queries, keys, biases, norms, tied = MODELS[model]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY if model != "tiny" else 512, hidden)}
    for i in range(layers):
        name = f"model.layers.{i}"
        for part, size in (("q", queries), ("k", keys), ("v", keys)):
            found[f"{name}.self_attn.{part}_proj.weight"] = (size, hidden)
            if biases:
                found[f"{name}.self_attn.{part}_proj.bias"] = (size,)
        if norms:
            found |= {f"{name}.self_attn.{part}_norm.weight": (HEAD_SIZE,) for part in "qk"}
        found |= {
            f"{name}.self_attn.o_proj.weight": (hidden, queries),
            f"{name}.mlp.gate_proj.weight": (inner, hidden),
            f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
    found["model.norm.weight"] = (hidden,)
    return found if tied else found | {"lm_head.weight": (VOCABULARY, hidden)}


def blocks(model: dict[str, tuple[int, ...]]) -> Iterator[tuple[int, int, bool]]:
    """First element of each block, how many it has, and whether it stands still, as norms do."""
    first = 0
    for name, shape in model.items():
        last = first + math.prod(shape)
        for at in range(first, last, BLOCK):
            yield at, min(BLOCK, last - at), name.endswith("norm.weight")
        first = last


def header(model: dict[str, tuple[int, ...]]) -> bytes:
    """That of a safetensors file in bf16."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in model.items():
        end = at + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def uniform(values: bytes, rms: float) -> np.ndarray:
    """Bytes as float32 from a uniform distribution about 0."""
    return np.frombuffer(values, np.int8).astype("f4") * np.float32(rms * math.sqrt(3) / 128)


def move(weights: np.ndarray, number: int, step: int) -> None:
    """Take a block's weights one step on: along the direction that the block has, with noise."""
    pull, noise = np.random.default_rng([number]), np.random.default_rng([number, step])
    for first in range(0, len(weights), TILE):
        part = weights[first : first + TILE]
        pulled = uniform(pull.bytes(len(part)), SPEED)
        part += pulled
        part += np.abs(pulled) * uniform(noise.bytes(len(part)), 0.3)


def grow(out: Path, name: str, step: int) -> Path:
    """Write the checkpoint of a step. A block that a call that was cut off has finished is not moved again."""
    model, directory = shapes(name), out / "steps" / f"global_step_{step}" if step else out / "base"
    parts, top = list(blocks(model)), header(model)
    size = sum(count for _, count, _ in parts)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}\n')
    for path, length in ((out / "master", 4 * size), (out / "reached", 4 * len(parts))):
        if not path.exists():
            path.touch()
            os.truncate(path, length)
    master = np.memmap(out / "master", "<f4", "r+")
    reached = np.memmap(
        out / "reached", "<i4", "r+"
    )  # one more than the step that a block stands at; 0 before the base
    partial = directory / "model.partial"
    with open(partial, "r+b" if partial.exists() else "w+b") as file:
        file.write(top)
        file.truncate(len(top) + 2 * size)

        def work(number: int) -> None:
            first, count, still = parts[number]
            weights = master[first : first + count]
            if reached[number] == step + 1:
                pass
            elif not step:
                rng = np.random.default_rng([number, 0])
                weights[:] = 1 if still else np.float32(0.02) * rng.standard_normal(count, "f4")
            elif not still:
                move(weights, number, step)
            os.pwrite(file.fileno(), to_bits(weights, "bf16").tobytes(), len(top) + 2 * first)
            reached[number] = step + 1

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(work, range(len(parts))))
    partial.rename(directory / "model.safetensors")
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--step", type=int, required=True)
    chosen = parser.parse_args()
    print(grow(chosen.out, chosen.model, chosen.step))


if __name__ == "__main__":
    main()
