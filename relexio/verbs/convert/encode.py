"""One block of ``convert``: read it at every step, find the moves from one to the next, hash, check, write.

A task knows its checkpoints and the store's address, writes whole chunks at fixed places, and its record last; so it can
run in any order or process, and again.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from xxhash import xxh3_128

from relexio.checkpoints.protocol import Checkpoint
from relexio.dtypes import Kind, nonfinite
from relexio.errors import CheckpointError
from relexio.loops import find
from relexio.store.blocks import BaseWriter, MovesWriter, Written, finished, mark_finished
from relexio.store.read import observed
from relexio.store.schema import DIGEST, Block, Piece, Segment
from relexio.store.store import Store

#: Elements that are read at once where there are many states: a read of a hundred kB costs little more than one of ten; and
#: bytes of all states where there are few: they are hashed and compared in the cache.
_READ, _CACHED = 1 << 16, 1 << 20
#: Bytes of all states that are read ahead at a time: a disk that answers late gives its bandwidth to many reads in flight.
_AHEAD = 1 << 25
#: Checkpoints that are open for that besides, where pieces are small; each has a file or two.
OPEN_AHEAD = 256
BASE = "base"
#: Fills an array with element bits of a piece, from an element of it on.
Fill = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Job:
    """All that a block's task needs: the store, the segment being written, its checkpoints, and the base's, if that is new.

    ``stored`` has checkpoints of the base and of the last stored step, where their files are still those that were stored.
    ``open_ahead``: checkpoints that may be open besides those that are read.
    """

    store: Store
    segment: Segment
    checkpoints: tuple[Checkpoint, ...]
    base: Checkpoint | None
    stored: tuple[Checkpoint | None, Checkpoint | None]
    tile_bytes: int
    resumed: bool
    open_ahead: int = OPEN_AHEAD


def encode_block(job: Job, block: Block) -> tuple[Written, Written | None]:
    """Write one block of the segment, and of a new base; say what was written of both.

    What an earlier run wrote whole is kept.
    Raises CheckpointError for a file that ends early, or NaN and Inf that the base lacks.
    """
    if job.resumed:
        base = finished(job.store, BASE, block) if job.base else None
        done = finished(job.store, job.segment.path, block)
        if done is not None and (base is not None or job.base is None):
            return done, base
    encoder = _Encoder(job, block, job.stored)
    try:
        return encoder.run()
    except _OtherBits:
        encoder.writer.discard()
        return _Encoder(job, block, (None, None)).run()


#: Where a state's bits come from; None: they are the base's.
_Source = Checkpoint | np.ndarray | None
#: Which piece, a part of it, what fills an array with each state of that, and what closes their files.
_Strip = tuple[int, Piece, list[Fill | None], ExitStack]


class _OtherBits(Exception):  # noqa: N818  it is no error: there is another way
    """A checkpoint that was stored has gone, or its files are no longer those that were."""


@contextmanager
def _going() -> Iterator[None]:
    """A trainer may remove a stored checkpoint at any time."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise _OtherBits from error


class _Encoder:
    """Goes through the states of a block, a tile at a time: the base, the step before, the new steps."""

    def __init__(self, job: Job, block: Block, stored: tuple[Checkpoint | None, Checkpoint | None]) -> None:
        self.job, self.block, self.kind, self.stored = job, block, block.kind, stored
        self.columns = len(job.checkpoints)
        self.writer = MovesWriter(job.store, job.segment.path, block)
        self.base_writer = BaseWriter(job.store, block) if job.base else None
        self.changed = np.zeros((len(block.pieces), self.columns), np.int64)
        self.hashes = [xxh3_128() for _ in range(self.columns + 2)]
        self.last = -1

    def run(self) -> tuple[Written, Written | None]:
        """Write the block. Raises _OtherBits where a stored checkpoint is not as it was."""
        job, block = self.job, self.block
        sources = self._base(), self._before(), *job.checkpoints
        element = len(sources) * self.kind.itemsize
        wide = min(max(64, min(max(_READ, _CACHED // element), 4 * job.tile_bytes // element)), block.size)
        buffer = np.empty((len(sources), wide), self.kind.bits)
        with closing(self._strips(sources, max(_AHEAD // element // wide, 1) * wide)) as strips:
            for place, strip, fills, stack in strips:
                with stack:
                    for first in range(0, strip.size, wide):
                        rows = buffer[:, : strip.size - first]
                        self._read(rows, fills, first)
                        self._take(place, rows, strip.first + first)
        self._require_stored()
        of_base = self.base_writer.close(_joined(self.hashes[:1])) if self.base_writer else None
        if of_base is not None:
            mark_finished(job.store, BASE, block, of_base)
        written = self.writer.close(_joined(self.hashes[2:]), self.changed)
        mark_finished(job.store, job.segment.path, block, written)
        return written, of_base

    def _strips(self, sources: tuple[_Source, ...], longest: int) -> Generator[_Strip, None, None]:
        """The block's pieces in strips of elements, those that follow opened before: what is held is read ahead."""
        waiting: deque[_Strip] = deque()
        parts = ((i, at) for i, piece in enumerate(self.block.pieces) for at in range(0, piece.size, longest))
        with ExitStack() as every:
            for place, at in parts:
                piece, stack = self.block.pieces[place], every.enter_context(ExitStack())
                size = min(longest, piece.size - at)
                strip = replace(piece, start=piece.start + at, size=size, first=piece.first + at)
                waiting.append((place, strip, [self._fill(source, strip, stack) for source in sources], stack))
                while (
                    len(waiting) * len(sources) > self.job.open_ahead
                    or sum(part.size for _, part, *_ in waiting) > longest
                ):
                    yield waiting.popleft()
            yield from waiting

    def _base(self) -> Checkpoint | np.ndarray:
        """Where the base's bits come from: its files, if it is new or they still are what was stored; else the store."""
        job, block = self.job, self.block
        if job.base is None and self.stored[0] is not None:
            job.store.check_base_bits(block)  # a damaged base takes no more steps: nobody could restore them
        return job.base or self.stored[0] or job.store.base_bits(block)

    def _before(self) -> _Source:
        """Where those of the last stored step come from; None: they are the base's."""
        store = self.job.store
        if not store.segments:
            return None
        return self.stored[1] or observed(store, self.block, store.segments[-1].steps[-1])

    def _fill(self, source: _Source, piece: Piece, stack: ExitStack) -> Fill | None:
        if source is None:
            return None
        if isinstance(source, np.ndarray):
            part = source[piece.span]
            return lambda first, row: np.copyto(row, part[first : first + len(row)])
        if not any(source is stored for stored in self.stored):
            return held(source, piece, stack)
        with _going():
            return _going()(held(source, piece, stack))

    def _read(self, rows: np.ndarray, fills: list[Fill | None], first: int) -> None:
        for row, fill, hashed in zip(rows, fills, self.hashes, strict=True):
            if fill is None:
                row[:] = rows[0]
            else:
                fill(first, row)
                hashed.update(row.data)
        if self.base_writer:
            self.base_writer.append(rows[0])

    def _take(self, place: int, rows: np.ndarray, first: int) -> None:
        """Append the moves in states [K + 2, n], which begin at element ``first`` of the block."""
        found = find(rows[1:], rows[0], self.kind, first, self.last)
        self.last = found.last
        self.writer.append(found.when, found.by)
        self.changed[place] += found.changed
        if found.lost:
            if any(self.stored):  # whose bits nobody has compared yet
                raise _OtherBits
            self._refuse(place, rows[1:])

    def _require_stored(self) -> None:
        """Raise _OtherBits where bits that were taken from stored checkpoints are not those that were stored."""
        store = self.job.store
        paths = BASE, store.segments[-1].path if store.segments else BASE
        for stored, path, hashed in zip(self.stored, paths, self.hashes, strict=False):
            known = store.digests(path, self.block).reshape(-1, DIGEST)[-1] if stored else None
            if known is not None and hashed.digest() != known.tobytes():
                raise _OtherBits

    def _refuse(self, place: int, rows: np.ndarray) -> None:
        name = self.block.pieces[place].tensor.name
        moved = rows[1:] != rows[:-1]
        if (nonfinite(rows[0], self.kind) & moved.any(axis=0)).any():
            raise CheckpointError(
                f"base: tensor {name}: NaN or Inf in an element that training changes; give another --base"
            )
        first = int(np.argmax((nonfinite(rows[1:], self.kind) & moved).any(axis=1)))
        raise CheckpointError(
            f"{self.job.checkpoints[first].label}: tensor {name}: NaN or Inf where the base has numbers; "
            f"leave this step out with --steps"
        )


def _joined(hashes: list[xxh3_128]) -> np.ndarray:
    return np.frombuffer(b"".join(hashed.digest() for hashed in hashes), np.uint8).reshape(-1, DIGEST)


def held(checkpoint: Checkpoint, piece: Piece, stack: ExitStack) -> Fill:
    """What fills an array with a checkpoint's element bits, from an element of the piece on; open until the stack ends."""
    itemsize = piece.tensor.kind.itemsize
    first, nbytes = piece.start * itemsize, piece.size * itemsize
    read = stack.enter_context(checkpoint.held(piece.tensor.name, first, nbytes))
    return lambda element, bits: read(first + element * itemsize, bits.data.cast("B"))


def read_block(checkpoint: Checkpoint, block: Block) -> np.ndarray:
    """The element bits [size] of a block in a checkpoint."""
    bits = np.empty(block.size, block.kind.bits)
    for piece in block.pieces:
        read_into(checkpoint, piece, bits[piece.span])
    return bits


def read_into(checkpoint: Checkpoint, piece: Piece, bits: np.ndarray) -> None:
    """Fill an array [size] with the element bits of a piece in a checkpoint."""
    checkpoint.read(piece.tensor.name, piece.start * piece.tensor.kind.itemsize, bits.data.cast("B"))


def read_bits(checkpoint: Checkpoint, name: str, kind: Kind, first: int, count: int) -> np.ndarray:
    """Some element bits [count] of a tensor in a checkpoint."""
    bits = np.empty(count, kind.bits)
    checkpoint.read(name, first * kind.itemsize, bits.data.cast("B"))
    return bits
