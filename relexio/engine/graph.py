"""Dask graphs over blocks: gram, operator, combine. No paths, no click.

A task opens the store by its address, reads one block a tile at a time, and gives back something small, or hands whole
blocks to a sink. So tasks can run in any order, in any process, and again. A kernel takes the block last: all else is
bound once, and travels to workers by itself.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import methodcaller
from typing import TypeVar

import numpy as np
from dask.delayed import Delayed

from relexio.engine.blocks import combine_block, gram_block, operator_block
from relexio.engine.executor import Executor, Keep, Pass, Progress
from relexio.store.read import observed
from relexio.store.schema import Block, Tensor
from relexio.store.store import Store

#: Takes (block, which target, element bits [size]) and puts them where they belong.
Sink = Callable[[Block, int, np.ndarray], None]
T = TypeVar("T")
_FOLD = 8


def _node(nodes: Pass, block: Block, steps: int, kernel: Delayed) -> Delayed:
    key, size = f"block-{block.kind.name}-{block.index}", block.size * block.kind.itemsize * steps
    return nodes.block(methodcaller("__call__", block), kernel, key=key, size=size)


def _add(terms: list[np.ndarray]) -> np.ndarray:
    return np.sum(terms, axis=0) if len(terms) > 1 else terms[0]


def _fold(nodes: Pass, terms: list[Delayed], name: str) -> Delayed:
    """The sum of the terms as a tree of fixed shape: the same digits for any number of workers."""
    level = 0
    while len(terms) > 1:
        terms = [
            nodes.task(_add, terms[i : i + _FOLD], key=f"add-{name}-{level}-{i}") for i in range(0, len(terms), _FOLD)
        ]
        level += 1
    return terms[0]


def _sum_by_tensor(
    store: Store,
    tensors: Iterable[Tensor],
    steps: int,
    kernel: Callable[[Block], np.ndarray],
    executor: Executor,
    progress: Progress,
    keep: Keep | None = None,
) -> list[np.ndarray]:
    """Run a kernel over the blocks of some tensors, each of which has one at least; the sum of its results for each."""
    nodes = executor.begin()
    shared = nodes.shared(kernel)
    tasks = (
        _fold(nodes, [_node(nodes, block, steps, shared) for block in store.blocks(tensor)], tensor.name)
        for tensor in tensors
    )
    return executor.run(nodes, tasks, progress, keep)


def _blocks(store: Store) -> Iterator[Block]:
    return (block for tensor in store.tensors for block in store.blocks(tensor))


def _run_each(
    store: Store, steps: int, kernel: Callable[[Block], T], executor: Executor, progress: Progress
) -> list[T]:
    nodes = executor.begin()
    shared = nodes.shared(kernel)
    return executor.run(nodes, (_node(nodes, block, steps, shared) for block in _blocks(store)), progress)


def sums(
    store: Store, steps: int, kernel: Callable[[Block], np.ndarray], executor: Executor, progress: Progress
) -> dict[str, np.ndarray]:
    """Run a kernel over every block of the store; the sum of its results for every tensor that has a block."""
    tensors = [tensor for tensor in store.tensors if store.blocks(tensor)]
    results = _sum_by_tensor(store, tensors, steps, kernel, executor, progress)
    return {tensor.name: result for tensor, result in zip(tensors, results, strict=True)}


def each(
    store: Store, steps: int, kernel: Callable[[Block], T], executor: Executor, progress: Progress
) -> list[tuple[Block, T]]:
    """Run a kernel over every block of the store; the blocks and its results, in order."""
    return list(zip(_blocks(store), _run_each(store, steps, kernel, executor, progress), strict=True))


def gram(
    store: Store,
    steps: tuple[int, ...],
    keep: Callable[[Tensor, np.ndarray], None],
    executor: Executor,
    progress: Progress,
) -> None:
    """One pass: the Gram matrix of every fitted tensor, handed to ``keep`` as soon as its last block is in."""
    fitted = store.fitted()
    kernel = partial(gram_block, store, steps, executor.plan.tile_bytes, executor.device)
    _sum_by_tensor(store, fitted, len(steps), kernel, executor, progress, lambda place, gram: keep(fitted[place], gram))


def operator(
    store: Store, x: dict[str, np.ndarray], steps: tuple[int, ...], executor: Executor, progress: Progress
) -> dict[str, np.ndarray]:
    """One pass: M (M^T x) for every tensor named in ``x`` ([T, k] each)."""
    kernel = partial(operator_block, store, steps, x, executor.plan.tile_bytes, executor.device)
    tensors = [store.tensor(name) for name in x]
    return dict(zip(x, _sum_by_tensor(store, tensors, len(steps), kernel, executor, progress), strict=True))


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
    bound = (store, weights, targets, steps, sink, executor.plan.tile_bytes, executor.device)
    _run_each(store, targets, partial(_write_block, *bound), executor, progress)


def _write_block(
    store: Store,
    weights: dict[str, np.ndarray],
    targets: int,
    steps: tuple[int, ...],
    sink: Sink,
    tile_bytes: int,
    device: str,
    block: Block,
) -> None:
    if block.tensor.name in weights:
        results = combine_block(store, steps, weights[block.tensor.name], tile_bytes, device, block)
    else:
        results = [observed(store, block, steps[-1])] * targets
    for target, bits in enumerate(results):
        sink(block, target, bits)
