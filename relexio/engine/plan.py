"""Memory as a promise in bytes: how many workers, and how much each holds at a time. Pure arithmetic, before any read.

Every figure is an upper bound for dense data (each element changed at each step), so that the promise does not depend
on what RL did to the model. Peak resident size = what the process holds already + what its workers hold.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relexio.engine.process import cores
from relexio.errors import BudgetError
from relexio.store.read import dense_width
from relexio.store.schema import MOVES_CHUNK, moves_chunk
from relexio.words import show

if TYPE_CHECKING:
    from relexio.store.store import Store

DEFAULT_MEMORY = 2_000_000_000
#: Threads, allocator slack, the scheduler, and libraries still to be loaded (measured: 20 to 35 MB).
OVERHEAD = 64 << 20
#: MB by which what a program holds differs from one run to the next (measured: 1).
_DIFFER = 3
#: A fresh worker process of a Dask cluster with all that it imports (measured: 73 MB).
PROCESS = 96 << 20
#: What starting such processes adds to the one that starts them: scheduler, client, resource tracker (measured: 28 MB).
PROCESSES = 48 << 20
_TILES = ((2 << 20, 1 << 20, 1 << 19),)  # small enough for the caches
#: For a device. A tile is some ten calls under Python's lock, however small it is: below 8 MB it is these that take
#: the time, so that fewer workers with larger tiles are the better plan.
_DEVICE_TILES = (tuple(1 << n for n in range(29, 22, -1)), tuple(1 << n for n in range(22, 15, -1)))
#: A tile of F as the matrix-free pass has it, where each of its numbers is a move: place, owner, bits, value and the value before.
_PER_TILE = 8.0
#: A tile of F on a device and its table of changes, of half the size at most, and those of the tile before, which may still
#: be there; portions of bytes with running sums; and something for what CuPy takes itself and for gaps between its blocks.
#: tests/test_gpu.py sees up to 2.6, chunks included.
_PER_DEVICE_TILE = 4.0
#: A decoded chunk on a device, with running sums of 8 bytes for each byte that says when.
_PER_CHUNK = 4
#: What is copied to a device, in pinned memory in powers of two, some of which a stream has yet to pass.
_PINNED = 4
#: Bytes that say when moves are, which are copied to a device at once: more of them are fewer calls.
_PORTION = 1 << 20
#: Resident bytes of CuPy, the CUDA libraries and a context on the host (measured: 450 to 490 MB; H100, CUDA 13, CuPy 14.2).
CUDA = 512 << 20
#: Seconds of one core that a device saves for a pair of moves of one element (measured: 0.14e-9 to 0.17e-9, T = 40 to 400); and
#: those of a pass that make it worth it: three times what CUDA's start took.
_PAIR, WORTH_CUDA = 0.16e-9, 2.0
#: Threads of a pass where no number is asked for. On 16 cores, a fit of 160 M elements times 40 steps took 2.4 s with 8 and 3.5 s
#: with 16, when moves were still put into tables.
MOST_THREADS = 8


@dataclass(frozen=True)
class Plan:
    """How a job runs: ``workers`` at once, each with tiles of ``tile_bytes``; bytes of memory projected and allowed."""

    workers: int
    tile_bytes: int
    projected: int
    allowed: int

    def __str__(self) -> str:
        return f"{show(self.projected)} projected, {show(self.allowed)} allowed, {self.workers} workers"

    def to_json(self) -> dict[str, Any]:
        """For scripts: bytes and workers."""
        return {"memory_projected": self.projected, "memory_allowed": self.allowed, "workers": self.workers}


@dataclass(frozen=True)
class Need:
    """What one worker holds: ``fixed`` bytes, ``per_tile`` bytes for every byte of a tile; the same on a device, and what it
    holds ``beside`` a device on the host."""

    fixed: int
    per_tile: float
    device_fixed: int = 0
    device_per_tile: float = 0.0
    beside: int = 0

    def bytes(self, tile: int) -> int:
        """With tiles of that many bytes, and no device."""
        return int(self.fixed + self.per_tile * tile)

    def device_bytes(self, tile: int) -> int:
        """On a device, with tiles of that many bytes."""
        return int(self.device_fixed + self.device_per_tile * tile)


def portion(tile: int) -> int:
    """Bytes that say when moves are, of all segments together, for a device with tiles of that many bytes."""
    return min(tile // 32, _PORTION)


def convert_need(block: int, itemsize: int, steps: int, segments: int, scratch: int = 0) -> Need:
    """A block of ``convert``: bits of the base, the step before and one more, chunks, notes; per tile its bits and moves.

    So many ``segments`` are read at once: to have the step before, or to make them one. ``scratch`` is what reading a step
    takes besides.
    """
    streams = (segments + 3) * MOVES_CHUNK * (1 + itemsize)  # one is written; two copies of it, as it is packed
    return Need(block * 3 * itemsize + streams + steps * 4096 + scratch, 8.0 + 48.0 / itemsize)


@dataclass(frozen=True)
class Shape:
    """The largest block of a store, in elements and bytes an element; how many tensors share one at most; and bytes of a
    decoded chunk of moves of every segment (and of the largest twice more, while it is decoded)."""

    block: int
    itemsize: int
    pieces: int
    chunks: int

    @classmethod
    def of(cls, store: "Store") -> "Shape":
        """That of a store."""
        itemsize = max((tensor.kind.itemsize for tensor in store.tensors if tensor.size), default=1)
        block = max((block.size for block in store.blocks), default=1)
        chunks = [moves_chunk(store.block, segment.columns) * (1 + itemsize) for segment in store.segments]
        pieces = max((len(block.pieces) for block in store.blocks if block.kind.is_float), default=1)
        return cls(block, itemsize, pieces, sum(chunks) + 2 * max(chunks))

    @property
    def bytes(self) -> int:
        """A block with its base bits, and the decoded chunks."""
        return self.block * 2 * self.itemsize + self.chunks

    @property
    def beside(self) -> int:
        """The same beside a device, and what is copied to it."""
        portions = _PORTION * (1 + self.itemsize) + self.chunks
        return self.bytes + 2 * portions + _PINNED * (self.block * self.itemsize + portions)


def fit_need(shape: Shape, steps: int, whole: bool) -> Need:
    """A block of a fit, and T x T numbers if ``whole``."""
    each = 8 * steps * steps if whole else 64 * 8 * steps  # the Krylov space: a few columns a pass
    square = (3 + shape.pieces) * each
    there = square + _PER_CHUNK * shape.chunks
    return Need(shape.bytes + square, 0.0 if whole else _PER_TILE, there, _PER_DEVICE_TILE, shape.beside + square)


def combine_need(shape: Shape, steps: int, targets: int) -> Need:
    """A block of the combine pass, and its result for every target."""
    result, share = 2 * shape.block * shape.itemsize * targets, targets / max(steps, 1)
    there = 2 * 8 * steps * targets * shape.pieces + _PER_CHUNK * shape.chunks
    beside = shape.beside + result + shape.block * shape.itemsize * targets
    return Need(shape.bytes + result, 0.0, there, _PER_DEVICE_TILE + 2.0 * share, beside)


def linear_need(shape: Shape, rows: int) -> Need:
    """A block, and some elements of it at every row of the chain: bits, values, and what is made of both."""
    return Need(shape.bytes + 8 * (8 * rows * dense_width(rows)), _PER_TILE)


def saved(moves: int, elements: int, workers: int) -> float:
    """Seconds at least that a device saves of a Gram pass: those in which pairs of moves are multiplied on the CPU.

    What else it saves, it loses again: moves have to be read for it too (docs/performance.md). Moves that are spread evenly
    over all elements have the fewest pairs.
    """
    return _PAIR * moves * moves / (2 * max(elements, 1)) / workers


def gram_bytes(steps: int, tensors: int, small: int) -> int:
    """One Gram matrix over T = ``steps`` and its copies, and all of them where they are kept whole, up to ``small``."""
    return 4 * 8 * steps * steps + 2 * min(small, 8 * steps * steps * tensors)


def make(
    need: Need,
    memory: int,
    held: int,
    workers: int | None,
    shared: int = 0,
    each: int = 0,
    device_memory: int | None = None,
) -> Plan:
    """The plan with most workers, then the largest tiles, that fits ``memory`` bytes, and those of a device if given.

    The program held ``held`` bytes before the job, ``shared`` bytes are held once, ``each`` by every worker beside its need.
    Raises BudgetError, naming projected and allowed bytes, where one worker does not fit.
    """
    held += OVERHEAD + shared
    sizes = _TILES if device_memory is None else _DEVICE_TILES
    for tiles in sizes:
        for count in range(workers or cores(), 0, -1):
            for tile in tiles:
                worker = each + (need.bytes(tile) if device_memory is None else need.beside)
                projected, on_device = held + count * worker, count * need.device_bytes(tile)
                if projected <= memory and (device_memory is None or on_device <= device_memory):
                    return Plan(count, tile, projected, memory)
    smallest = sizes[-1][-1]
    on_device = need.device_bytes(smallest)
    if device_memory is not None and on_device > device_memory:
        raise BudgetError(
            f"--device-memory {show(device_memory)} is too small: one worker needs {show(on_device)}; give more"
        )
    raise BudgetError(
        f"--memory {show(memory)} is too small: one worker needs {show(held + worker)} "
        f"({show(held)} for the program, {show(worker)} for the worker); give --memory "
        f"{-(-(held + worker) // 10**6) + _DIFFER}MB or more"
    )


def make_processes(
    need: Need, memory: int, held: int, workers: int | None, shared: int = 0, device_memory: int | None = None
) -> Plan:
    """As ``make``, where each worker is a process of its own: ``memory`` covers them all, and the one that starts them.

    What threads hold once, ``shared`` bytes, every process holds. Raises BudgetError.
    """
    return make(need, memory, held + PROCESSES, workers, shared, PROCESS + OVERHEAD + shared, device_memory)
