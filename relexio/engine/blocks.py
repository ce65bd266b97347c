"""Kernels over one block, a tile at a time, on NumPy or CuPy: its Gram matrix, operator and prediction."""

import time
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from relexio.dtypes import Array, from_float64, nonfinite, to_float64
from relexio.engine.device import out_of_memory, to_device, to_host, zeros
from relexio.engine.tiles import Rows, tiles
from relexio.errors import BudgetError, RelexioWarning, RequestError
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
def gram_block(store: Store, steps: tuple[int, ...], tile_bytes: int, device: str, block: Block) -> np.ndarray:
    """M M^T over one block: float64 [T, T]."""
    rows = Rows.of(store, steps)
    total = zeros((rows.count, rows.count), device)
    for tile in tiles(store, block, steps, tile_bytes):
        total += tile.gram(tile_bytes, device)
    return rows.sum_up(rows.sum_up(to_host(total)).T)


@_shrinking
def operator_block(
    store: Store, steps: tuple[int, ...], x: dict[str, np.ndarray], tile_bytes: int, device: str, block: Block
) -> np.ndarray:
    """M (M^T x) over one block, for its tensor's x [T, k]: float64 [T, k], without ever holding T x T."""
    rows = Rows.of(store, steps)
    vectors = to_device(rows.spread(x[block.tensor.name]), device)
    total = zeros(vectors.shape, device)
    for tile in tiles(store, block, steps, tile_bytes):
        for piece in tile.pieces(tile_bytes):
            increments = piece.increments(device)
            total += increments.T @ (increments @ vectors)
    return rows.sum_up(to_host(total))


@_shrinking
def combine_block(
    store: Store, steps: tuple[int, ...], weights: np.ndarray, tile_bytes: int, device: str, block: Block
) -> list[np.ndarray]:
    """theta_0 + M^T w over one block for weights [T, S]: element bits [size] for each of the S targets.

    Raises RequestError where a prediction is not finite though the base is.
    """
    base = store.base_bits(block)
    results = [base.copy() for _ in range(weights.shape[1])]
    if not weights.any():
        return results
    spread = Rows.of(store, steps).spread(weights)
    for tile in tiles(store, block, steps, tile_bytes, base):
        for piece in (tile,) if device == "cpu" else tile.pieces(tile_bytes):
            start = to_device(piece.base.reshape(-1, 1), device)
            with np.errstate(over="ignore", invalid="ignore"):  # refused below, by name
                values = piece.weigh(spread, device)
            values += to_float64(start, block.kind)
            bits = from_float64(values, block.kind)
            _check_finite(bits, start, block)
            for result, column in zip(results, to_host(bits).T, strict=True):
                result[piece.elements] = column
    return results


def _check_finite(bits: Array, base: Array, block: Block) -> None:
    bad = nonfinite(bits, block.kind) & ~nonfinite(base, block.kind)
    if bool(bad.any()):
        raise RequestError(
            f"tensor {block.tensor.name}: the prediction overflows {block.tensor.dtype} in {int(bad.sum())} elements; "
            f"predict a nearer step or give a smaller --strength"
        )
