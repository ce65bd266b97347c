"""About how large a store will be, from some blocks of a few steps: what ``convert --dry-run`` says of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from relexio.checkpoints.protocol import Checkpoint
from relexio.loops import find
from relexio.store.arrays import file_array
from relexio.store.blocks import Chunks
from relexio.store.chunks import encode
from relexio.store.read import observed
from relexio.store.schema import BASE_CHUNK, FILE_CHUNK, Block, blocks_of, lay_out, moves_chunk
from relexio.store.store import file_digest
from relexio.verbs.convert.encode import read_block
from relexio.verbs.convert.request import Conversion
from relexio.words import describe_steps, show

_BLOCKS = 8  # of each kind of elements
_TILE = 1 << 16  # elements whose moves are found at a time

#: The element bits [size] of a block in one state of the chain.
Bits = Callable[[Block], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """Bytes that a conversion will write, about, and what that was made of: ``blocks`` at these steps, and of the base."""

    bytes: int
    blocks: int
    steps: tuple[int, ...]
    base: bool

    def __str__(self) -> str:
        of = f"{'the base and ' if self.base else ''}{describe_steps(self.steps)}"
        return f"about {show(self.bytes)} (estimated from {self.blocks} block{'s' * (self.blocks > 1)} of {of})"


@dataclass(frozen=True)
class _Pair:
    """A new step and the state before it, and how many steps are taken to be as this one."""

    before: Bits
    after: Checkpoint
    count: int


def estimate(conversion: Conversion) -> Estimate | None:
    """Estimate what a conversion will write; None where there is nothing to add.

    Some blocks, evenly spread over the model, are encoded as ``convert`` does: in the base of a new store, in the first new
    step after the state before it, and in the later of two neighbouring steps, which all others are taken to be like. One
    block at a time is held, in two states and a copy. What the store says about itself, some kB, is not counted.
    Raises a RelexioError as ``convert`` does for what cannot be read.
    """
    if not conversion.checkpoints:
        return None
    (step, before), steps = _before(conversion), conversion.checkpoints
    middle, more = (len(steps) - 1) // 2, len(steps) - 1
    pairs = [_Pair(before, steps[0], 1)]
    if more:
        pairs.append(_Pair(partial(read_block, steps[middle]), steps[middle + 1], more))
    total, count = _of_files(conversion, steps[0], steps[middle + (more > 0)], more), 0
    for _, of_kind in groupby(_blocks(conversion), key=lambda block: block.kind.name):
        blocks = list(of_kind)
        places = sorted({(2 * i + 1) * len(blocks) // (2 * _BLOCKS) for i in range(_BLOCKS)})
        sample = [blocks[place] for place in places]
        written = sum(_of_block(conversion, block, pairs) for block in sample)
        total += written * sum(block.size for block in blocks) / sum(block.size for block in sample)
        count += len(sample)
    seen = {c.step for c in (steps[0], *(steps[middle : middle + 2] if more else ()))} | {step}
    return Estimate(round(total), count, tuple(sorted(s for s in seen if s is not None)), step is None)


def _blocks(conversion: Conversion) -> tuple[Block, ...]:
    if conversion.store is not None:
        return conversion.store.blocks
    return blocks_of(lay_out(conversion.read[0].tensors, conversion.block), conversion.block)


def _before(conversion: Conversion) -> tuple[int | None, Bits]:
    """The state before the first new step, and its step: the last of the chain that stays, or the base (None)."""
    store = conversion.store
    if store is None:
        return None, partial(read_block, conversion.read[0])
    step = next((step for step in reversed([*store.chain]) if step not in conversion.forgotten), None)
    return step, store.base_bits if step is None else partial(observed, store, step=step)


def _of_block(conversion: Conversion, block: Block, pairs: list[_Pair]) -> int:
    """Bytes that a block takes: of a new base, and of the steps of the pairs and all that are like them."""
    base = 0 if conversion.store else _of_bits(read_block(conversion.read[0], block), min(conversion.block, BASE_CHUNK))
    return base + sum(pair.count * _of_moves(conversion.block, block, pair) for pair in pairs)


def _of_moves(size: int, block: Block, pair: _Pair) -> int:
    """Bytes of a block's moves from one state to the next."""
    rows = np.empty((2, block.size), block.kind.bits)
    rows[0] = pair.before(block)
    rows[1] = read_block(pair.after, block)
    measured = [_Measured(moves_chunk(size, 1), dtype) for dtype in (np.dtype(np.uint8), np.dtype(block.kind.bits))]
    last = -1
    for at in range(0, block.size, _TILE):
        part = rows[:, at : at + _TILE]
        found = find(part, part[0], block.kind, at, last)
        last = found.last
        for chunks, entries in zip(measured, (found.when, found.by), strict=True):
            chunks.append(entries)
    return sum(chunks.close() for chunks in measured)


class _Measured(Chunks):
    """Chunks of which only the size is wanted."""

    def __init__(self, count: int, dtype: np.dtype) -> None:
        super().__init__((count,), dtype)
        self._bytes = 0

    def put(self, chunk: np.ndarray) -> None:
        """Count what the chunk would take."""
        self._bytes += len(encode(chunk))

    def close(self) -> int:
        """Bytes of all chunks."""
        self.flush()
        return self._bytes


def _of_bits(entries: np.ndarray, chunk: int) -> int:
    measured = _Measured(chunk, entries.dtype)
    measured.append(entries)
    return measured.close()


def _of_files(conversion: Conversion, first: Checkpoint, later: Checkpoint, count: int) -> float:
    """Bytes of headers and side files: those of a new base and of the first new step, and ``count`` times those that a
    ``later`` one has of its own, such as what a trainer says of each step."""
    known = set(conversion.store.metadata) if conversion.store else set[str]()
    total = 0.0
    for checkpoint, times in (*((c, 1) for c in conversion.read if c.step in (None, first.step)), (later, count)):
        contents: dict[str, bytes | Path] = {}
        checkpoint.record(partial(_take, contents))
        total += times * sum(_of_file(data) for name, data in contents.items() if name not in known)
        known |= contents.keys()
    return total


def _take(contents: dict[str, bytes | Path], data: bytes | Path) -> str:
    """Keep a file by the name that it will have."""
    name = f"files/{file_digest(data)}"
    contents[name] = data
    return name


def _of_file(data: bytes | Path) -> float:
    """Bytes that a file takes; of a large one, as its first chunk does."""
    if isinstance(data, bytes):
        size, begin = len(data), data[:FILE_CHUNK]
    else:
        with open(data, "rb") as file:
            size, begin = data.stat().st_size, file.read(FILE_CHUNK)
    return _of_bits(np.frombuffer(begin, np.uint8), file_array(size).chunks[0]) * max(1.0, size / FILE_CHUNK)
