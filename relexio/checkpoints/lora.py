"""LoRA adapters as PEFT saves them: read as the models that its default merge makes of them and their base.

That is what ``PeftModel.from_pretrained(base, directory).merge_and_unload()`` gives (peft 0.21, run in the tests): factors
are float32, however they were saved; B A is float32, is scaled, and added to W in float32, and that is rounded to W's
type. For an embedding the difference is rounded to W's type before it is added. What an adapter holds whole
(modules_to_save, biases) takes the place of the base's tensor, in the base's type.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from relexio.bounded import loads
from relexio.checkpoints.adapter_config import CONFIG, LoraConfig, read_config
from relexio.checkpoints.converters import peft_merger
from relexio.checkpoints.files import ADAPTER, File, inside, is_file, left_out, side_files
from relexio.checkpoints.header import Shard, read_shard
from relexio.checkpoints.match import EMBEDDINGS, HEAD
from relexio.checkpoints.product import SCRATCH, Product
from relexio.checkpoints.protocol import Checkpoint, Read, Wrapped
from relexio.checkpoints.record import CheckpointRecord, NotStored
from relexio.checkpoints.safetensors import HuggingFace
from relexio.dtypes import Kind, from_float32, kind_of, tensor_bytes, to_native
from relexio.errors import CheckpointError, MissingError

_OUTER = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?")
_LAYER = ".base_layer."


def weight_files(path: Path) -> list[Path]:
    """The file of a directory that holds an adapter."""
    return [path / ADAPTER] * is_file(path / ADAPTER)


def open_directory(path: Path, step: int | None = None, top: Path | None = None) -> "Adapter":
    """Read header and configuration of an adapter's directory. As ``layout.open_checkpoint``."""
    if not path.is_dir():
        raise MissingError(f"{path}: no such directory")
    if step is None:
        merge = peft_merger(path, step)
        raise CheckpointError(f"{path}: holds a LoRA adapter, not a model; give the base model's directory, or {merge}")
    config = read_config(path, step)
    shard = read_shard(inside(path, path / ADAPTER))
    # The adapter's files would make transformers load the model that is written beside them as the adapter's base.
    side = {n: file for n, file in side_files(path, ()).items() if n.rpartition("/")[2] not in (ADAPTER, CONFIG)}
    return Adapter(path, step, shard, config, side, top)


class Adapter(HuggingFace):
    """An adapter at a step. Its tensors are its own; ``over`` its base it is a model."""

    def __init__(
        self, path: Path, step: int, shard: Shard, config: LoraConfig, side: dict[str, Path], top: Path | None
    ) -> None:
        super().__init__(path, step, (shard,), None, side, top)
        stat = (path / CONFIG).stat()
        self.config, self._made_of = config, (shard, File(path / CONFIG, stat.st_size, stat.st_mtime_ns))

    def over(self, base: Checkpoint) -> Checkpoint:
        """The merged model. Raises CheckpointError for a base that the adapter does not fit."""
        return Merged(self, base)

    @property
    def fingerprints(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of its two files."""
        return tuple((file.path.name, file.size, file.mtime_ns) for file in self._made_of)

    def not_stored(self) -> dict[str, int]:
        """As of any checkpoint, and the adapter itself: the store has the model that it makes."""
        return left_out(self.directory or self.path, self.path, self.side)

    def record(self, name_of: Callable[[Path | bytes], str]) -> CheckpointRecord:
        """What the store keeps of it: no files to be written again, but how to see that they are the same."""
        side = {name: name_of(path) for name, path in self.side.items()}
        left = NotStored.of(self.not_stored())
        return CheckpointRecord(self.step, self.source, (), None, side, left, made_of=self.fingerprints)


class Merged(Wrapped):
    """The model that an adapter makes of its base. Nothing of it is held: each read makes what it is asked for."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        super().__init__(adapter, base.tensors)
        self._adapter, self._base = adapter, base
        plan = _Plan(adapter, base)
        self._own, self._products = plan.own, plan.products

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """Keep the base's file open. The adapter is small, and opened for each read: hundreds are held at once."""
        if name in self._own:
            weight: AbstractContextManager[Read] = self._held_own(name)
        else:
            weight = self._base.held(name, first_byte, nbytes)
        with weight as read:
            yield partial(self._merge, name, read) if name in self._products else read

    @contextmanager
    def _held_own(self, name: str) -> Iterator[Read]:
        """A tensor that the adapter holds whole, in the base's type."""
        own = self._own[name]
        kind, wanted = (kind_of(dtype) for dtype in (self._adapter.tensors[own][0], self.tensors[name][0]))
        yield partial(self._adapter.read, own) if kind == wanted else partial(self._cast, own, kind, wanted)

    def _cast(self, own: str, kind: Kind, wanted: Kind, first_byte: int, out: memoryview) -> None:
        def fill(first: int, bits: np.ndarray) -> None:
            found = np.empty(bits.size, kind.bits)
            self._adapter.read(own, first * kind.itemsize, found.data.cast("B"))
            bits[:] = from_float32(to_native(found, kind).astype(np.float32), wanted)

        _by_element(first_byte, out, np.dtype(wanted.bits), fill)

    def _merge(self, name: str, read: Read, first_byte: int, out: memoryview) -> None:
        product, kind = self._products[name], kind_of(self.tensors[name][0])

        def fill(first: int, bits: np.ndarray) -> None:
            read(first * kind.itemsize, bits.data.cast("B"))
            with self._adapter.held(product.a[0], 0, 1) as a, self._adapter.held(product.b[0], 0, 1) as b:
                product.add_to(bits, kind, first, a, b)

        _by_element(first_byte, out, np.dtype(kind.bits), fill)

    @property
    def nbytes(self) -> int:
        """Bytes of the model."""
        return sum(tensor_bytes(*tensor) for tensor in self.tensors.values())

    @property
    def moved(self) -> Collection[str]:
        """The tensors that the adapter changes."""
        return self._own.keys() | self._products.keys()

    @property
    def scratch(self) -> int:
        """Bytes in which a product is made, and what the base needs."""
        return SCRATCH + self._base.scratch


def _by_element(first_byte: int, out: memoryview, dtype: np.dtype, fill: Callable[[int, np.ndarray], None]) -> None:
    """Fill bytes with elements, of which the first and the last may be wanted in part."""
    size = dtype.itemsize
    first, skipped = divmod(first_byte, size)
    if not skipped and not len(out) % size:
        fill(first, np.frombuffer(out, dtype))
    else:
        bits = np.empty(-(-(first_byte + len(out)) // size) - first, dtype)
        fill(first, bits)
        out[:] = bits.data.cast("B")[skipped : skipped + len(out)]


@dataclass
class _Factors:
    """The names of A and B of a module, as far as they were found."""

    embedding: bool
    names: dict[str, str]


class _Plan:
    """Which tensors of a base an adapter changes, and how: ``own`` has those that it holds whole, by the base's names."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self._adapter, self._base, self._tied = adapter, base, _is_tied(base)
        self.own: dict[str, str] = {}
        self.products: dict[str, Product] = {}
        factors: dict[str, _Factors] = {}
        for name in adapter.tensors:
            if not name.startswith(_OUTER):
                raise self._refused(f"tensor {name}: its name does not begin with {_OUTER}; save it with peft")
            if found := _FACTOR.fullmatch(name.removeprefix(_OUTER)):
                of = factors.setdefault(found["module"], _Factors(bool(found["embedding"]), {}))
                of.names[found["factor"]] = name
            else:
                self._take_whole(name, name.removeprefix(_OUTER).replace(_LAYER, "."))
        for module, of in factors.items():
            self.products[f"{module}.weight"] = self._product(module, of)
        if not factors and not self.own:
            raise self._refused("holds no tensor; save it with peft")
        self._require_one_way()

    @property
    def _merge(self) -> str:
        return peft_merger(self._adapter.path, self._adapter.step)

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._adapter.label}: {what}")

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the base that is to be changed. Raises CheckpointError where it cannot be."""
        if self._tied and name in (HEAD, *EMBEDDINGS):
            raise self._refused(
                f"changes {name}, which is tied in {self._base.label}: head and embedding would not be the same "
                f"after merging; untie the base (save it with a head of its own), and {self._merge}"
            )
        if name not in self._base.tensors:
            raise self._refused(
                f"changes {name}, which {self._base.label} lacks; is this the base that training began from, saved by transformers?"
            )
        dtype, shape = self._base.tensors[name]
        if not kind_of(dtype).is_float:
            raise self._refused(
                f"changes {name}, which has type {dtype} in {self._base.label}; an adapter of a quantized base is not merged "
                f"here: give the model that was quantized, with --base"
            )
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

    def _product(self, module: str, of: _Factors) -> Product:
        if of.names.keys() != {"A", "B"}:
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

    def _require_one_way(self) -> None:
        """Raise CheckpointError where only the configuration says how a square layer is stored, and other layers differ."""
        layers = {name: product for name, product in self.products.items() if not product.embedding}
        seen = {product.turned for product in layers.values() if product.shape[0] != product.shape[1]}
        square = [name for name, product in layers.items() if product.shape[0] == product.shape[1]]
        if square and seen - {self._adapter.config.transposed}:
            raise self._refused(
                f"tensor {square[0]}: whether it is stored transposed does not follow from {CONFIG}, whose fan_in_fan_out does not "
                f"hold for all layers; {self._merge}"
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
