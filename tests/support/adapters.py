"""Adapters that the real peft wrote, and what it made of them (tests/adapters/make.py), for tests."""

import shutil
from pathlib import Path

import numpy as np

from relexio.checkpoints.layout import open_checkpoint
from relexio.checkpoints.protocol import Checkpoint
from relexio.engine.resources import Resources
from relexio.progress import silent
from relexio.store.store import Store
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.restore import restore
from tests.support.make import BF16, Tensors, load_file
from tests.support.steps import CPU

CORPUS = Path(__file__).parents[1] / "adapters"
BASES = {
    "plain": "llama-bf16", "bf16": "llama-bf16", "fp32": "llama-f32", "f16": "llama-f16", "patterns": "llama-bf16",
    "whole": "llama-bf16", "embeddings": "llama-bf16", "bias": "gpt2", "conv1d": "gpt2",
    "dora": "llama-bf16", "dora-bf16": "llama-bf16", "dora-fp32": "llama-f32", "dora-f16": "llama-f16",
}  # fmt: skip
#: Steps of a run over one base.
RUN = {1: "plain", 2: "bf16", 5: "patterns", 9: "whole"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLACES = ("checkpoint-{}", "global_step_{}/actor/lora_adapter")
Q = "model.layers.0.self_attn.q_proj"


def merged(case: str) -> Tensors:
    """What peft made of a case, in the base's types (it leaves modules_to_save in fp32)."""
    base = load_file(CORPUS / BASES[case] / "model.safetensors")
    return {
        name: w.astype(base[name].dtype) for name, w in load_file(CORPUS / "merged" / f"{case}.safetensors").items()
    }


def over(adapter: Path, base: Path) -> Checkpoint:
    return open_checkpoint(adapter, 1).over(open_checkpoint(base))


def whole(checkpoint: Checkpoint) -> Tensors:
    """All tensors of a checkpoint, each read at once."""
    types = {"BF16": BF16, "F16": np.dtype("f2"), "F32": np.dtype("f4")}
    found = {}
    for name, (dtype, shape) in checkpoint.tensors.items():
        found[name] = np.empty(shape, types[dtype])
        checkpoint.read(name, 0, found[name].reshape(-1).view(np.uint8).data)
    return found


def same(found: Tensors, wanted: Tensors) -> None:
    assert list(found) == list(wanted)
    assert not [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()]


def run_of(root: Path, place: str = PLACES[0], steps: dict[int, str] = RUN) -> Path:
    """A run of adapters as trainers lay them out, with a base beside it."""
    shutil.copytree(CORPUS / "llama-bf16", root / "base", dirs_exist_ok=True)
    for step, case in steps.items():
        directory = root / "run" / place.format(step)
        shutil.copytree(CORPUS / case, directory)
        (directory / "tokenizer.json").write_text("{}")
        (directory / "ref").mkdir()  # TRL keeps the adapter that it began from
        shutil.copy(CORPUS / case / CONFIG, directory / "ref")
        if directory.parent.name == "actor":  # verl: no weights there
            (directory.parent / "huggingface").mkdir()
            (directory.parent / "huggingface" / "config.json").write_text("{}")
        (directory / "optimizer.pt").write_bytes(bytes(100))
    return root / "run"


def store_adapters(out: Path, root: Path | None, base: Path | None, resources: Resources = CPU, **named: Path) -> Store:
    steps = {int(name[1:]): path for name, path in named.items()}
    return convert(prepare(Request(out, base, root, steps), resources, silent), silent).store


def back(store: Store, step: int, out: Path) -> Tensors:
    restore(store, step, out, CPU, silent)
    return load_file(out / "model.safetensors")
