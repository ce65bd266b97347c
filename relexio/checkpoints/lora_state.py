"""State dicts of a model that PEFT has put LoRA around, as verl's checkpoints hold them, read as the merged model.

A layer is there as ``MODULE.base_layer.weight``, ``MODULE.lora_A.default.weight`` and so on, below ``base_model.model.``: in
FSDP shards, and in what verl calls the ``hf_model``. The base's weights come from there too, unless only the adapter's were
saved (``save_lora_only``). verl writes rank and alpha to ``lora_train_meta.json`` (0.8 and later), and knows no other settings
that count.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from math import isfinite
from pathlib import Path
from shlex import quote

from relexio.checkpoints.adapter_config import LoraConfig
from relexio.checkpoints.converters import verl_lora_merger
from relexio.checkpoints.files import File, inside, is_file
from relexio.checkpoints.header import parse_json
from relexio.checkpoints.lora import Merged
from relexio.checkpoints.lora_plan import LAYER, OUTER, Factors
from relexio.checkpoints.protocol import Checkpoint, Read, Wrapped
from relexio.checkpoints.record import CheckpointRecord
from relexio.dtypes import Table
from relexio.errors import CheckpointError

META = "lora_train_meta.json"
#: The directory, beside verl's shards and that file, of what belongs to the model: its ``hf_model``, too.
BESIDE = "huggingface"
_MAGNITUDE = ".lora_magnitude_vector"
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<what>lora_(?:embedding_)?[AB]|lora_magnitude_vector)\.(?P<adapter>[^.]+)(?:\.weight)?"
)
_SAVED = re.compile(rf"{re.escape(OUTER)}(?P<module>.+)\.lora_(?:embedding_)?A")
_WHOLE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<last>.+)")
_REPLACED = ".original_module."
#: What PEFT puts into a model: other models have a ``base_model`` with a ``model``, too.
_PUT = (LAYER, ".lora_", ".modules_to_save.")


def is_around(names: Collection[str]) -> bool:
    """Whether the tensors of these names are those of a model that PEFT has put something around."""
    return any(name.startswith(OUTER) and any(part in name for part in _PUT) for name in names)


def open_state(shards: Checkpoint, path: Path) -> Checkpoint:
    """The model that the files in a directory hold with its adapter; or the adapter, where they hold no other tensors.

    Raises CheckpointError for what is no LoRA or DoRA that can be merged, or if nothing says how strongly it counts.
    """
    path = path.parent if path.name == BESIDE else path
    merger = verl_lora_merger(path, shards.step)
    factors, rest = _names(shards)
    for module, _ in _modules(factors):
        if rest and f"{module}.weight" not in rest:
            raise CheckpointError(
                f"{shards.label}: module {module}: has LoRA and no weight of its own (target_parameters), which is not merged "
                f"here; {merger}"
            )
    adapter = Around(shards, factors, path, merger)
    return adapter.over(Renamed(shards, rest)) if rest else adapter


def _modules(names: Iterable[str]) -> list[tuple[str, str]]:
    """The modules that an adapter of such tensors is around, with the name of A of each."""
    return [(match["module"], name) for name in names if (match := _SAVED.fullmatch(name))]


class Renamed(Wrapped):
    """Some tensors of a checkpoint, by other names: ``names`` has its own for each."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        super().__init__(checkpoint, {name: checkpoint.tensors[own] for name, own in names.items()})
        self._names = names

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """As the checkpoint does."""
        with self.inner.held(self._names[name], first_byte, nbytes) as read:
            yield read


class Around(Renamed, Factors):
    """The adapter that is around a model, with the names under which PEFT would save it; ``over`` a base it is a model."""

    def __init__(self, shards: Checkpoint, factors: Mapping[str, str], path: Path, merger: str) -> None:
        super().__init__(shards, factors)
        self.path, self.merger, self._meta = path, merger, path / META
        if not is_file(self._meta):
            rank = max((self.tensors[name][1][:1] for _, name in _modules(factors)), default=())
            raise CheckpointError(
                f"{self.label}: its tensors are those of a model with LoRA around it, and there is no {META} that says how "
                f"strongly it counts; write the lora_alpha of training for ALPHA: "
                f'echo \'{{"r": {sum(rank)}, "lora_alpha": ALPHA}}\' > {quote(str(self._meta))}, and then this again'
            )
        stat = self._meta.stat()
        self._made_of = File(self._meta, stat.st_size, stat.st_mtime_ns)
        self.config = self._read()

    def _read(self) -> LoraConfig:
        """What is said of rank and scaling. Raises CheckpointError if it does not fit the tensors."""
        value = parse_json(inside(self.path, self._meta).read_bytes(), self._meta)
        rank, alpha = value.get("r"), value.get("lora_alpha")
        if type(rank) is not int or type(alpha) not in (int, float) or not (rank > 0 and alpha and isfinite(alpha)):
            raise CheckpointError(
                f"{self._meta}: r is {str(rank)[:40]}, lora_alpha {str(alpha)[:40]}; write those of training there"
            )
        for module, name in _modules(self.tensors):
            if self.tensors[name][1][:1] != (rank,):
                raise CheckpointError(
                    f"{self._meta}: r is {rank}, and lora_A of {module} has shape {list(self.tensors[name][1])}; ranks that "
                    f"differ are not told there; {self.merger}"
                )
        dora = any(name.endswith(_MAGNITUDE) for name in self.tensors)
        return LoraConfig(rank, alpha, False, {}, {}, False, dora)

    def over(self, base: Checkpoint) -> Checkpoint:
        """The merged model. Raises CheckpointError for a base that the adapter does not fit."""
        adapter = copy(self)  # layers of Conv1D, as in GPT-2, are stored transposed: their weights and biases tell
        adapter.config = replace(self.config, transposed=_is_transposed(base.tensors))
        return Merged(adapter, base)

    def record(self, name_of: Callable[[Path | bytes], str]) -> CheckpointRecord:
        """That of any model that is not in safetensors files: those that it may be in hold another."""
        return Checkpoint.record(self, name_of)

    @property
    def fingerprints(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of the shards, and of what says how strongly the adapter counts."""
        return (*super().fingerprints, (self._made_of.path.name, self._made_of.size, self._made_of.mtime_ns))


def _names(shards: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """The shards' names of the adapter's tensors by those that PEFT saves, and of all other tensors by the model's.

    Raises CheckpointError for tensors of which it is not known what they do.
    """
    factors: dict[str, str] = {}
    rest: dict[str, str] = {}
    adapters: set[str] = set()
    for own in shards.tensors:
        name = own.removeprefix(OUTER)
        if _REPLACED in name:
            continue
        factor, whole = _FACTOR.fullmatch(name), _WHOLE.fullmatch(name)
        adapters |= {found["adapter"] for found in (factor, whole) if found}
        if factor:
            into, new = factors, f"{OUTER}{factor['module']}.{factor['what']}"
        else:
            into, new = rest, f"{whole['module']}.{whole['last']}" if whole else name.replace(LAYER, ".")
        if new in into or len(adapters) > 1 or (not factor and (".lora_" in new or LAYER in new)):
            raise CheckpointError(
                f"{shards.label}: tensor {own}: is not known to merge as LoRA or DoRA do; save the merged model "
                f"(merge_and_unload of peft)"
            )
        into[new] = own
    if not factors:
        raise CheckpointError(
            f"{shards.label}: tensor {own}: PEFT has changed the model, not by LoRA; save the merged model"
        )
    return factors, rest


def _is_transposed(tensors: Table) -> bool:
    """Whether weights are stored [in, out]: of one that is not square the bias has as many elements as it has columns."""
    for name, (_, shape) in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias") if name.endswith(".weight") else None
        if bias is not None and len(shape) == 2 and shape[0] != shape[1]:
            return bias[1] == shape[1:]
    return False
