"""Dask graphs over blocks: gram, operator, combine. No paths, no click.

A task opens the store by its address, reads one block a tile at a time, and gives back something small, or hands whole
blocks to a sink. So tasks can run in any order, in any process, and again.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import Delayed, delayed
from threadpoolctl import threadpool_limits

from relexio.backend import limited, out_of_memory, own_stream, to_device, to_host, zeros
from relexio.dtypes import Array, from_float64, nonfinite, to_float64
from relexio.errors import BudgetError, RelexioWarning, RequestError
from relexio.plan import Plan
from relexio.trajectory.schema import Block, Tensor
from relexio.trajectory.store import Store
from relexio.trajectory.tiles import Rows, observed, tiles
from relexio.trajectory.zarrs import limit_threads

#: Takes (block, which target, element bits [size]) and puts them where they belong.
Sink = Callable[[Block, int, np.ndarray], None]
#: Told the bytes of each finished task.
Progress = Callable[[int], None]
_FOLD = 8
_BLOCKS_AT_ONCE = 1024
_SMALLEST_TILE = 1 << 12
_WAIT, _WAITS = 0.1, 20  # seconds, times
#: One text for all, so that Python says it once for however many blocks and threads.
_SHRUNK = (
    "the device ran out of memory: going on with smaller tiles, slower; give more --device-memory or fewer --workers"
)


@dataclass(frozen=True)
class Executor:
    """Where a graph runs: threads of this process, on one device, inside a plan."""

    plan: Plan
    device: str = "cpu"
    device_memory: int = 0

    def run(self, tasks: Iterable[Delayed], sizes: dict[str, int], progress: Progress) -> list[Any]:
        """Compute all tasks and return their results in order, some thousand blocks at a time: a graph has its size too.

        ``sizes`` gives bytes by key, for the progress; it is filled while ``tasks`` are made.
        """
        limit_threads(self.plan.workers)
        results: list[Any] = []
        with (
            threadpool_limits(1),
            limited(self.device, self.device_memory),
            _Reporter(sizes, progress),
            _pool(self.plan.workers, self.device) as pool,
        ):
            for batch in _batches(tasks, sizes):
                results += compute(*batch, scheduler="threads", pool=pool, optimize_graph=False)
                sizes.clear()
        return results


def _batches(tasks: Iterable[Delayed], sizes: dict[str, int]) -> Iterator[list[Delayed]]:
    batch: list[Delayed] = []
    for made in tasks:
        batch.append(made)
        if len(sizes) >= _BLOCKS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _pool(workers: int, device: str) -> Iterator[ThreadPoolExecutor]:
    """Worker threads, all of them done when it ends: after an error too nothing is written any more."""
    pool = ThreadPoolExecutor(workers, initializer=own_stream, initargs=(device,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Reporter(Callback):
    def __init__(self, sizes: dict[str, int], progress: Progress) -> None:
        def done(key: str, *_: Any) -> None:
            if key in sizes:
                progress(sizes[key])

        super().__init__(posttask=done)


def task(function: Callable[..., Any], *parts: Any, key: str) -> Delayed:
    """One node of a graph, under a key that progress can be told by; only ``parts`` may hold other nodes."""
    return delayed(function, pure=False, traverse=False)(*parts, dask_key_name=key)


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
            increments = tile.increments(device)
            total += increments @ increments.T
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
            increments = tile.increments(device)
            total += increments @ (increments.T @ there)
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
        for tile in tiles(store, block, steps, size, dense=device != "cpu", base=base):
            here = to_device(tile.base, device)
            with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
                values = tile.weigh(spread, device)
            values += to_float64(here, block.kind)
            bits = from_float64(values, block.kind)
            _check_finite(bits, here, block)
            for target, result in enumerate(results):
                result[tile.elements] = to_host(bits[target])
        return results

    return _shrinking(work, tile_bytes)


def _check_finite(bits: Array, base: Array, block: Block) -> None:
    bad = nonfinite(bits, block.kind) & ~nonfinite(base, block.kind)
    if bool(bad.any()):
        raise RequestError(
            f"tensor {block.tensor.name}: the prediction overflows {block.tensor.dtype} in {int(bad.sum())} elements; "
            f"predict a nearer step or give a smaller --strength"
        )


def _write_block(
    store: Store,
    block: Block,
    steps: tuple[int, ...],
    weights: np.ndarray | None,
    targets: int,
    tile_bytes: int,
    device: str,
    sink: Sink,
) -> None:
    """Hand the block's result for every target to the sink; without weights, its bits at the window's last step."""
    if weights is None:
        results = [observed(store, block, steps[-1])] * targets
    else:
        results = combine_block(store, block, steps, weights, tile_bytes, device)
    for target, bits in enumerate(results):
        sink(block, target, bits)


def _add(parts: list[np.ndarray]) -> np.ndarray:
    return np.sum(parts, axis=0) if len(parts) > 1 else parts[0]


def _fold(parts: list[Delayed], name: str) -> Delayed:
    """The sum of the parts as a tree of fixed shape: the same digits for any number of workers."""
    level = 0
    while len(parts) > 1:
        parts = [task(_add, parts[i : i + _FOLD], key=f"add-{name}-{level}-{i}") for i in range(0, len(parts), _FOLD)]
        level += 1
    return parts[0]


def _sum_over_blocks(
    store: Store, tensor: Tensor, steps: int, kernel: Callable[[Block], np.ndarray], sizes: dict[str, int]
) -> Delayed:
    parts = []
    for block in store.blocks(tensor):
        key = f"block-{block.kind.name}-{block.index}"
        sizes[key] = block.size * block.kind.itemsize * steps
        parts.append(task(partial(kernel, block), key=key))
    return _fold(parts, tensor.name)


def sums(
    store: Store, steps: int, kernel: Callable[[Block], np.ndarray], executor: Executor, progress: Progress
) -> dict[str, np.ndarray]:
    """Run a kernel over every block of the store; the sum of its results for every tensor that has a block."""
    sizes: dict[str, int] = {}
    held = [tensor for tensor in store.tensors if store.blocks(tensor)]
    tasks = (_sum_over_blocks(store, tensor, steps, kernel, sizes) for tensor in held)
    results = executor.run(tasks, sizes, progress)
    return {tensor.name: result for tensor, result in zip(held, results, strict=True)}


def gram(
    store: Store,
    steps: tuple[int, ...],
    keep: Callable[[Tensor, np.ndarray], None],
    executor: Executor,
    progress: Progress,
) -> None:
    """One pass: the Gram matrix of every fitted tensor, handed to ``keep`` as soon as its last block is in."""
    sizes: dict[str, int] = {}

    def kernel(block: Block) -> np.ndarray:
        return gram_block(store, block, steps, executor.plan.tile_bytes, executor.device)

    tasks = (
        task(
            partial(keep, tensor), _sum_over_blocks(store, tensor, len(steps), kernel, sizes), key=f"keep-{tensor.name}"
        )
        for tensor in store.fitted()
    )
    executor.run(tasks, sizes, progress)


def operator(
    store: Store, x: dict[str, np.ndarray], steps: tuple[int, ...], executor: Executor, progress: Progress
) -> dict[str, np.ndarray]:
    """One pass: M (M^T x) for every tensor named in ``x`` ([T, k] each)."""
    sizes: dict[str, int] = {}

    def kernel(block: Block) -> np.ndarray:
        return operator_block(store, block, steps, x[block.tensor.name], executor.plan.tile_bytes, executor.device)

    tasks = (_sum_over_blocks(store, store.tensor(name), len(steps), kernel, sizes) for name in x)
    return dict(zip(x, executor.run(tasks, sizes, progress), strict=True))


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
    sizes: dict[str, int] = {}
    tile_bytes = executor.plan.tile_bytes

    def tasks() -> Iterator[Delayed]:
        for tensor in store.tensors:
            w = weights.get(tensor.name)
            for block in store.blocks(tensor):
                key = f"combine-{tensor.kind.name}-{block.index}"
                sizes[key] = block.size * block.kind.itemsize * targets
                work = partial(_write_block, store, block, steps, w, targets, tile_bytes, executor.device, sink)
                yield task(work, key=key)

    executor.run(tasks(), sizes, progress)
