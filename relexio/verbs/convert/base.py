"""The base of steps that are added to a store, or compared with it: a step may be an adapter that is nothing without it."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from relexio.checkpoints.files import File
from relexio.checkpoints.match import match
from relexio.checkpoints.protocol import Checkpoint, Read
from relexio.store.read import observed
from relexio.store.schema import MOVES_CHUNK, Block
from relexio.store.store import Store


class StoredBase(Checkpoint):
    """A store's base as a checkpoint whose bits come from the store; or, at a ``step``, the model that is stored for it.

    Its files may be gone, or no longer what was stored; and the step before, too, comes from the store where steps are
    adapters. The blocks that are being read are decoded once for all who read them at the time. ``going_on``: deltas may
    begin at a stored step, so that a step is added without all before it.
    """

    def __init__(self, store: Store, step: int | None = None, going_on: bool = False) -> None:
        self.step, self.source = None, store.shown
        self.label = f"the base of {store.shown}" if step is None else f"step {step} of {store.shown}"
        self.tensors, self.directory = store.table, None
        self.files: tuple[File, ...] = ()
        self.side: Mapping[str, Path | bytes] = _Side(store, step)
        self._store, self._of, self._going_on = store, step, going_on
        self._decoded: WeakValueDictionary[tuple[str, int], np.ndarray] = WeakValueDictionary()

    def at(self, step: int, made_of: tuple[tuple[str, int, int], ...]) -> "StoredBase | None":
        """The model at a step, if it is stored and was made of these files."""
        stored = self._going_on and step in self._store.steps and self._store.record(step).made_of == made_of
        return StoredBase(self._store, step) if stored else None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_decoded": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._decoded = WeakValueDictionary()

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """Keep the block that was read last."""
        kept: list[np.ndarray] = []

        def read(first: int, out: memoryview) -> None:
            parts = self._store.parts[name]
            at = bisect_right(parts, first, key=lambda part: _begin(*part)) - 1
            for block, place in parts[max(at, 0) :]:
                piece = block.pieces[place]
                if _begin(block, place) >= first + len(out):
                    break
                begin = _begin(block, place)
                low, high = max(first, begin), min(first + len(out), begin + piece.size * block.kind.itemsize)
                if low < high:
                    kept[:] = [self._bits(block)]
                    data = kept[0][piece.span].data.cast("B")
                    out[low - first : high - first] = data[low - begin : high - begin]

        yield read

    def _bits(self, block: Block) -> np.ndarray:
        key = block.kind.name, block.index
        bits = self._decoded.get(key)
        if bits is None:
            found = self._store.base_bits(block) if self._of is None else observed(self._store, block, self._of)
            bits = self._decoded[key] = np.ascontiguousarray(found)
        return bits

    @property
    def scratch(self) -> int:
        """A block, the one before it where a row begins in that, and once more while it is decoded; for a step, with moves."""
        itemsize = max((block.kind.itemsize for block in self._store.blocks), default=1)
        chunks = 0 if self._of is None else (len(self._store.segments) + 3) * MOVES_CHUNK * (1 + itemsize)
        return chunks + 3 * max((block.size * block.kind.itemsize for block in self._store.blocks), default=0)


class _Side(Mapping[str, bytes]):
    """The side files of a stored checkpoint, read when they are asked for."""

    def __init__(self, store: Store, step: int | None) -> None:
        record = store.base() if step is None else store.record(step)
        self._store, self._arrays = store, record.side

    def __getitem__(self, name: str) -> bytes:
        return self._store.file(self._arrays[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _begin(block: Block, place: int) -> int:
    """The first byte of a block's piece in its tensor."""
    return block.pieces[place].start * block.kind.itemsize


def as_stored(checkpoint: Checkpoint, base: StoredBase) -> Checkpoint:
    """A step as a store holds it: over the store's base, with the tensors of its table. Raises CheckpointError."""
    return match(checkpoint.over(base), base.tensors, base.label)
