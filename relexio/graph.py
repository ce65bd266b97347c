"""Dask graphs over blocks: gram, operator, combine. No paths, no click.

A task opens the store by its address, reads one block a tile at a time, and gives back something small, or hands whole
blocks to a sink. So tasks can run in any order, in any process, and again.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
from dask.delayed import Delayed

from relexio.backend import out_of_memory, to_device, to_host, zeros
from relexio.dtypes import Array, from_float64, nonfinite, to_float64
from relexio.errors import BudgetError, RelexioWarning, RequestError
from relexio.executor import Executor, Pass, Progress
from relexio.trajectory.schema import Block, Tensor
from relexio.trajectory.store import Store
from relexio.trajectory.tiles import Rows, observed, tiles

#: Takes (block, which target, element bits [size]) and puts them where they belong.
Sink = Callable[[Block, int, np.ndarray], None]
T = TypeVar("T")
_FOLD = 8
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


def gram_block(store: Store, block: Block, steps: tuple[int, ...], tile_bytes: int, device: str) -> np.ndarray:
    """M M^T over one block: float64 [T, T]."""

    def work(size: int) -> np.ndarray:
        rows = Rows.of(store, steps)
        total = zeros((rows.count, rows.count), device)
        for tile in tiles(store, block, steps, size):
            total += tile.gram(size, device)
        return rows.sum_up(rows.sum_up(to_host(total)).T)

    return _shrinking(work, tile_bytes)


def operator_block(
    store: Store, block: Block, steps: tuple[int, ...], x: np.ndarray, tile_bytes: int, device: str
) -> np.ndarray:
    """M (M^T x) over one block, x [T, k]: float64 [T, k], without ever holding T x T."""

    def work(size: int) -> np.ndarray:
        rows = Rows.of(store, steps)
        there = to_device(rows.spread(x), device)
        total = zeros(there.shape, device)
        for tile in tiles(store, block, steps, size):
            for piece in tile.pieces(size):
                increments = piece.increments(device)
                total += increments.T @ (increments @ there)
        return rows.sum_up(to_host(total))

    return _shrinking(work, tile_bytes)


def combine_block(
    store: Store, block: Block, steps: tuple[int, ...], weights: np.ndarray, tile_bytes: int, device: str
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
                here = to_device(piece.base.reshape(-1, 1), device)
                with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
                    values = piece.weigh(spread, device)
                values += to_float64(here, block.kind)
                bits = from_float64(values, block.kind)
                _check_finite(bits, here, block)
                found = to_host(bits)
                for target, result in enumerate(results):
                    result[piece.elements] = found[:, target]
        return results

    return _shrinking(work, tile_bytes)


def _check_finite(bits: Array, base: Array, block: Block) -> None:
    bad = nonfinite(bits, block.kind) & ~nonfinite(base, block.kind)
    if bool(bad.any()):
        raise RequestError(
            f"tensor {block.tensor.name}: the prediction overflows {block.tensor.dtype} in {int(bad.sum())} elements; "
            f"predict a nearer step or give a smaller --strength"
        )


# What a pass does with a block comes last in these, so that the rest can be bound once and travel to workers by itself.


def _gram(store: Store, steps: tuple[int, ...], tile_bytes: int, device: str, block: Block) -> np.ndarray:
    return gram_block(store, block, steps, tile_bytes, device)


def _operator(
    store: Store, x: dict[str, np.ndarray], steps: tuple[int, ...], tile_bytes: int, device: str, block: Block
) -> np.ndarray:
    return operator_block(store, block, steps, x[block.tensor.name], tile_bytes, device)


def _write_block(
    store: Store,
    steps: tuple[int, ...],
    weights: dict[str, np.ndarray],
    targets: int,
    tile_bytes: int,
    device: str,
    sink: Sink,
    block: Block,
) -> None:
    """Hand the block's result for every target to the sink; without weights, its bits at the window's last step."""
    found = weights.get(block.tensor.name)
    if found is None:
        results = [observed(store, block, steps[-1])] * targets
    else:
        results = combine_block(store, block, steps, found, tile_bytes, device)
    for target, bits in enumerate(results):
        sink(block, target, bits)


def _on(block: Block, kernel: Callable[[Block], Any]) -> Any:
    return kernel(block)


def _add(parts: list[np.ndarray]) -> np.ndarray:
    return np.sum(parts, axis=0) if len(parts) > 1 else parts[0]


def _fold(made: Pass, parts: list[Delayed], name: str) -> Delayed:
    """The sum of the parts as a tree of fixed shape: the same digits for any number of workers."""
    level = 0
    while len(parts) > 1:
        parts = [
            made.task(_add, parts[i : i + _FOLD], key=f"add-{name}-{level}-{i}") for i in range(0, len(parts), _FOLD)
        ]
        level += 1
    return parts[0]


def _sum_over_blocks(made: Pass, store: Store, tensor: Tensor, steps: int, kernel: Delayed) -> Delayed:
    return _fold(made, [_node(made, block, steps, kernel) for block in store.blocks(tensor)], tensor.name)


def _node(made: Pass, block: Block, steps: int, kernel: Delayed) -> Delayed:
    key, size = f"block-{block.kind.name}-{block.index}", block.size * block.kind.itemsize * steps
    return made.block(partial(_on, block), kernel, key=key, size=size)


def sums(
    store: Store, steps: int, kernel: Callable[[Block], np.ndarray], executor: Executor, progress: Progress
) -> dict[str, np.ndarray]:
    """Run a kernel over every block of the store; the sum of its results for every tensor that has a block."""
    made = executor.begin()
    shared = made.shared(kernel)
    held = [tensor for tensor in store.tensors if store.blocks(tensor)]
    results = executor.run(made, (_sum_over_blocks(made, store, tensor, steps, shared) for tensor in held), progress)
    return {tensor.name: result for tensor, result in zip(held, results, strict=True)}


def each(
    store: Store, steps: int, kernel: Callable[[Block], T], executor: Executor, progress: Progress
) -> list[tuple[Block, T]]:
    """Run a kernel over every block of the store; the blocks and its results, in order."""
    made = executor.begin()
    shared = made.shared(kernel)
    blocks = [block for tensor in store.tensors for block in store.blocks(tensor)]
    return list(zip(blocks, executor.run(made, (_node(made, b, steps, shared) for b in blocks), progress), strict=True))


def gram(
    store: Store,
    steps: tuple[int, ...],
    keep: Callable[[Tensor, np.ndarray], None],
    executor: Executor,
    progress: Progress,
) -> None:
    """One pass: the Gram matrix of every fitted tensor, handed to ``keep`` as soon as its last block is in."""
    made, fitted = executor.begin(), store.fitted()
    shared = made.shared(partial(_gram, store, steps, executor.plan.tile_bytes, executor.device))
    tasks = (_sum_over_blocks(made, store, tensor, len(steps), shared) for tensor in fitted)
    executor.run(made, tasks, progress, lambda place, found: keep(fitted[place], found))


def operator(
    store: Store, x: dict[str, np.ndarray], steps: tuple[int, ...], executor: Executor, progress: Progress
) -> dict[str, np.ndarray]:
    """One pass: M (M^T x) for every tensor named in ``x`` ([T, k] each)."""
    made = executor.begin()
    shared = made.shared(partial(_operator, store, x, steps, executor.plan.tile_bytes, executor.device))
    tasks = (_sum_over_blocks(made, store, store.tensor(name), len(steps), shared) for name in x)
    return dict(zip(x, executor.run(made, tasks, progress), strict=True))


def combine(
    store: Store,
    weights: dict[str, np.ndarray],
    targets: int,
    steps: tuple[int, ...],
    sink: Sink,
    executor: Executor,
    progress: Progress,
) -> None:
    """One pass: every block of theta_0 + M^T w for weights [T, targets] by tensor, handed to the sink.

    Tensors without weights (buffers) are handed over as they are at the last of ``steps``.
    """
    made, size = executor.begin(), executor.plan.tile_bytes
    shared = made.shared(partial(_write_block, store, steps, weights, targets, size, executor.device, sink))

    def tasks() -> Iterator[Delayed]:
        for tensor in store.tensors:
            for block in store.blocks(tensor):
                key, size = f"combine-{tensor.kind.name}-{block.index}", block.size * block.kind.itemsize * targets
                yield made.block(partial(_on, block), shared, key=key, size=size)

    executor.run(made, tasks(), progress)
