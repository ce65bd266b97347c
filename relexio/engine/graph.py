"""Dask graphs over blocks: gram, operator, combine. No paths, no click.

A task opens the store by its address, reads one block a tile at a time, and gives back something small, or hands whole
blocks to a sink. So tasks can run in any order, in any process, and again.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
from dask.delayed import Delayed

from relexio.engine.executor import Executor, Pass, Progress
from relexio.engine.kernels import combine_block, gram_block, operator_block
from relexio.store.read import observed
from relexio.store.schema import Block, Tensor
from relexio.store.store import Store

#: Takes (block, which target, element bits [size]) and puts them where they belong.
Sink = Callable[[Block, int, np.ndarray], None]
T = TypeVar("T")
_FOLD = 8


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
