"""Adapters that are not merged are refused by name, with what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relexio.errors import CheckpointError, IncompleteError
from tests.support.adapters import CONFIG, CORPUS, WEIGHTS, Q, over, store_adapters
from tests.support.make import Tensors, load_file, save_checkpoint, save_file

Spoil = Callable[[Path], object]


def config(**changed: Any) -> Spoil:
    """The configuration with some values changed."""

    def spoil(adapter: Path) -> None:
        file = adapter / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return spoil


def tensors(change: Callable[[Tensors], object]) -> Spoil:
    """The adapter's tensors changed."""

    def spoil(adapter: Path) -> None:
        found = dict(load_file(adapter / WEIGHTS))
        change(found)
        save_file(adapter / WEIGHTS, found)

    return spoil


A, B = (f"base_model.model.{Q}.lora_{factor}.weight" for factor in "AB")
ZEROS = np.zeros((24, 16), np.float32)
#: What is refused, and words that the error must have.
REFUSED: dict[str, tuple[Spoil, list[str]]] = {
    **{
        name: (config(init_lora_weights=name), ["init_lora_weights", name, "path_initial_model"])
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica")
    },
    **{
        name: (config(**{name: value}), [name, "merge_and_unload"])
        for name, value in {
            "use_qalora": True, "use_bdlora": {"nblocks": 2}, "layer_replication": [[0, 1]],
            "target_parameters": ["experts.w"], "lora_bias": True, "trainable_token_indices": [1], "arrow_config": {"a": 1},
            "alora_invocation_tokens": [1], "ensure_weight_tying": True, "of_a_later_peft": 1,
        }.items()
    },
    "another type": (config(peft_type="IA3"), ["IA3", "not LORA"]),
    "a rank that is none": (config(r=0), ["a rank is not"]),
    "an alpha that is none": (config(lora_alpha="8"), ["an alpha is not"]),
    "a pattern that is none": (config(rank_pattern={"(": 4}), [CONFIG]),
    "another rank": (config(r=5), ["rank 5", CONFIG]),
    "no JSON": (lambda a: (a / CONFIG).write_text("{"), [CONFIG, "JSON"]),
    "only A": (tensors(lambda t: t.pop(B)), [Q, "only one of"]),
    "factors of one shard": (tensors(lambda t: t.update({A: t[A][:2], B: t[B][:, :2]})), [Q, "gather"]),
    "a factor that is no matrix": (tensors(lambda t: t.update({A: t[A][None]})), [Q, "no factors"]),
    "factors of integers": (tensors(lambda t: t.update({A: t[A].astype(np.int64)})), [A, "I64"]),
    "a model of another width": (tensors(lambda t: t.update({A: t[A][:, :8]})), [Q, "[16, 8]", "is this the base"]),
    "a tensor of another shape": (
        tensors(lambda t: t.update({"base_model.model.model.norm.weight": ZEROS})), ["norm", "[24, 16]", "is this the base"],
    ),
    "a layer that the base lacks": (
        tensors(lambda t: t.update({A.replace("layers.0", "layers.1"): t[A], B.replace("layers.0", "layers.1"): t[B]})),
        ["model.layers.1.self_attn.q_proj.weight", "lacks"],
    ),
    "names without prefix": (tensors(lambda t: t.update({"x": ZEROS})), ["tensor x", "base_model.model."]),
    "nothing": (tensors(lambda t: t.clear()), ["no tensor"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_merged_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    spoil, words = REFUSED[kind]
    adapter = Path(shutil.copytree(CORPUS / "plain", tmp_path / "checkpoint-1"))
    spoil(adapter)
    with pytest.raises(CheckpointError) as error:
        over(adapter, CORPUS / "llama-bf16")
    assert str(adapter) in str(error.value) and not [word for word in words if word not in str(error.value)], (
        error.value
    )


def test_an_adapter_that_changes_nothing_is_the_base(tmp_path: Path) -> None:
    """As the first one that a trainer saves may be: B begins as zeros."""
    adapter = Path(shutil.copytree(CORPUS / "plain", tmp_path / "run" / "checkpoint-1"))
    tensors(lambda t: t.update({name: 0 * array for name, array in t.items() if "lora_B" in name}))(adapter)
    with pytest.raises(CheckpointError, match=r"step 1 .* is the base itself \(bit for bit\)"):
        store_adapters(tmp_path / "run.zarr", tmp_path / "run", CORPUS / "llama-bf16")


def test_an_adapter_without_its_configuration_is_incomplete(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(CORPUS / "plain", tmp_path / "checkpoint-1"))
    (adapter / CONFIG).unlink()
    with pytest.raises(IncompleteError, match=CONFIG):
        over(adapter, CORPUS / "llama-bf16")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="save_file"):
        over(adapter, CORPUS / "llama-bf16")


def test_a_tied_head_or_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = load_file(CORPUS / "llama-bf16" / "model.safetensors")
    tied = {"config.json": json.dumps({"tie_word_embeddings": True})}
    without = {name: array for name, array in base.items() if name != "lm_head.weight"}
    for number, (case, found, side) in enumerate(
        [("embeddings", without, {}), ("whole", without, {}), ("embeddings", base, tied), ("whole", base, tied)]
    ):
        path = save_checkpoint(tmp_path / str(number), found, side=side)
        with pytest.raises(CheckpointError, match="tied"):
            over(CORPUS / case, path)
        over(CORPUS / "plain", path)
    renamed = {name: array for name, array in base.items() if name != f"{Q}.weight"} | {
        f"{Q}.qweight": np.zeros(9, "i4")
    }
    for number, found in enumerate(({**base, f"{Q}.weight": np.zeros((16, 8), np.uint8)}, renamed)):
        with pytest.raises(CheckpointError, match="quantized"):
            over(CORPUS / "plain", save_checkpoint(tmp_path / f"packed-{number}", found))


def test_a_square_layer_of_which_nothing_tells_how_it_is_stored_is_refused(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(CORPUS / "conv1d", tmp_path / "checkpoint-1"))
    config(fan_in_fan_out=False)(adapter)
    with pytest.raises(CheckpointError, match=r"attn\.c_proj\.weight: whether it is stored transposed"):
        over(adapter, CORPUS / "gpt2")
