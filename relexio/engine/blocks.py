"""Kernels over one block, a tile at a time, on NumPy or CuPy: its Gram matrix, operator and prediction."""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from relexio.dtypes import Array, from_float64, nonfinite, to_float64
from relexio.engine.device import out_of_memory, to_device, to_host, zeros
from relexio.engine.tiles import Rows, compact, on_device, pieces, window_tiles
from relexio.errors import BudgetError, OverflowedError, RelexioWarning
from relexio.loops import Moves, dense, gram, increments, plain, predict
from relexio.methods.linearity import LINEAR, VALUES, r_squared
from relexio.store.read import dense_width
from relexio.store.schema import Block
from relexio.store.store import Store

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
            except out_of_memory() as error:
                if tile_bytes <= _SMALLEST_TILE and next(waits, None) is None:
                    raise BudgetError("--device-memory is too small for the smallest tile; give more") from error
            warnings.warn(_SHRUNK, RelexioWarning, stacklevel=1)  # out here, since the error holds what did fit
            if tile_bytes <= _SMALLEST_TILE:
                time.sleep(_WAIT)
            tile_bytes = max(tile_bytes // 2, _SMALLEST_TILE)

    return run


@_shrinking
def gram_block(store: Store, steps: tuple[int, ...], tile_bytes: int, device: str, block: Block) -> list[np.ndarray]:
    """M M^T over one block, for the part of each of its tensors: float64 [T, T]."""
    rows, base = Rows.of(store, steps), store.base_bits(block)
    totals = [zeros((rows.count, rows.count), device) for _ in block.pieces]
    for place, span, moves in window_tiles(store, block, rows, tile_bytes):
        if device == "cpu":
            gram(moves, base[span], block.kind, totals[place])
            continue
        for f in _dense(moves, base[span], block, rows.count, tile_bytes, device):
            with np.errstate(over="ignore", invalid="ignore"):
                totals[place] += f.T @ f
    return [rows.sum_up(rows.sum_up(to_host(total)).T) for total in totals]


def _dense(moves: Moves, bits: np.ndarray, block: Block, rows: int, nbytes: int, device: str) -> Iterator[Array]:
    """F, some elements at a time: float64 [n, R]. On a device, only of those that move, about ``nbytes``."""
    if device == "cpu":
        for _, some, base in pieces(moves, bits, dense_width(rows)):
            if len(some.row):
                yield dense(some, increments(some, base, block.kind), rows)
        return
    _, moving, start = compact(moves, bits)
    for _, some, base in pieces(moving, start, max(64, nbytes // (8 * rows))):
        there, on = on_device(some, base, device)
        yield plain.dense(there, plain.increments(there, on, block.kind), rows)


@_shrinking
def operator_block(
    store: Store, steps: tuple[int, ...], x: dict[str, np.ndarray], tile_bytes: int, device: str, block: Block
) -> list[np.ndarray | None]:
    """M (M^T x) over one block, for the part of each tensor in x [T, k]: float64 [T, k], without ever holding T x T."""
    rows, base = Rows.of(store, steps), store.base_bits(block)
    wanted = [x.get(piece.tensor.name) for piece in block.pieces]
    vectors = [None if some is None else to_device(rows.spread(some), device) for some in wanted]
    totals = [None if some is None else zeros(some.shape, device) for some in vectors]
    for place, span, moves in window_tiles(store, block, rows, tile_bytes):
        if vectors[place] is not None:
            for f in _dense(moves, base[span], block, rows.count, tile_bytes, device):
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
    results = [base.copy() for _ in range(targets)]
    wanted = [weights.get(piece.tensor.name) for piece in block.pieces]
    spread = [None if w is None or not w.any() else rows.spread(w) for w in wanted]
    if all(w is None for w in spread):
        return results
    weigh = _weigh if device == "cpu" else _weigh_on_device
    for place, span, moves in window_tiles(store, block, rows, tile_bytes):
        weight = spread[place]
        if weight is not None and len(moves.row):
            bad = weigh(moves, base[span], weight, block, [r[span] for r in results], tile_bytes, device)
            if bad:
                raise OverflowedError(
                    f"tensor {block.pieces[place].tensor.name}: the prediction overflows "
                    f"{block.pieces[place].tensor.dtype} in {bad} elements; predict a nearer step or give a smaller --strength"
                )
    return results


def _weigh(moves: Moves, base: np.ndarray, weight: np.ndarray, block: Block, results: list[np.ndarray], *_: Any) -> int:
    """Put base + F w into results; how many are not finite though the base is."""
    bits, bad = predict(moves, base, weight, block.kind)
    for result, line in zip(results, bits, strict=True):
        result[:] = line
    return bad


def _weigh_on_device(
    moves: Moves,
    base: np.ndarray,
    weight: np.ndarray,
    block: Block,
    results: list[np.ndarray],
    nbytes: int,
    device: str,
) -> int:
    places, moving, start = compact(moves, base)
    on, bad = to_device(weight, device), 0
    for span, some, bits in pieces(moving, start, max(64, nbytes // (8 * len(weight)))):
        there, before = on_device(some, bits, device)
        with np.errstate(over="ignore", invalid="ignore"):
            values = plain.dense(there, plain.increments(there, before, block.kind), len(weight)) @ on
            values += to_float64(before.reshape(-1, 1), block.kind)
        after = from_float64(values, block.kind)
        bad += int((nonfinite(after, block.kind) & ~nonfinite(before, block.kind).reshape(-1, 1)).sum())
        for result, column in zip(results, to_host(after).T, strict=True):
            result[places[span]] = column
    return bad


def linear_block(store: Store, steps: tuple[int, ...], tile_bytes: int, block: Block) -> np.ndarray:
    """Elements of a block that moved within a window; of those the linear ones; and both of those that took VALUES or more.

    int64 [4]. ``steps`` [T] are any of the store's; T > 2. Linear is what a line over the steps explains up to LINEAR.
    """
    rows, base = Rows.of(store, steps), store.base_bits(block)
    numbers, counts = np.array(steps, np.float64), np.zeros(4, np.int64)
    for _, span, moves in window_tiles(store, block, rows, tile_bytes):
        _, moving, start = compact(moves, base[span])
        for _, some, bits in pieces(moving, start, dense_width(rows.count)):
            values = np.cumsum(dense(some, increments(some, bits, block.kind), rows.count), axis=1)[:, rows.places]
            values -= values[:, :1].copy()
            values = values[values.any(axis=1)]
            linear = r_squared(numbers, values) > LINEAR
            several = np.count_nonzero(np.diff(np.sort(values, axis=1), axis=1), axis=1) + 1 >= VALUES
            counts += np.array([np.ones_like(linear), linear, several, linear & several]).sum(axis=1)
    return counts
