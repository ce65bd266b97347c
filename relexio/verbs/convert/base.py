"""The base of steps that are added to a store, or compared with it: a step may be an adapter that is nothing without it."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from relexio.checkpoints.files import File
from relexio.checkpoints.match import match
from relexio.checkpoints.protocol import Checkpoint, Read
from relexio.store.schema import Block
from relexio.store.store import Store

_CONFIG = "config.json"


class StoredBase(Checkpoint):
    """A store's base as a checkpoint whose bits come from the store.

    Its files may be gone, or no longer what was stored; and the step before, too, comes from the store where steps are
    adapters. The blocks that are being read are decoded once for all who read them at the time.
    """

    def __init__(self, store: Store) -> None:
        record = store.base()
        self.step, self.label, self.source = None, f"the base of {store.shown}", store.shown
        self.tensors, self.directory = store.table, None
        self.files: tuple[File, ...] = ()
        self.side: dict[str, Path | bytes] = {}
        if _CONFIG in record.side:
            self.side[_CONFIG] = store.file(record.side[_CONFIG])
        self._store = store
        self._decoded: WeakValueDictionary[tuple[str, int], np.ndarray] = WeakValueDictionary()

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
            bits = self._decoded[key] = np.ascontiguousarray(self._store.base_bits(block))
        return bits

    @property
    def scratch(self) -> int:
        """A block, and once more while it is decoded."""
        return 2 * max((block.size * block.kind.itemsize for block in self._store.blocks), default=0)


def _begin(block: Block, place: int) -> int:
    """The first byte of a block's piece in its tensor."""
    return block.pieces[place].start * block.kind.itemsize


def as_stored(checkpoint: Checkpoint, base: StoredBase) -> Checkpoint:
    """A step as a store holds it: over the store's base, with the tensors of its table. Raises CheckpointError."""
    return match(checkpoint.over(base), base.tensors, base.label)
