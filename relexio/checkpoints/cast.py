"""A checkpoint of other float types than the trajectory: fp32 that a trainer writes, over a base in bf16."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from relexio.checkpoints.protocol import Checkpoint, Read, Wrapped
from relexio.checkpoints.record import CheckpointRecord
from relexio.dtypes import BITS, Table, cast, kind_of

_AT_ONCE = 1 << 16  # elements that are rounded at a time, in the cache


class Cast(Wrapped):
    """A checkpoint whose floats are read as those of another type, rounded to nearest even as torch does."""

    def __init__(self, checkpoint: Checkpoint, tensors: Table) -> None:
        super().__init__(checkpoint, tensors)
        changed = {checkpoint.tensors[name][0] for name in tensors if tensors[name] != checkpoint.tensors[name]}
        self.cast = ", ".join(sorted(changed))

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """As the checkpoint does."""
        own, wanted = self.inner.tensors[name][0], self.tensors[name][0]
        size, read_size = kind_of(wanted).itemsize, BITS[own] // 8
        with self.inner.held(name, first_byte // size * read_size, -(-nbytes // size) * read_size) as read:
            yield read if own == wanted else lambda first, out: _read(read, own, wanted, first, out)

    def record(self, name_of: Callable[[Path | bytes], str]) -> CheckpointRecord:
        """That of the checkpoint, which says what was cast."""
        return replace(self.inner.record(name_of), cast=self.cast)


def _read(read: Read, own: str, wanted: str, first_byte: int, out: memoryview) -> None:
    """Fill ``out``, whole elements, with bytes of the wanted type."""
    size, read_size = kind_of(wanted).itemsize, BITS[own] // 8
    raw, bits = (
        np.empty(min(_AT_ONCE, len(out) // size) * read_size, np.uint8),
        np.frombuffer(out, kind_of(wanted).bits),
    )
    for at in range(0, len(bits), _AT_ONCE):
        part = raw[: (len(bits) - at) * read_size]
        read((first_byte // size + at) * read_size, part.data)
        bits[at : at + _AT_ONCE] = cast(part, own, wanted)
