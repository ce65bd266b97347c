"""One block of ``convert``: read it at every step, XOR with the base, find the moves, hash, check, write.

A task knows its checkpoints and the store's address, writes whole chunks at fixed places, and its digest last; so it can
run in any order or process, and again. A block whose digest is there is whole.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_128

from relexio.checkpoints.protocol import Checkpoint
from relexio.dtypes import Kind, nonfinite
from relexio.errors import CheckpointError, StoreError
from relexio.store.moves import Moves, changed, count_changed, find_moves
from relexio.store.schema import DIGEST, Block, Group, moves_room
from relexio.store.state import block_state, digest_of, tile_width
from relexio.store.store import Store

#: So many tiles are read at a time: a read of a few hundred kB costs little more than one of a few ten.
_READ = 4


@dataclass(frozen=True)
class Job:
    """All that a block's task needs: the store, the group being written, its checkpoints, and the base's if it is new."""

    store: Store
    group: Group
    checkpoints: tuple[Checkpoint, ...]
    base: Checkpoint | None
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
        self.path = f"{job.path}/{block.kind.name}"
        self.steps = len(job.checkpoints)
        self.streams = [_Stream(job, block, name) for name in ("step", "xor")]
        self.count = np.zeros(job.store.block, job.store.array(f"{self.path}/count").dtype)
        self.changed = np.zeros(self.steps, np.int64)
        self.digests = [xxh3_128() for _ in range(self.steps)]

    def run(self) -> np.ndarray:
        job, block = self.job, self.block
        base, tile = self._base(), tile_width(self.steps, block.kind.itemsize, job.tile_bytes)
        wide = min(_READ * tile, block.size)
        buffer = np.empty((self.steps, wide), block.kind.bits)
        with ExitStack() as stack:
            readers = [held(checkpoint, block, stack) for checkpoint in job.checkpoints]
            for first in range(0, block.size, wide):
                rows = buffer[:, : block.size - first]
                for row, read, digest in zip(rows, readers, self.digests, strict=True):
                    read(first, row)
                    digest.update(row.data)
                for at in range(0, rows.shape[1], tile):
                    self._take(rows[:, at : at + tile], base[first + at :][:tile], first + at)
        for stream in self.streams:
            stream.flush()
        joined = np.frombuffer(b"".join(d.digest() for d in self.digests), np.uint8).reshape(1, self.steps, DIGEST)
        job.store.write_chunk(f"{self.path}/count", self.count, block.index)
        job.store.write_chunk(f"{self.path}/digest", joined, block.index, 0, 0)
        return self.changed

    def _take(self, rows: np.ndarray, base: np.ndarray, first: int) -> None:
        """Append the moves in element bits [K, n], which begin at element ``first`` of the block; ``rows`` is used up."""
        rows ^= base
        elements = changed(rows)
        moves = find_moves(np.take(rows, elements, axis=1))
        self._check(moves, base[elements])
        self.count[first + elements] = moves.count
        self.changed += count_changed(moves, self.steps)
        for stream, entries in zip(self.streams, (moves.step, moves.xor), strict=True):
            stream.append(entries)

    def _base(self) -> np.ndarray:
        """The base's bits: from its files into the store for a new store, else from the store."""
        store, block, kind = self.job.store, self.block, self.block.kind
        if self.job.base is None:
            return _stored_base(store, block)
        path = f"base/{kind.name}"
        chunk = store.array(f"{path}/bits").chunks[0]
        whole = np.zeros(-(-block.size // chunk) * chunk, kind.bits)
        bits = whole[: block.size]
        self.job.base.read(block.tensor.name, block.start * kind.itemsize, bits.data.cast("B"))
        first = block.index * store.block // chunk
        for i, part in enumerate(whole.reshape(-1, chunk)):
            store.write_chunk(f"{path}/bits", part, first + i)
        store.write_chunk(f"{path}/digest", np.frombuffer(digest_of(bits), np.uint8).reshape(1, -1), block.index, 0)
        return bits

    def _check(self, moves: Moves, base: np.ndarray) -> None:
        kind = self.block.kind
        if not kind.is_float:
            return
        if nonfinite(base, kind).any():
            raise CheckpointError(
                f"base: tensor {self.block.tensor.name}: NaN or Inf in an element that training changes; give another --base"
            )
        bad = nonfinite(moves.xor ^ base[moves.owner], kind)
        if bad.any():
            checkpoint = self.job.checkpoints[int(moves.step[bad].min())]
            raise CheckpointError(
                f"{checkpoint.label}: tensor {self.block.tensor.name}: NaN or Inf where the base has numbers; "
                f"leave this step out with --steps"
            )


class _Stream:
    """Fills the chunks of one array of moves, from the block's first place on."""

    def __init__(self, job: Job, block: Block, name: str) -> None:
        self.store, self.path = job.store, f"{job.path}/{block.kind.name}/{name}"
        array = job.store.array(self.path)
        self.chunk = np.zeros(array.chunks, array.dtype)
        self.filled = 0
        self.next = block.index * moves_room(job.store.block, len(job.checkpoints)) // len(self.chunk)

    def append(self, entries: np.ndarray) -> None:
        while len(entries):
            taken, entries = np.split(entries, [len(self.chunk) - self.filled])
            self.chunk[self.filled : self.filled + len(taken)] = taken
            self.filled += len(taken)
            if self.filled == len(self.chunk):
                self.flush()

    def flush(self) -> None:
        """Write the chunk, the rest of it zero, if there is anything in it."""
        if self.filled:
            self.chunk[self.filled :] = 0
            self.store.write_chunk(self.path, self.chunk, self.next)
            self.next, self.filled = self.next + 1, 0


def held(checkpoint: Checkpoint, block: Block, stack: ExitStack) -> Callable[[int, np.ndarray], None]:
    """What fills an array with a checkpoint's element bits, from an element of the block on; open until the stack ends."""
    itemsize = block.kind.itemsize
    first, nbytes = block.start * itemsize, block.size * itemsize
    read = stack.enter_context(checkpoint.held(block.tensor.name, first, nbytes))
    return lambda element, bits: read(first + element * itemsize, bits.data.cast("B"))


def read_block(checkpoint: Checkpoint, block: Block) -> np.ndarray:
    """The element bits [size] of a block in a checkpoint."""
    return read_bits(checkpoint, block.tensor.name, block.kind, block.start, block.size)


def read_bits(checkpoint: Checkpoint, name: str, kind: Kind, first: int, count: int) -> np.ndarray:
    """``count`` element bits of a tensor in a checkpoint, from element ``first`` on."""
    bits = np.empty(count, kind.bits)
    checkpoint.read(name, first * kind.itemsize, bits.data.cast("B"))
    return bits


def _stored_base(store: Store, block: Block) -> np.ndarray:
    """The base's bits out of the store: moves from other bits than its own would be worth nothing once it is mended."""
    bits = store.base_bits(block)
    if digest_of(bits) != store.digests("base", block).tobytes():
        raise StoreError(
            f"{store.shown}: base: tensor {block.tensor.name}: not the bits that were hashed; the store is damaged; "
            f"take the trajectory from a copy"
        )
    return bits


def _finished(job: Job, block: Block) -> np.ndarray | None:
    """Changed elements [K] of a block that an interrupted run wrote, if it is whole and fits its digests; else None."""
    try:
        digests = job.store.digests(job.path, block)
        base = job.store.base_bits(block)
        if digest_of(base) != job.store.digests("base", block).tobytes():
            return None
        state, counts = block_state(job.store, job.group, block, job.tile_bytes)
        return counts if (state == digests).all() else None
    except StoreError:
        return None
