"""Segments of a chain made into one: when they have become many, and where steps are forgotten."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from relexio.engine import graph
from relexio.engine.executor import Executor
from relexio.loops import fold, pack
from relexio.progress import Stages
from relexio.store.blocks import MovesWriter, Written, write_small
from relexio.store.read import tile_width, tiles
from relexio.store.schema import Block, Segment
from relexio.store.storage import locate
from relexio.store.store import Store
from relexio.store.write import commit, create_segment, set_attribute, write_changed

#: So many segments of about one size become one: each move is rewritten some log_8 T times.
_FANOUT = 8


def count_to_merge(columns: Sequence[int]) -> int:
    """How many of the last segments to make one, given how many steps each has; 0 for none.

    A segment of 8^n to 8^(n+1) - 1 steps is of level n. Eight of a level, with all smaller ones behind them, are merged.
    """
    levels = [(number.bit_length() - 1) // (_FANOUT.bit_length() - 1) for number in columns]
    count = 0
    for level in range(max(levels, default=0) + 1):
        run = next((i for i, other in enumerate(reversed(levels)) if other > level), len(levels))
        if levels[len(levels) - run :].count(level) >= _FANOUT:
            count = run
    return count


@dataclass(frozen=True)
class _Rewriting:
    """What a block's task needs: the segments, the one that they become, and the column there of each of theirs (-1: none)."""

    store: Store
    run: tuple[Segment, ...]
    segment: Segment
    columns: np.ndarray
    tile_bytes: int


def merging(store: Store) -> int:
    """How many of a store's last segments are to be made one."""
    return count_to_merge([segment.columns for segment in store.segments])


def merge(store: Store, executor: Executor, stages: Stages) -> Store:
    """The store with its last segments made one, if they have become many: one commit. The old ones are to be swept then."""
    count = merging(store)
    if not count:
        return store
    run = store.segments[-count:]
    merged = rewrite(store, run, [step for segment in run for step in segment.steps], executor, stages)
    return commit_chain(store, (*store.segments[:-count], merged))


def forget(store: Store, steps: Container[int], executor: Executor, stages: Stages) -> Store:
    """The store without some steps, not committed: segments of others that they share are written anew.

    What a forgotten step moved, the next kept one moves.
    """
    affected = [i for i, segment in enumerate(store.segments) if any(step in steps for step in segment.steps)]
    if not affected:
        return store
    first, last = affected[0], affected[-1]
    while last + 1 < len(store.segments) and store.segments[last].steps[-1] in steps:
        last += 1
    run = store.segments[first : last + 1]
    kept = [step for segment in run for step in segment.steps if step not in steps]
    new = (rewrite(store, run, kept, executor, stages),) if kept else ()
    chain = (*store.segments[:first], *new, *store.segments[last + 1 :])
    return replace(store, segments=chain, next=store.next + len(new))


def rewrite(store: Store, run: tuple[Segment, ...], kept: Sequence[int], executor: Executor, stages: Stages) -> Segment:
    """Write a segment, not committed yet, with those steps of a run of segments that are kept."""
    steps = [step for segment in run for step in segment.steps]
    content = [store.contents[step] for step in kept]
    segment = Segment(f"{store.next:04d}", tuple(kept), tuple(content))
    # a step that goes adds its moves to the next that is kept
    columns = np.searchsorted([steps.index(step) for step in kept], np.arange(len(steps))).astype(np.int32)
    columns[columns == len(kept)] = -1
    create_segment(store, segment)
    job = _Rewriting(store, run, segment, columns, executor.plan.tile_bytes)
    total = sum(tensor.nbytes for tensor in store.tensors) * len(steps)
    with stages("merge", total) as advance:
        written = list(graph.each(store, len(steps), partial(_rewrite_block, job), executor, advance))
    executor.settle(store.files(""))
    write_small(store, segment.path, written)
    places = [steps.index(step) for step in kept]
    write_changed(store, segment, np.concatenate([store.changed(part) for part in run], axis=1)[:, places])
    records = {step: record for part in run for step, record in store.checkpoints(part).items()}
    set_attribute(store, segment.path, "sources", [records[step].to_json() for step in kept])
    return segment


def _rewrite_block(job: _Rewriting, block: Block) -> Written:
    store, columns = job.store, job.segment.columns
    writer = MovesWriter(store, job.segment.path, block)
    last, whole, width = -1, columns == len(job.columns), tile_width(len(job.columns), job.tile_bytes)
    for _, span, moves in tiles(store, block, width, store.reader(block, job.run)):
        if not whole:
            moves = fold(moves, job.columns, block.kind)
        when, last = pack(moves, columns, span.start, last)
        writer.append(when, moves.by)
    digests = np.concatenate([store.digests(part.path, block) for part in job.run])
    places = [int(np.flatnonzero(job.columns == column)[-1]) for column in range(columns)]
    return writer.close(digests[places], np.zeros((len(block.pieces), columns), np.int64))


def commit_chain(store: Store, segments: Iterable[Segment]) -> Store:
    """Make new segments durable and commit the chain."""
    segments = tuple(segments)
    for part in ("segments", "files", *(() if store.segments else ("base",))):
        locate(store.address).below(part).settle()
    records = [store.base(), *(r for s in segments for r in store.checkpoints(s).values())]
    return commit(store, segments, {name for record in records for name in record.files}, store.base_content)
