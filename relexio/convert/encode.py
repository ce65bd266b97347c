"""One block of ``convert``: read it at every step, XOR with the base, keep what changed, hash, check, write.

A task knows its sources and the store's address, writes whole chunks at fixed places, and its digest last; so it can
run in any order or process, and again. A block whose digest is there is whole.
"""

import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from relexio.checkpoints.read import Location, read_exactly
from relexio.convert.check import Source
from relexio.delta import changed, gather
from relexio.dtypes import nonfinite
from relexio.errors import CheckpointError, StoreError
from relexio.trajectory.schema import Block, Group
from relexio.trajectory.store import Store
from relexio.trajectory.tiles import Changes
from relexio.trajectory.write import writable


@dataclass(frozen=True)
class Job:
    """All that a block's task needs: the store, the group being written, its sources, and the base's if it is new."""

    store: Store
    group: Group
    sources: tuple[Source, ...]
    base: Source | None
    tile_bytes: int
    resumed: bool

    @property
    def path(self) -> str:
        """The group's Zarr path."""
        return self.group.path


def encode_block(job: Job, block: Block) -> np.ndarray:
    """Write one block of the group and return how many elements changed at each step, int64 [K].

    What an earlier run wrote whole is checked against its digests and kept.
    Raises CheckpointError for a file that ends early, or NaN and Inf that the base lacks.
    """
    counts = _finished(job, block) if job.resumed else None
    return _Encoder(job, block).run() if counts is None else counts


class _Encoder:
    def __init__(self, job: Job, block: Block) -> None:
        self.job, self.block = job, block
        self.steps = len(job.sources)
        self.xor = writable(job.store, f"{job.path}/{block.kind.name}/xor")
        self.chunk = np.zeros(self.xor.chunks, block.kind.bits)
        self.filled = self.written = 0
        self.changed = np.zeros(self.steps, np.int64)
        self.hashes = [hashlib.sha256() for _ in range(self.steps)]

    def run(self) -> np.ndarray:
        job, block, kind = self.job, self.block, self.block.kind
        base = self._base()
        mask = np.empty(block.size, bool)
        tile = max(64, job.tile_bytes // (self.steps * kind.itemsize))
        buffer = np.empty((self.steps, min(tile, block.size)), kind.bits)
        with ExitStack() as stack:
            readers = [Reader(source, block, stack) for source in job.sources]
            for first in range(0, block.size, tile):
                last = min(first + tile, block.size)
                xor = buffer[:, : last - first]
                for row, reader, hashed in zip(xor, readers, self.hashes, strict=True):
                    reader.read(first, row)
                    hashed.update(row)
                xor ^= base[first:last]
                mask[first:last] = here = changed(xor)
                bits = gather(xor, here)
                self._check(bits, base[first:last][here])
                self.changed += np.count_nonzero(bits, axis=1)
                self._append(bits)
        self._flush()
        digest = np.frombuffer(b"".join(h.digest() for h in self.hashes), np.uint8).reshape(self.steps, 32)
        at = block.index * job.store.block // 8
        packed = np.zeros(job.store.block // 8, np.uint8)
        bits = np.packbits(mask, bitorder="little")
        packed[: len(bits)] = bits
        writable(job.store, f"{job.path}/{kind.name}/mask")[at : at + len(packed)] = packed
        writable(job.store, f"{job.path}/{kind.name}/digest")[block.index] = digest
        return self.changed

    def _base(self) -> np.ndarray:
        """The base's bits: from its files into the store for a new store, else from the store."""
        store, block, kind = self.job.store, self.block, self.block.kind
        if self.job.base is None:
            return store.base_bits(block)
        stored = writable(store, f"base/{kind.name}/bits")
        chunk = stored.chunks[0]
        whole = np.zeros(-(-block.size // chunk) * chunk, kind.bits)
        bits = whole[: block.size]
        with ExitStack() as stack:
            Reader(self.job.base, block, stack).read(0, bits)
        at = block.index * store.block
        digest = np.frombuffer(hashlib.sha256(bits).digest(), np.uint8)
        stored[at : at + len(whole)] = whole
        writable(store, f"base/{kind.name}/digest")[block.index] = digest
        return bits

    def _check(self, xor: np.ndarray, base: np.ndarray) -> None:
        kind = self.block.kind
        if not kind.is_float:
            return
        if nonfinite(base, kind).any():
            raise CheckpointError(
                f"base: tensor {self.block.tensor.name}: NaN or Inf in an element that training changes; give another --base"
            )
        bad = nonfinite(xor ^ base, kind) & (xor != 0)
        if bad.any():
            checkpoint = self.job.sources[int(bad.any(axis=1).argmax())].checkpoint
            raise CheckpointError(
                f"{checkpoint.label}: tensor {self.block.tensor.name}: NaN or Inf where the base has numbers; "
                f"leave this step out with --steps"
            )

    def _append(self, xor: np.ndarray) -> None:
        while xor.shape[1]:
            room = self.chunk.shape[1] - self.filled
            taken, xor = xor[:, :room], xor[:, room:]
            self.chunk[:, self.filled : self.filled + taken.shape[1]] = taken
            self.filled += taken.shape[1]
            if self.filled == self.chunk.shape[1]:
                self._flush()

    def _flush(self) -> None:
        if not self.filled:
            return
        self.chunk[:, self.filled :] = 0
        at = self.block.index * self.job.store.block + self.written
        self.xor[:, at : at + self.chunk.shape[1]] = self.chunk
        self.written += self.filled
        self.filled = 0


class Reader:
    """Reads one source's bytes of a block; checks that a second copy of the tensor, where there is one, is the same."""

    def __init__(self, source: Source, block: Block, stack: ExitStack) -> None:
        self.source, self.block = source, block
        self.places = source.places(block.tensor.name)
        self.files = [_open(place, stack) for place in self.places]

    def read(self, first: int, row: np.ndarray) -> None:
        """Fill ``row`` with elements ``first`` and following of the block."""
        at = (self.block.start + first) * self.block.kind.itemsize
        read_exactly(self.files[0], self.places[0].start + at, memoryview(row).cast("B"), self.places[0].path)
        if len(self.places) > 1:
            copy = np.empty_like(row)
            read_exactly(self.files[1], self.places[1].start + at, memoryview(copy).cast("B"), self.places[1].path)
            if (copy != row).any():
                raise CheckpointError(
                    f"{self.source.checkpoint.label}: its lm_head.weight differs from {self.block.tensor.name}, and the base "
                    f"has no head of its own; save the base with its lm_head.weight"
                )


def _open(place: Location, stack: ExitStack) -> int:
    fd = os.open(place.path, os.O_RDONLY)
    stack.callback(os.close, fd)
    return fd


def _finished(job: Job, block: Block) -> np.ndarray | None:
    """Changed elements [K] of a block that an interrupted run wrote, if it is whole and fits its digests; else None."""
    kind, store = block.kind, job.store
    try:
        digest = store.read(f"{job.path}/{kind.name}/digest", block.index)
        base = store.base_bits(block)
        if hashlib.sha256(base).digest() != store.read(f"base/{kind.name}/digest", block.index).tobytes():
            return None
        return _verify(job, block, base, digest)
    except StoreError:
        return None


def _verify(job: Job, block: Block, base: np.ndarray, digest: np.ndarray) -> np.ndarray | None:
    """Changed elements [K] of a stored block, or None if the bits of any step are not those that were hashed."""
    elements = np.flatnonzero(job.store.mask(job.group, block))
    counts = np.zeros(len(job.sources), np.int64)
    tile = max(64, job.tile_bytes // (len(job.sources) * block.kind.itemsize))
    hashes = [hashlib.sha256() for _ in job.sources]
    changes = Changes(job.store, job.group, block, len(elements))
    for first in range(0, block.size, tile):
        here = base[first : first + tile]
        some = elements[np.searchsorted(elements, first) : np.searchsorted(elements, first + tile)] - first
        found = changes.take(len(some))
        counts += np.count_nonzero(found, axis=1)
        for row, hashed in zip(found, hashes, strict=True):
            bits = here.copy()
            bits[some] ^= row
            hashed.update(bits)
    return counts if b"".join(h.digest() for h in hashes) == digest.tobytes() else None
