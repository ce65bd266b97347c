"""What ``adapter_config.json`` of a LoRA adapter says of merging it: ranks and scalings. All that would change it is refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from relexio.checkpoints.converters import peft_merger
from relexio.checkpoints.files import inside, is_file
from relexio.checkpoints.header import parse_json
from relexio.errors import CheckpointError, IncompleteError

CONFIG = "adapter_config.json"
_MOST = 1 << 20  # bytes
_WHOLE = r"(.*\.)?({})$"
_SCALINGS = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
#: What chooses layers, or counts in training only, or where the keys above say all that it led to.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
#: Beginnings of A and B that leave the base as it is. Others (pissa, olora, corda, loftq, lora_ga) take them out of it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraConfig:
    """How strongly the adapter of each module counts. ``transposed``: the weights of its layers are stored [in, out];
    ``dora``: each output has a magnitude."""

    r: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    transposed: bool
    dora: bool

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return self.ranks.get(_pattern(self.ranks, module), self.r)

    def scaling(self, module: str) -> float:
        """The factor of its product B A."""
        rank, alpha = self.rank(module), self.alphas.get(_pattern(self.alphas, module), self.alpha)
        return alpha / sqrt(rank) if self.rslora else alpha / rank


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that fits, as PEFT chooses it (``get_pattern_key``)."""
    return next((key for key in patterns if re.match(_WHOLE.format(key), module)), "")


def read_config(directory: Path, step: int) -> LoraConfig:
    """Read the configuration of the adapter of a step, in a directory.

    Raises IncompleteError if there is none yet, CheckpointError naming what makes of it another model than LoRA or DoRA do.
    """
    file = directory / CONFIG
    if not is_file(file):
        raise IncompleteError(f"{directory}: holds an adapter and no {CONFIG}; copy it again, with its configuration")
    if file.stat().st_size > _MOST:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes, more than any configuration has; copy it again")
    value, merge = parse_json(inside(directory, file).read_bytes(), file), peft_merger(directory, step)
    if value.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: an adapter of type {str(value.get('peft_type'))[:40]}, not LORA; {merge}")
    init = value.get("init_lora_weights", True)
    if init not in _INITS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {str(init)[:40]}, which changes the base before training; save the adapter as one "
            f"of the unchanged base (peft: save_pretrained with path_initial_model_for_weight_conversion), or {merge}"
        )
    for name in sorted(value.keys() - _SCALINGS - _HARMLESS):
        if value[name]:  # strict, since a key that is not known may mean any arithmetic
            raise CheckpointError(f"{file}: {name[:40]} is set, and is not known to merge as LoRA or DoRA do; {merge}")
    if value.get("lora_alpha") == 0:
        raise CheckpointError(f"{file}: lora_alpha is 0, as verl's merger writes it; set it to that of training")
    try:
        return _checked(value)
    except (ValueError, re.error) as error:
        raise CheckpointError(f"{file}: {error}; save the adapter again with peft") from error


def _checked(value: dict[str, Any]) -> LoraConfig:
    """The keys that count. Raises ValueError or re.error for values that PEFT does not write."""
    ranks, alphas = (value.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise ValueError("rank_pattern and alpha_pattern are not objects")
    for pattern in (*ranks, *alphas):
        re.compile(_WHOLE.format(pattern))
    if not all(type(rank) is int and rank > 0 for rank in (value.get("r"), *ranks.values())):
        raise ValueError("a rank is not a number above 0")
    if not all(
        type(alpha) in (int, float) and isfinite(alpha) for alpha in (value.get("lora_alpha"), *alphas.values())
    ):
        raise ValueError("an alpha is not a number")
    rslora, transposed, dora = (value.get(name) or False for name in ("use_rslora", "fan_in_fan_out", "use_dora"))
    if not all(isinstance(flag, bool) for flag in (rslora, transposed, dora)):
        raise ValueError("use_rslora, fan_in_fan_out and use_dora are not true or false")
    return LoraConfig(value["r"], value["lora_alpha"], rslora, ranks, alphas, transposed, dora)
