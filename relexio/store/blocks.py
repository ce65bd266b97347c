"""Writing one block of a segment, or of the base: chunks at fixed places, and a record of what was written.

A block whose record is there, and whose chunks have the hashes in it, is whole: an interrupted command goes on with it.
"""

import json
from dataclasses import dataclass

import numpy as np

from relexio.dtypes import KINDS
from relexio.store.arrays import MOVES
from relexio.store.chunks import chunk_key, load_chunk, short_hash
from relexio.store.schema import DIGEST, Block
from relexio.store.seal import hash_of
from relexio.store.storage import locate
from relexio.store.store import Store

#: Below a segment's group: a record of each block that is whole, while the segment is written.
FINISHED = "finished"


@dataclass(frozen=True)
class Written:
    """What was written of a block: entries of ``when`` and ``by`` [2], the hashes of their chunks, one array after the other,
    digests [K, 16], and how many more elements of each piece differ from the base than before all: int64 [pieces, K].

    Of a base: no entries, the hashes of the chunks of its bits, and one digest.
    """

    counts: tuple[int, ...]
    hashes: tuple[int, ...]
    digests: np.ndarray
    changed: np.ndarray

    def to_json(self) -> bytes:
        """As JSON, with a hash of itself in front."""
        changed = [[int(n) for n in row] for row in self.changed]
        value = [self.counts, self.hashes, self.digests.tobytes().hex(), changed]
        text = json.dumps(value).encode()
        return hash_of(text).encode() + text

    @classmethod
    def from_json(cls, data: bytes) -> "Written | None":
        """The record; None for one that was cut off."""
        text = data[32:]
        if hash_of(text).encode() != data[:32]:
            return None
        counts, hashes, digests, changed = json.loads(text)
        joined = np.frombuffer(bytes.fromhex(digests), np.uint8).reshape(-1, DIGEST)
        return cls(tuple(counts), tuple(hashes), joined, np.array(changed, np.int64).reshape(len(changed), -1))


class Chunks:
    """Fills chunks of an array with entries, and hands each over when it is full."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._chunk = np.zeros(shape, dtype)
        self._filled = 0

    def append(self, entries: np.ndarray) -> None:
        """Add entries behind those before."""
        while len(entries):
            room = len(self._chunk) - self._filled
            taken, entries = entries[:room], entries[room:]
            self._chunk[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            if self._filled == len(self._chunk):
                self.flush()

    def flush(self) -> None:
        """Hand the chunk over, the rest of it zero, if there is anything in it."""
        if self._filled:
            self._chunk[self._filled :] = 0
            self.put(self._chunk)
            self._filled = 0

    def put(self, chunk: np.ndarray) -> None:
        """Take a chunk, before its array is filled again."""
        raise NotImplementedError


class ChunkWriter(Chunks):
    """Writes the chunks of one array, from a block's first place on, or from the first."""

    def __init__(self, store: Store, path: str, block: Block | None = None) -> None:
        self._store, self._path, layout = store, path, store.array(path)
        super().__init__(layout.chunks, layout.dtype)
        room = layout.shape[0] // store.block_counts[block.kind.name] if block else 0
        self._next = block.index * room // layout.chunks[0] if block else 0
        self.count = 0
        self.hashes: list[int] = []

    def append(self, entries: np.ndarray) -> None:
        """Add entries behind those before."""
        self.count += len(entries)
        super().append(entries)

    def discard(self) -> None:
        """Remove what was written."""
        layout, location = self._store.array(self._path), locate(self._store.address)
        for number in range(self._next - len(self.hashes), self._next):
            location.discard(chunk_key(self._path, layout, number))

    def put(self, chunk: np.ndarray) -> None:
        """Write a chunk."""
        self.hashes.append(self._store.write_chunk(self._path, chunk, self._next))
        self._next += 1


class MovesWriter:
    """Writes the moves of one block of a segment."""

    def __init__(self, store: Store, path: str, block: Block) -> None:
        self._writers = [ChunkWriter(store, f"{path}/{block.kind.name}/{name}", block) for name in MOVES]

    def append(self, *entries: np.ndarray) -> None:
        """Add ``when`` and ``by`` of the next moves."""
        for writer, part in zip(self._writers, entries, strict=True):
            writer.append(part)

    def discard(self) -> None:
        """Remove what was written."""
        for writer in self._writers:
            writer.discard()

    def close(self, digests: np.ndarray, changed: np.ndarray) -> Written:
        """Write what is left, and say what was written."""
        for writer in self._writers:
            writer.flush()
        counts, hashes = [w.count for w in self._writers], [h for w in self._writers for h in w.hashes]
        return Written(tuple(counts), tuple(hashes), digests, changed)


class BaseWriter(ChunkWriter):
    """Writes the base's bits of a block."""

    def __init__(self, store: Store, block: Block) -> None:
        super().__init__(store, f"base/{block.kind.name}/bits", block)
        self._pieces = len(block.pieces)

    def close(self, digest: np.ndarray) -> Written:
        """Write what is left, and say what was written."""
        self.flush()
        return Written((), tuple(self.hashes), digest, np.zeros((self._pieces, 1), np.int64))


def mark_finished(store: Store, path: str, block: Block, written: Written) -> None:
    """Record that a block is whole."""
    locate(store.address).put(_record(path, block), written.to_json())


def finished(store: Store, path: str, block: Block) -> Written | None:
    """The record of a block of a segment, or of the base, if it is whole; else None."""
    location = locate(store.address)
    data = location.get(_record(path, block))
    written = Written.from_json(data) if data is not None else None
    if written is None:
        return None
    hashes = iter(written.hashes)
    parts = zip(MOVES, written.counts, strict=True) if written.counts else [("bits", block.size)]
    for name, count in parts:
        layout = store.array(f"{path}/{block.kind.name}/{name}")
        first = block.index * (layout.shape[0] // store.block_counts[block.kind.name]) // layout.chunks[0]
        for number in range(first, first - (-count // layout.chunks[0])):
            try:
                found = short_hash(load_chunk(location, f"{path}/{block.kind.name}/{name}", layout, number))
            except ValueError:
                return None
            if found != next(hashes, None):
                return None
    return written


def _record(path: str, block: Block) -> str:
    return f"{path}/{FINISHED}/{block.kind.name}-{block.index}"


def write_small(store: Store, path: str, written: list[tuple[Block, Written]]) -> None:
    """Write what a segment, or the base, says of its blocks: index, hashes and digests."""
    for kind in KINDS:
        own = [record for block, record in written if block.kind.name == kind]  # in the order of the blocks
        if not own:
            continue
        _write_hashes(store, f"{path}/{kind}", own)
        _write_all(store, f"{path}/{kind}/digest", [record.digests for record in own])
        if own[0].counts:
            _write_all(store, f"{path}/{kind}/index", [np.array([record.counts]) for record in own])


def _write_hashes(store: Store, path: str, own: list[Written]) -> None:
    """Block by block: where all chunks of all blocks have a place, that array may be larger than what is held of it."""
    writer = ChunkWriter(store, f"{path}/hashes")
    each = store.array(f"{path}/hashes").shape[0] // len(own)
    chunk = store.array(f"{path}/{'by' if own[0].counts else 'bits'}").chunks[0]
    for record in own:
        row = np.zeros(each, np.uint64)
        first = -(-record.counts[0] // chunk) if record.counts else len(record.hashes)
        row[:first] = record.hashes[:first]
        row[each // 2 :][: len(record.hashes) - first] = record.hashes[first:]
        writer.append(row)
    writer.flush()


def _write_all(store: Store, path: str, parts: list[np.ndarray]) -> None:
    layout = store.array(path)
    rows = layout.chunks[0]
    for number, first in enumerate(range(0, len(parts), rows)):
        some = np.concatenate(parts[first : first + rows]).reshape(-1, *layout.shape[1:])
        chunk = np.zeros(layout.chunks, layout.dtype)
        chunk[: len(some)] = some
        store.write_chunk(path, chunk, number)
