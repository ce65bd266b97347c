"""Kernels over one block, a tile at a time, on NumPy or CuPy: its Gram matrix, operator and prediction."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from relexio.dtypes import Array, from_float64, nonfinite, to_float64
from relexio.engine.device import out_of_memory, to_device, to_host, zeros
from relexio.engine.tiles import Rows, tiles
from relexio.errors import BudgetError, RelexioWarning, RequestError
from relexio.store.schema import Block
from relexio.store.store import Store

_SMALLEST_TILE = 1 << 12
_WAIT, _WAITS = 0.1, 20  # seconds, times
#: One text for all, so that Python says it once for however many blocks and threads.
_SHRUNK = (
    "the device ran out of memory: going on with smaller tiles, slower; give more --device-memory or fewer --workers"
)


def _shrinking(work: Callable[[int], Any], tile_bytes: int) -> Any:
    """Run ``work(tile_bytes)``; where the device has no room for a tile so large, again with half of it.

    Raises BudgetError where there is no room for the smallest either, though others were given time to end theirs.
    """
    waits = iter(range(_WAITS))
    while True:
        try:
            return work(tile_bytes)
        except out_of_memory() as error:
            if tile_bytes <= _SMALLEST_TILE and next(waits, None) is None:
                raise BudgetError("--device-memory is too small for the smallest tile; give more") from error
        warnings.warn(_SHRUNK, RelexioWarning, stacklevel=1)  # out here, since the error holds what did fit
        if tile_bytes <= _SMALLEST_TILE:
            time.sleep(_WAIT)
        tile_bytes = max(tile_bytes // 2, _SMALLEST_TILE)


def gram_block(store: Store, steps: tuple[int, ...], tile_bytes: int, device: str, block: Block) -> np.ndarray:
    """M M^T over one block: float64 [T, T]."""

    def work(size: int) -> np.ndarray:
        rows = Rows.of(store, steps)
        total = zeros((rows.count, rows.count), device)
        for tile in tiles(store, block, steps, size):
            total += tile.gram(size, device)
        return rows.sum_up(rows.sum_up(to_host(total)).T)

    return _shrinking(work, tile_bytes)


def operator_block(
    store: Store, steps: tuple[int, ...], x: dict[str, np.ndarray], tile_bytes: int, device: str, block: Block
) -> np.ndarray:
    """M (M^T x) over one block, for its tensor's x [T, k]: float64 [T, k], without ever holding T x T."""

    def work(size: int) -> np.ndarray:
        rows = Rows.of(store, steps)
        vectors = to_device(rows.spread(x[block.tensor.name]), device)
        total = zeros(vectors.shape, device)
        for tile in tiles(store, block, steps, size):
            for piece in tile.pieces(size):
                increments = piece.increments(device)
                total += increments.T @ (increments @ vectors)
        return rows.sum_up(to_host(total))

    return _shrinking(work, tile_bytes)


def combine_block(
    store: Store, steps: tuple[int, ...], weights: np.ndarray, tile_bytes: int, device: str, block: Block
) -> list[np.ndarray]:
    """theta_0 + M^T w over one block for weights [T, S]: element bits [size] for each of the S targets.

    Raises RequestError where a prediction is not finite though the base is.
    """
    base = store.base_bits(block)

    def work(size: int) -> list[np.ndarray]:
        results = [base.copy() for _ in range(weights.shape[1])]
        if not weights.any():
            return results
        spread = Rows.of(store, steps).spread(weights)
        for tile in tiles(store, block, steps, size, base):
            for piece in (tile,) if device == "cpu" else tile.pieces(size):
                start = to_device(piece.base.reshape(-1, 1), device)
                with np.errstate(over="ignore", invalid="ignore"):  # refused below, by name
                    values = piece.weigh(spread, device)
                values += to_float64(start, block.kind)
                bits = from_float64(values, block.kind)
                _check_finite(bits, start, block)
                columns = to_host(bits).T
                for result, column in zip(results, columns, strict=True):
                    result[piece.elements] = column
        return results

    return _shrinking(work, tile_bytes)


def _check_finite(bits: Array, base: Array, block: Block) -> None:
    bad = nonfinite(bits, block.kind) & ~nonfinite(base, block.kind)
    if bool(bad.any()):
        raise RequestError(
            f"tensor {block.tensor.name}: the prediction overflows {block.tensor.dtype} in {int(bad.sum())} elements; "
            f"predict a nearer step or give a smaller --strength"
        )
