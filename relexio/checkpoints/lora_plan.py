"""Which tensors of a base an adapter changes, and how: found by PEFT's names of its own, and refused where they do not fit."""

import re
from dataclasses import dataclass
from pathlib import Path

from relexio.bounded import loads
from relexio.checkpoints.adapter_config import CONFIG, LoraConfig
from relexio.checkpoints.match import EMBEDDINGS, HEAD, UNQUANTIZED, is_quantized
from relexio.checkpoints.product import Product
from relexio.checkpoints.protocol import Checkpoint
from relexio.dtypes import kind_of
from relexio.errors import CheckpointError

#: What PEFT puts before the names of a model, and in those of what it wraps.
OUTER, LAYER = "base_model.model.", ".base_layer."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB]|magnitude_vector)(?:\.weight)?")
_MAGNITUDE = "magnitude_vector"


class Factors(Checkpoint):
    """An adapter at a step: its tensors have the names that PEFT saves them under. ``merger`` is what else merges it."""

    config: LoraConfig
    merger: str


@dataclass
class _Found:
    """The names of A and B of a module, and of its magnitudes, as far as they were found."""

    embedding: bool
    names: dict[str, str]


class Plan:
    """Which tensors of a base an adapter changes, and how: ``own`` has those that it holds whole, by the base's names."""

    def __init__(self, adapter: Factors, base: Checkpoint) -> None:
        self._adapter, self._base, self._tied = adapter, base, _is_tied(base)
        self.own: dict[str, str] = {}
        self.products: dict[str, Product] = {}
        self.magnitudes: dict[str, tuple[str, str]] = {}
        factors: dict[str, _Found] = {}
        for name in adapter.tensors:
            if not name.startswith(OUTER):
                raise self._refused(f"tensor {name}: its name does not begin with {OUTER}; save it with peft")
            if found := _FACTOR.fullmatch(name.removeprefix(OUTER)):
                of = factors.setdefault(found["module"], _Found(False, {}))
                of.embedding = of.embedding or bool(found["embedding"])
                of.names[found["factor"]] = name
            else:
                self._take_whole(name, name.removeprefix(OUTER).replace(LAYER, "."))
        for module, of in factors.items():
            product = self.products[f"{module}.weight"] = self._product(module, of)
            if (magnitude := of.names.get(_MAGNITUDE)) is not None or self._adapter.config.dora:
                self.magnitudes[f"{module}.weight"] = self._magnitude(module, magnitude, product)
        if not factors and not self.own:
            raise self._refused("holds no tensor; save it with peft")
        self._require_one_way()

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._adapter.label}: {what}")

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the base that is to be changed. Raises CheckpointError where it cannot be."""
        if self._tied and name in (HEAD, *EMBEDDINGS):
            raise self._refused(
                f"changes {name}, which is tied in {self._base.label}: head and embedding would not be the same "
                f"after merging; untie the base (save it with a head of its own), and {self._adapter.merger}"
            )
        if name not in self._base.tensors:
            is_this_it = "is this the base that training began from, saved by transformers?"
            advice = UNQUANTIZED if is_quantized(self._base.tensors) else is_this_it
            raise self._refused(f"changes {name}, which {self._base.label} lacks; {advice}")
        dtype, shape = self._base.tensors[name]
        if not kind_of(dtype).is_float:
            raise self._refused(f"changes {name}, which has type {dtype} in {self._base.label}; {UNQUANTIZED}")
        return shape

    def _take_whole(self, own: str, name: str) -> None:
        dtype, shape = self._adapter.tensors[own]
        wanted = self._shape(name)
        self._require_float(own, dtype)
        if shape != wanted:
            raise self._unlike(name, list(shape), wanted)
        self.own[name] = own

    def _require_float(self, name: str, dtype: str) -> None:
        if not kind_of(dtype).is_float:
            raise self._refused(f"tensor {name}: type {dtype}; save the adapter in fp32 or bf16")

    def _unlike(self, name: str, found: object, wanted: tuple[int, ...]) -> CheckpointError:
        return self._refused(
            f"tensor {name}: the adapter is for shape {found}, in {self._base.label} {list(wanted)}; "
            f"is this the base that training began from?"
        )

    def _product(self, module: str, of: _Found) -> Product:
        if not {"A", "B"} <= of.names.keys():
            raise self._refused(f"module {module}: has only one of lora_A and lora_B; save it again with peft")
        shape, config = self._shape(f"{module}.weight"), self._adapter.config
        (a_type, a), (b_type, b) = (self._adapter.tensors[of.names[factor]] for factor in "AB")
        for name, dtype in ((of.names["A"], a_type), (of.names["B"], b_type)):
            self._require_float(name, dtype)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == config.rank(module):
            raise self._refused(
                f"module {module}: lora_A {list(a)} and lora_B {list(b)} are no factors of rank {config.rank(module)}, as "
                f"{CONFIG} says; save it again with peft (with DeepSpeed ZeRO-3 or FSDP: gather the factors first)"
            )
        plain, turned = (b[0], a[1]), (a[1], b[0])
        if shape not in (plain, turned) or (of.embedding and shape != turned):
            raise self._unlike(f"{module}.weight", list(turned if of.embedding else plain), shape)
        turn = of.embedding or (config.transposed if plain == turned else shape == turned)
        factors = ((of.names["A"], a_type), (of.names["B"], b_type))
        return Product(*factors, a[0], shape, turn, of.embedding, config.scaling(module))

    def _magnitude(self, module: str, name: str | None, product: Product) -> tuple[str, str]:
        """Name and type of a module's magnitudes. Raises CheckpointError if there are none, or they are not for its rows."""
        if name is None or not self._adapter.config.dora:
            there, said = "no" if name is None else "a", str(self._adapter.config.dora).lower()
            raise self._refused(
                f"module {module}: has {there} lora_{_MAGNITUDE}, and use_dora is {said} in {CONFIG}; save it again with peft"
            )
        dtype, shape = self._adapter.tensors[name]
        self._require_float(name, dtype)
        if product.turned:
            what = "an embedding" if product.embedding else "a layer whose weight is stored transposed"
            raise self._refused(f"module {module}: DoRA of {what} is not merged here; {self._adapter.merger}")
        if shape != product.shape[:1]:
            raise self._refused(
                f"tensor {name}: shape {list(shape)}, and {module}.weight has {product.shape[0]:,} rows; save it again with peft"
            )
        return name, dtype

    def _require_one_way(self) -> None:
        """Raise CheckpointError where only the configuration says how a square layer is stored, and other layers differ."""
        layers = {name: product for name, product in self.products.items() if not product.embedding}
        seen = {product.turned for product in layers.values() if product.shape[0] != product.shape[1]}
        square = [name for name, product in layers.items() if product.shape[0] == product.shape[1]]
        if square and seen - {self._adapter.config.transposed}:
            raise self._refused(
                f"tensor {square[0]}: whether it is stored transposed does not follow from {CONFIG}, whose fan_in_fan_out does not "
                f"hold for all layers; {self._adapter.merger}"
            )


def _is_tied(base: Checkpoint) -> bool:
    """Whether a base's head is its embedding: it lacks one, or its configuration says so."""
    if HEAD not in base.tensors:
        return True
    config = base.side.get("config.json")
    data = config.read_bytes() if isinstance(config, Path) else config or b"{}"
    try:
        value = loads(data)
    except (ValueError, RecursionError):
        return False
    of_text = value.get("text_config") if isinstance(value, dict) else None
    return any(isinstance(part, dict) and part.get("tie_word_embeddings") is True for part in (value, of_text))
