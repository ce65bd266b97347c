"""The whole weights of a torch model that is being trained: unsharded, adapters merged, by the names of its files.

Every rank of a distributed run must take the same steps: ``weights_of``, then ``gathered`` to its end. Run here with plain
tensors, FSDP2 and FSDP1 (gloo). DeepSpeed ZeRO-3 is written after its documentation and has not been run.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from relexio.errors import CheckpointError

_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(r"(?:module\.|base_model\.model\.)*")
_OF_ADAPTER = re.compile(r"(?P<path>.+?)\.(?P<kind>base_layer|original_module|modules_to_save|lora_\w+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Weight:
    """One tensor of a model, under every name that it has (a tied tensor has more than one), of a shape when it is whole.

    It is made of ``parts``, which may be sharded, by ``join``, which gets them whole. Nothing is changed in the model.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[Any, ...]
    join: Callable[..., Any]


def weights_of(model: Any) -> list[Weight]:
    """All that the model's file would hold, in the order in which it must be gathered. On all ranks: FSDP1 takes part.

    Raises CheckpointError, naming the layer, for an adapter that is not merged here as PEFT merges it.
    """
    layers, state = _adapter_layers(model), _state(model)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    found = []
    for first, *others in names.values():
        placed = _placed(first, layers)
        if others and any(_placed(name, layers) != (name, ()) for name in (first, *others)):
            raise CheckpointError(
                f"the model: {first} has an adapter (or is in modules_to_save) and is tied to {others[0]}, which would not "
                f"be the same after merging; leave it out of the adapter, or untie the model"
            )
        if placed is not None:
            name, adapters = placed
            factors = [state[factor] for factor in _factors(first, layers, adapters)]
            join = partial(_merged, layers[name.rpartition(".")[0]], adapters) if adapters else _itself
            found.append(Weight((name, *others), _shape(state[first]), (state[first], *factors), join))
    return found


def gathered(weights: Iterable[Weight]) -> Iterator[tuple[Weight, list[Any]]]:
    """Each weight with its parts, whole on rank 0, one weight at a time; they are valid until the next is asked for."""
    for weight in weights:
        with _whole(weight.parts) as parts:
            yield weight, parts


def _state(model: Any) -> dict[str, Any]:
    """The model's tensors by clean name. FSDP1 unshards one unit at a time, and copies this rank's shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        with fsdp.FullyShardedDataParallel.state_dict_type(model, fsdp.StateDictType.SHARDED_STATE_DICT):
            state = model.state_dict()
    else:
        state = model.state_dict(keep_vars=True)  # the parameters themselves: ties show, and DeepSpeed's have an id
    return {_clean(name): tensor for name, tensor in state.items()}


def _clean(name: str) -> str:
    """A name without what wrappers put into it."""
    name = _WRAPPERS.sub("", f"{name}.").removesuffix(".")
    return name[_OUTER.match(name).end() :]  # type: ignore[union-attr]  # it matches everything


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.ds_shape if hasattr(tensor, "ds_shape") else tensor.size())


@contextmanager
def _whole(parts: tuple[Any, ...]) -> Iterator[list[Any]]:
    if any(hasattr(part, "ds_id") for part in parts):  # DeepSpeed ZeRO-3: not run
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parts)):
            yield [part.detach() for part in parts]
    else:
        yield [_gather(part) for part in parts]


def _gather(tensor: Any) -> Any:
    if hasattr(tensor, "full_tensor"):  # a DTensor: FSDP2, tensor parallel
        return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    if not hasattr(tensor, "local_shards"):
        return tensor.detach()
    from torch import distributed, empty  # a ShardedTensor: FSDP1

    ranks = distributed.get_process_group_ranks(tensor._process_group)
    first = distributed.get_rank() == 0
    whole = empty(tensor.size(), dtype=tensor.dtype, device=tensor._get_preferred_device()) if first else None
    if ranks[0] == 0:  # with HYBRID_SHARD there are groups that have it all, too, and rank 0 is in one
        tensor.gather(0, whole, dtype=tensor.dtype)
    return whole


# --- adapters of PEFT ------------------------------------------------------------------------------------------------


def _adapter_layers(model: Any) -> dict[str, Any]:
    """The modules of PEFT in a model by clean name. Raises CheckpointError for one that cannot be merged here."""
    if "peft" not in sys.modules:
        return {}
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, PeftModel):
            others = [kind for name in module.active_adapters if (kind := module.peft_config[name].peft_type) != "LORA"]
            if others:
                raise CheckpointError(f"the model: an adapter of type {others[0].value} is not recorded; only LoRA is")
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if reason := _unmergeable(module):
                raise CheckpointError(f"the model: {_clean(path)}: {reason} is not recorded; only plain LoRA is")
            found[_clean(path)] = module
    return found


def _kind(module: Any) -> Any:
    """The class that PEFT gave a module; FSDP2 makes a subclass of it."""
    return next(kind for kind in type(module).__mro__ if kind.__module__.startswith("peft."))


def _unmergeable(module: Any) -> str | None:
    """Why a module of PEFT cannot be merged here, by name."""
    from peft.tuners.lora import Embedding, Linear
    from peft.utils.other import ModulesToSaveWrapper

    kind = _kind(module)
    if kind is ModulesToSaveWrapper:
        return None
    if kind not in (Linear, Embedding):
        return f"{kind.__module__.removeprefix('peft.')}.{kind.__name__}"
    if module.merged:
        return "an adapter that is merged already"
    for adapter in module.active_adapters:
        if adapter in module.lora_variant:
            return type(module.lora_variant[adapter]).__name__
        if module.lora_bias.get(adapter):
            return "lora_bias"
    return None


def _placed(name: str, layers: dict[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """The name that a tensor has after merging, and the adapters that are added to it; None for what goes."""
    found = _OF_ADAPTER.fullmatch(name)
    if found is None or found["path"] not in layers:
        return name, ()
    layer, kind, rest = layers[found["path"]], found["kind"], found["rest"]
    merged = f"{found['path']}.{rest}"
    if kind == "base_layer":
        adapters = layer.lora_A.keys() | layer.lora_embedding_A.keys()
        return merged, tuple(name for name in layer.active_adapters if name in adapters and rest == "weight")
    if kind == "modules_to_save" and (of := next((a for a in layer.active_adapters if rest.startswith(f"{a}.")), None)):
        return f"{found['path']}.{rest.removeprefix(f'{of}.')}", ()
    return (merged, ()) if kind == "original_module" and not layer.active_adapters else None


def _factors(name: str, layers: dict[str, Any], adapters: tuple[str, ...]) -> Iterator[str]:
    """The names of A and B of each adapter of a base layer's weight."""
    path = name.removesuffix(".base_layer.weight")
    for adapter in adapters:
        linear = adapter in layers[path].lora_A
        for factor in "AB":
            yield f"{path}.lora_{factor}.{adapter}.weight" if linear else f"{path}.lora_embedding_{factor}.{adapter}"


def _itself(tensor: Any) -> Any:
    return tensor


def _merged(layer: Any, adapters: tuple[str, ...], base: Any, *factors: Any) -> Any:
    """The weight that PEFT's ``merge`` would leave in the layer, bit for bit. PEFT's own function makes the difference."""
    merged = base.clone()
    for adapter, a, b in zip(adapters, factors[::2], factors[1::2], strict=True):
        alone = SimpleNamespace(
            lora_A={adapter: SimpleNamespace(weight=a)}, lora_B={adapter: SimpleNamespace(weight=b)},
            lora_embedding_A={adapter: a}, lora_embedding_B={adapter: b},
            scaling=layer.scaling, fan_in_fan_out=getattr(layer, "fan_in_fan_out", False),
        )  # fmt: skip
        difference = _kind(layer).get_delta_weight(alone, adapter)
        # PEFT rounds the difference for an embedding only.
        merged += difference.to(base.dtype) if adapter in layer.lora_embedding_A else difference
    return merged
