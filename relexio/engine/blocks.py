"""Kernels over one block, element by element or a tile at a time, on NumPy or CuPy: its Gram matrix, operator, prediction."""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from relexio.dtypes import Array
from relexio.engine.device import failures, out_of_memory, to_device, to_host, zeros
from relexio.engine.tiles import Rows, compact, pieces, walk, window_tables, window_tiles
from relexio.errors import BudgetError, OverflowedError, RelexioWarning
from relexio.loops import dense, increments
from relexio.methods.linearity import LINEAR, VALUES, r_squared
from relexio.store.read import dense_width
from relexio.store.schema import Block
from relexio.store.store import Store

_NO_ROOM = "the device has no room for the smallest tile: give more --device-memory, end what else runs there, or use --device cpu"
T = TypeVar("T")
_SMALLEST_TILE = 1 << 12
_WAIT, _WAITS = 0.1, 20  # seconds, times
#: One text for all, so that Python shows it once for any number of blocks and threads.
_SHRUNK = (
    "the device ran out of memory; continuing with smaller tiles, which is slower; give more --device-memory or fewer "
    "--workers"
)


def _shrinking(kernel: Callable[..., T]) -> Callable[..., T]:
    """A kernel (..., tile bytes, device, block) that continues with half a tile where the device has no room for a whole one.

    It raises BudgetError if the smallest does not fit either, after it gave others time to finish theirs.
    """

    @wraps(kernel)
    def run(*arguments: Any) -> T:
        *bound, tile_bytes, device, block = arguments
        waits = iter(range(_WAITS))
        while True:
            try:
                return kernel(*bound, tile_bytes, device, block)
            except failures() as error:
                if not out_of_memory(error):
                    raise
                if tile_bytes <= _SMALLEST_TILE and next(waits, None) is None:
                    raise BudgetError(_NO_ROOM) from error
            warnings.warn(_SHRUNK, RelexioWarning, stacklevel=1)  # out here, since the error holds what did fit
            if tile_bytes <= _SMALLEST_TILE:
                time.sleep(_WAIT)
            tile_bytes = max(tile_bytes // 2, _SMALLEST_TILE)

    return run


@_shrinking
def gram_block(store: Store, steps: tuple[int, ...], tile_bytes: int, device: str, block: Block) -> list[np.ndarray]:
    """M M^T over one block, for the part of each of its tensors: float64 [T, T]."""
    rows = Rows.of(store, steps)
    totals = [zeros((rows.count, rows.count), device) for _ in block.pieces]
    if device == "cpu":
        base = store.base_bits(block)
        with walk(store, block, rows) as through:
            for piece, total in zip(block.pieces, totals, strict=True):
                through.gram(base, piece.span.stop, total)
    else:
        for place, f in _dense(store, block, rows, tile_bytes, device):
            totals[place] += f.T @ f
    return [rows.sum_up(rows.sum_up(to_host(total)).T) for total in totals]


def _dense(store: Store, block: Block, rows: Rows, nbytes: int, device: str) -> Iterator[tuple[int, Array]]:
    """F, some elements of one tensor at a time: the place of its piece, and float64 [n, R]."""
    base = store.base_bits(block)
    if device == "cpu":
        for place, span, moves in window_tiles(store, block, rows, nbytes):
            for some, bits in pieces(moves, base[span], dense_width(rows.count)):
                if len(some.row):
                    yield place, dense(some, increments(some, bits, block.kind), rows.count)
        return
    from relexio.loops import cuda

    for place, span, table in window_tables(store, block, rows, nbytes):
        yield place, cuda.increments(table, to_device(base[span], device), block.kind).T


@_shrinking
def operator_block(
    store: Store, steps: tuple[int, ...], x: dict[str, np.ndarray], tile_bytes: int, device: str, block: Block
) -> list[np.ndarray | None]:
    """M (M^T x) over one block, for the part of each tensor in x [T, k]: float64 [T, k], without ever holding T x T."""
    rows = Rows.of(store, steps)
    wanted = [x.get(piece.tensor.name) for piece in block.pieces]
    vectors = [None if some is None else to_device(rows.spread(some), device) for some in wanted]
    totals = [None if some is None else zeros(some.shape, device) for some in vectors]
    for place, f in _dense(store, block, rows, tile_bytes, device):
        if vectors[place] is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told where it is used
                totals[place] += f.T @ (f @ vectors[place])
    return [None if total is None else rows.sum_up(to_host(total)) for total in totals]


@_shrinking
def combine_block(
    store: Store,
    steps: tuple[int, ...],
    weights: dict[str, np.ndarray],
    targets: int,
    tile_bytes: int,
    device: str,
    block: Block,
) -> list[np.ndarray]:
    """theta_0 + M^T w over one block for weights [T, S] by tensor: element bits [size] for each of the S targets.

    Tensors without weights are as in the base. Raises RequestError where a prediction is not finite though the base is.
    """
    rows, base = Rows.of(store, steps), store.base_bits(block)
    results, wanted = np.tile(base, (targets, 1)), [weights.get(piece.tensor.name) for piece in block.pieces]
    spread = [None if w is None or not w.any() else rows.spread(w) for w in wanted]
    if any(w is not None for w in spread):
        for place, bad in _weigh(store, block, rows, base, spread, results, tile_bytes, device):
            if bad:
                tensor = block.pieces[place].tensor
                raise OverflowedError(
                    f"tensor {tensor.name}: the prediction overflows {tensor.dtype} in {bad} elements; predict a nearer step or "
                    f"give a smaller --strength"
                )
    return list(results)


def _weigh(
    store: Store,
    block: Block,
    rows: Rows,
    base: np.ndarray,
    weights: list[np.ndarray | None],
    results: np.ndarray,
    nbytes: int,
    device: str,
) -> Iterator[tuple[int, int]]:
    """Put base + F w into results [S, size] for those pieces that have weights [R, S]: their places, and how many are not finite
    though the base is."""
    if device == "cpu":
        with walk(store, block, rows) as through:
            for place, (piece, weight) in enumerate(zip(block.pieces, weights, strict=True)):
                if weight is None:
                    weight = np.zeros((rows.count, 0))  # passed over
                yield place, through.predict(base, piece.span.stop, weight, results[: weight.shape[1]])
        return
    from relexio.loops import cuda

    there = [None if weight is None else to_device(weight, device) for weight in weights]
    for place, span, table in window_tables(store, block, rows, nbytes):
        if there[place] is not None:
            bits, bad = cuda.predict(table, to_device(base[span], device), there[place], block.kind)
            results[:, span] = to_host(bits)
            yield place, int(to_host(bad)[0])


def linear_block(store: Store, steps: tuple[int, ...], tile_bytes: int, block: Block) -> np.ndarray:
    """Elements of a block that moved within a window; of those the linear ones; and both of those that took VALUES or more.

    int64 [4]. ``steps`` [T] are any of the store's; T > 2. Linear is what a line over the steps explains up to LINEAR.
    """
    rows, base = Rows.of(store, steps), store.base_bits(block)
    numbers, counts = np.array(steps, np.float64), np.zeros(4, np.int64)
    for _, span, moves in window_tiles(store, block, rows, tile_bytes):
        for some, bits in pieces(*compact(moves, base[span]), dense_width(rows.count)):
            values = np.cumsum(dense(some, increments(some, bits, block.kind), rows.count), axis=1)[:, rows.places]
            values -= values[:, :1].copy()
            values = values[values.any(axis=1)]
            linear = r_squared(numbers, values) > LINEAR
            several = np.count_nonzero(np.diff(np.sort(values, axis=1), axis=1), axis=1) + 1 >= VALUES
            counts += np.array([np.ones_like(linear), linear, several, linear & several]).sum(axis=1)
    return counts
