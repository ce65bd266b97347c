"""LoRA adapters as PEFT saves them: read as the models that its default merge makes of them and their base.

That is what ``PeftModel.from_pretrained(base, directory).merge_and_unload()`` gives (peft 0.21, run in the tests): factors
are float32, however they were saved; B A is float32, is scaled, and added to W in float32, and that is rounded to W's
type. For an embedding the difference is rounded to W's type before it is added. DoRA goes on from the sum (``dora``). What an
adapter holds whole (modules_to_save, biases) takes the place of the base's tensor, in the base's type.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from relexio.checkpoints.adapter_config import CONFIG, LoraConfig, read_config
from relexio.checkpoints.converters import peft_merger
from relexio.checkpoints.dora import Dora
from relexio.checkpoints.files import ADAPTER, File, inside, is_file, left_out, side_files
from relexio.checkpoints.header import Shard, read_shard
from relexio.checkpoints.lora_plan import Factors, Plan
from relexio.checkpoints.product import SCRATCH
from relexio.checkpoints.protocol import Checkpoint, Read, Wrapped
from relexio.checkpoints.record import CheckpointRecord, NotStored
from relexio.checkpoints.safetensors import HuggingFace
from relexio.dtypes import Kind, from_float32, kind_of, tensor_bytes, to_native
from relexio.errors import CheckpointError, MissingError


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


class Adapter(HuggingFace, Factors):
    """An adapter at a step. Its tensors are its own; ``over`` its base it is a model."""

    def __init__(
        self, path: Path, step: int, shard: Shard, config: LoraConfig, side: dict[str, Path], top: Path | None
    ) -> None:
        super().__init__(path, step, (shard,), None, side, top)
        stat = (path / CONFIG).stat()
        self.merger = peft_merger(path, step)
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

    def __init__(self, adapter: Factors, base: Checkpoint) -> None:
        super().__init__(adapter, base.tensors)
        self._adapter, self._base = adapter, base
        plan = Plan(adapter, base)
        self._own, self._products = plan.own, plan.products
        self._dora = {name: Dora(plan.products[name], magnitude) for name, magnitude in plan.magnitudes.items()}

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """Keep the base's file open. The adapter is small, and opened for each read: hundreds are held at once."""
        if name in self._own:
            weight: AbstractContextManager[Read] = self._held_own(name)
        else:
            weight = self._base.held(name, *self._whole_rows(name, first_byte, nbytes))
        with weight as read:
            yield partial(self._merge, name, read) if name in self._products else read

    def _whole_rows(self, name: str, first_byte: int, nbytes: int) -> tuple[int, int]:
        """The first byte and the number of those that a read of these bytes takes from the base."""
        if name not in self._dora or not nbytes:
            return first_byte, nbytes
        row = self.tensors[name][1][1] * kind_of(self.tensors[name][0]).itemsize
        begin, end = first_byte // row, -(-(first_byte + nbytes) // row)
        return begin * row, (end - begin) * row

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
        product, dora, kind = self._products[name], self._dora.get(name), kind_of(self.tensors[name][0])

        def fill(first: int, bits: np.ndarray) -> None:
            with ExitStack() as stack:
                a, b = (stack.enter_context(self._factor(factor)) for factor, _ in (product.a, product.b))
                if dora is not None:
                    dora.fill(bits, kind, first, read, (a, b, partial(self._adapter.read, dora.magnitude[0])))
                else:
                    read(first * kind.itemsize, bits.data.cast("B"))
                    product.add_to(bits, kind, first, a, b)

        _by_element(first_byte, out, np.dtype(kind.bits), fill)

    def _factor(self, name: str) -> AbstractContextManager[Read]:
        return self._adapter.held(name, 0, tensor_bytes(*self._adapter.tensors[name]))

    @property
    def nbytes(self) -> int:
        """Bytes of the model."""
        return sum(tensor_bytes(*tensor) for tensor in self.tensors.values())

    @property
    def moved(self) -> Collection[str]:
        """The tensors that the adapter changes; all, if what it is merged into was saved with it."""
        return self._own.keys() | self._products.keys() if self._base.step is None else self.tensors.keys()

    @property
    def scratch(self) -> int:
        """Bytes in which a product is made, and what the base needs."""
        rows = max((dora.scratch for dora in self._dora.values()), default=0)
        return SCRATCH + rows + self._base.scratch


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
