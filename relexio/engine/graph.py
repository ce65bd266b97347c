"""Dask graphs over blocks: gram, operator, combine. No paths, no click.

A task opens the store by its address, reads one block a chunk at a time, and gives back something small, or hands whole
blocks to a sink. So tasks can run in any order, in any process, and again. A kernel takes the block last: all else is
bound once, and travels to workers on its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import methodcaller
from typing import TypeVar

import numpy as np
from dask.delayed import Delayed

from relexio.engine.blocks import combine_block, gram_block, linear_block, operator_block
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


def _add(*terms: np.ndarray) -> np.ndarray:
    return np.sum(terms, axis=0) if len(terms) > 1 else terms[0]


def _add_of(places: list[int], *results: list[np.ndarray]) -> np.ndarray:
    """The sum of one tensor's results among those of some blocks."""
    return _add(*(result[place] for place, result in zip(places, results, strict=True)))


def _fold(nodes: Pass, terms: list[Delayed], places: list[int], name: str) -> Delayed:
    """The sum of a tensor's results, at these places of what blocks give, as a tree of fixed shape: the same digits for any
    number of workers."""
    level, adds = 0, [partial(_add_of, places[i : i + _FOLD]) for i in range(0, len(terms), _FOLD)]
    while level == 0 or len(terms) > 1:
        parts = [terms[i : i + _FOLD] for i in range(0, len(terms), _FOLD)]
        terms = [
            nodes.task(adds[i] if level == 0 else _add, *part, key=f"add-{name}-{level}-{i}")
            for i, part in enumerate(parts)
        ]
        level += 1
    return terms[0]


def sums(
    store: Store,
    steps: int,
    kernel: Callable[[Block], Sequence[np.ndarray | None]],
    executor: Executor,
    progress: Progress,
    tensors: Iterable[Tensor],
    keep: Keep | None = None,
) -> dict[str, np.ndarray]:
    """Run a kernel, which gives a result for each piece, over every block of tensors; for each that is not empty the sum.

    With ``keep`` a sum is handed over, with the place of its tensor, as soon as its last block is in, and not held.
    """
    chosen = [tensor for tensor in tensors if tensor.size]
    nodes = executor.begin()
    shared = nodes.shared(kernel)
    last: dict[str, tuple[Block, Delayed]] = {}  # of each kind: the next tensor may share the block

    def node(block: Block) -> Delayed:
        held = last.get(block.kind.name)
        if held is None or held[0] != block:
            held = last[block.kind.name] = block, _node(nodes, block, steps, shared)
        return held[1]

    def fold(tensor: Tensor) -> Delayed:
        parts = store.parts[tensor.name]
        return _fold(nodes, [node(block) for block, _ in parts], [place for _, place in parts], tensor.name)

    results = executor.run(nodes, map(fold, chosen), progress, keep)
    return {tensor.name: result for tensor, result in zip(chosen, results, strict=True)}


def each(
    store: Store,
    steps: int,
    kernel: Callable[[Block], T],
    executor: Executor,
    progress: Progress,
    blocks: Sequence[Block] | None = None,
) -> Iterator[tuple[Block, T]]:
    """Run a kernel over every block of the store, or over some; the blocks and its results, in order."""
    chosen = store.blocks if blocks is None else blocks
    nodes = executor.begin()
    shared = nodes.shared(kernel)
    results = executor.run(nodes, (_node(nodes, block, steps, shared) for block in chosen), progress)
    return zip(chosen, results, strict=True)


def gram(
    store: Store,
    steps: tuple[int, ...],
    keep: Callable[[Tensor, np.ndarray], None],
    executor: Executor,
    progress: Progress,
) -> None:
    """One pass: the Gram matrix of every fitted tensor, handed to ``keep`` as soon as its last block is in."""
    kernel = partial(gram_block, store, steps, executor.plan.tile_bytes, executor.device)
    fitted = store.fitted()
    sums(store, len(steps), kernel, executor, progress, fitted, lambda place, total: keep(fitted[place], total))


def operator(
    store: Store, x: dict[str, np.ndarray], steps: tuple[int, ...], executor: Executor, progress: Progress
) -> dict[str, np.ndarray]:
    """One pass: M (M^T x) for every tensor named in ``x`` ([T, k] each)."""
    kernel = partial(operator_block, store, steps, x, executor.plan.tile_bytes, executor.device)
    return sums(store, len(steps), kernel, executor, progress, map(store.tensor, x))


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
    kernel = partial(_write_block, store, weights, targets, steps, sink, executor.plan.tile_bytes, executor.device)
    each(store, targets, kernel, executor, progress)


def linear(
    store: Store, steps: tuple[int, ...], blocks: Sequence[Block], executor: Executor, progress: Progress
) -> np.ndarray:
    """One pass over some blocks: the sum of what ``linear_block`` counts, int64 [4]."""
    kernel = partial(linear_block, store, steps, executor.plan.tile_bytes)
    return np.sum([found for _, found in each(store, len(steps), kernel, executor, progress, blocks)], axis=0)


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
    results = combine_block(store, steps, weights, targets, tile_bytes, device, block)
    rest = [piece for piece in block.pieces if piece.tensor.name not in weights]
    if rest:
        bits = observed(store, block, steps[-1])
        for result, piece in ((result, piece) for result in results for piece in rest):
            result[piece.span] = bits[piece.span]
    for target, bits in enumerate(results):
        sink(block, target, bits)
