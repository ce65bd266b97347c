"""The order of work of ``convert``: describe what is coming, write the blocks, make them durable, commit."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from relexio import atomic
from relexio.checkpoints.side import COMPARED, differences
from relexio.dtypes import is_buffer
from relexio.engine import graph
from relexio.engine.executor import Executor
from relexio.engine.process import allow_files
from relexio.errors import (
    BaseItselfError,
    BusyError,
    CheckpointError,
    ClusterError,
    ExistsError,
    RelexioError,
    StorageError,
    StoreError,
)
from relexio.progress import Stages
from relexio.store.blocks import FINISHED, Written, write_small
from relexio.store.opening import has_begun, open_store, unfinished_store
from relexio.store.schema import Block, Segment
from relexio.store.storage import METADATA, Location, locate
from relexio.store.store import Store
from relexio.store.write import (
    Files,
    attribute,
    content_hashes,
    create_segment,
    create_store,
    set_attribute,
    sweep,
    write_changed,
)
from relexio.verbs.convert.encode import OPEN_AHEAD, Job, encode_block
from relexio.verbs.convert.merge import commit_chain, forget, merge, merging
from relexio.verbs.convert.request import Conversion
from relexio.words import show


@dataclass(frozen=True)
class ConversionResult:
    """A committed conversion: the store as it is now, whether an interrupted run was taken up, and notes."""

    store: Store
    resumed: bool
    notes: tuple[str, ...]


def convert(conversion: Conversion, stages: Stages) -> ConversionResult:
    """Write the new steps and commit them. Until the very end the store is as it was, or does not exist.

    After an interruption the same call continues with what is complete. After an error nothing is left behind, except
    where the disk or the cluster failed: then too the same call continues.
    Raises a RelexioError naming file, tensor, step.
    """
    if not conversion.checkpoints:
        if conversion.store is None:
            raise CheckpointError(f"{conversion.out.shown}: no step to convert")
        return _tidy(conversion, conversion.store, stages)
    unfinished = _begun(conversion)
    if unfinished:  # an interrupted run was about some of these steps: finish that, then add the rest
        parts = [tuple(c for c in conversion.checkpoints if (c.step in unfinished) == first) for first in (True, False)]
        done = _convert(replace(conversion, checkpoints=parts[0]), stages)
        rest = _convert(replace(conversion, store=done.store, checkpoints=parts[1]), stages)
        return ConversionResult(rest.store, True, (*done.notes, *rest.notes))
    return _convert(conversion, stages)


def _begun(conversion: Conversion) -> set[int]:
    """The steps that an interrupted run was about, if they are some but not all of those wanted now."""
    if conversion.forgotten:
        return set()
    where = conversion.out if conversion.store else conversion.out.staged
    store = conversion.store or unfinished_store(where)
    if store is None or where.below(_next(store)).get(METADATA) is None:
        return set()
    sources = _recorded(replace(store, address=where.address), _next(store)) or []
    steps = {record["step"] for record in sources}
    return steps if steps < set(conversion.steps) else set()


def _next(store: Store) -> str:
    return f"segments/{store.next:04d}"


def _convert(conversion: Conversion, stages: Stages) -> ConversionResult:
    """Write and commit the steps of a conversion as one segment; merge segments where they have become many."""
    with _needed_said(conversion), conversion.out.storage_errors(), _workspace(conversion) as store:
        executor = conversion.executor
        if conversion.forgotten:
            sweep(store)  # what an interrupted run left begins anew
            store = forget(store, conversion.forgotten, executor, stages)
        segment = Segment(f"{store.next:04d}", conversion.steps)
        resumed = _begin(conversion, store, segment)
        job = Job(
            store,
            segment,
            conversion.checkpoints,
            None if conversion.store else conversion.base,
            conversion.stored,
            executor.plan.tile_bytes,
            resumed,
        )
        sources = [file.path for checkpoint in conversion.read for file in checkpoint.files]
        executor.require([*store.files(f"{segment.path}/{METADATA}"), *sources])
        encode = partial(_encode, job, executor.plan.workers)
        with stages("convert", conversion.bytes_read) as advance:
            written = list(graph.each(store, len(conversion.read), encode, executor, advance))
        executor.settle(store.files(""))
        for checkpoint in conversion.read:
            checkpoint.assert_unchanged()
        done, notes = _commit(conversion, store, segment, written)
        if conversion.forgotten:
            sweep(done)
        if conversion.store:
            done, unmerged = _merge(done, executor, stages)
            notes += unmerged
    return ConversionResult(done.moved_to(conversion.out.address), resumed, notes)


def _merge(store: Store, executor: Executor, stages: Stages) -> tuple[Store, tuple[str, ...]]:
    """Merge, after the new steps are safe: what fails then is no failure of theirs."""
    what = "segments could not be merged"
    try:
        with locate(store.address).storage_errors():
            store = merge(store, executor, stages)
            what = "what is merged could not be removed"
            sweep(store)
        return store, ()
    except RelexioError as error:
        with suppress(OSError, RelexioError):  # the disk may be gone
            store = open_store(store.address)  # it may have failed when it was committed already
            sweep(store)
        return store, (f"the steps are stored, but {what}: {error}; the next convert tries again",)


def _tidy(conversion: Conversion, store: Store, stages: Stages) -> ConversionResult:
    """With nothing to add: merge and remove what a run that was killed after its commit left to be merged or removed."""
    left = set(locate(store.address).below("segments").names()) - {METADATA, *(s.name for s in store.segments)}
    begun = {record["step"] for record in _recorded(store, _next(store)) or []}
    if begun and begun.isdisjoint(store.steps):  # a run that can be taken up
        left.discard(_next(store).rpartition("/")[2])
    if not left and not merging(store):
        return ConversionResult(store, False, ())
    try:
        with conversion.out.storage_errors(), _workspace(conversion) as store:
            sweep(store)
            store, notes = _merge(store, conversion.executor, stages)
    except BusyError:  # whoever writes to it does so
        return ConversionResult(store, False, ())
    return ConversionResult(store, False, notes)


@contextmanager
def _needed_said(conversion: Conversion) -> Iterator[None]:
    """Where the disk is full, say how much is needed at most."""
    try:
        yield
    except StorageError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or atomic.NO_INODES in str(error):
            raise
        most = show(conversion.bytes_written_at_most)
        failure = StorageError(f"{error} (at most {most} in all; usually a small part of that)")
        failure.errno = error.errno
        raise failure from error


def _encode(job: Job, workers: int, block: Block) -> tuple[Written, Written | None]:
    """Write one block, with as many files open ahead as the process may have: it may be another than that of the plan."""
    needed = 2 * (len(job.checkpoints) + 2) * workers + 64
    spare = allow_files(needed + 2 * OPEN_AHEAD * workers) - needed
    return encode_block(replace(job, open_ahead=max(min(spare // (2 * workers), OPEN_AHEAD), 0)), block)


@contextmanager
def _workspace(conversion: Conversion) -> Iterator[Store]:
    """The store to write to, locked: the existing one, or a new one where it is staged, published at the end."""
    out = conversion.out
    if conversion.store is not None:
        with out.locked():
            store = open_store(out.address)  # another writer may have committed since
            if store.seal != conversion.store.seal:
                raise CheckpointError(f"{out.shown}: another process has added steps meanwhile; run again")
            with _clean_up(lambda: sweep(open_store(out.address))):  # as the marker says by then
                yield store
        return
    staged = out.staged
    staged.make()
    with staged.locked(make=True):
        if out.exists() and not has_begun(out):  # another process has ended since ours looked
            if staged != out:
                staged.remove()
            raise ExistsError(f"{out.shown} was created by something else meanwhile; run again to add to it")
        with _clean_up(staged.remove):
            yield _staged_store(conversion, staged)
        staged.publish(out)


@contextmanager
def _clean_up(remove: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except RelexioError as error:
        if not isinstance(error, StorageError | ClusterError):
            remove()
        raise


def _staged_store(conversion: Conversion, staged: Location) -> Store:
    """The store that is being built: as an interrupted run left it if that was this same conversion, else new."""
    table = conversion.base.tensors if conversion.base else {}
    store = unfinished_store(staged)
    if store is not None and (store.block, list(store.table.items())) == (conversion.block, list(table.items())):
        return store
    staged.empty()
    return create_store(staged.address, conversion.block, table)


def _begin(conversion: Conversion, store: Store, segment: Segment) -> bool:
    """Create the segment, its files, and the record of its sources; True if an interrupted run did so already."""
    files = Files(store)
    records = [checkpoint.record(files.name) for checkpoint in conversion.checkpoints]
    sources = [record.to_json() for record in records]
    source = conversion.base.record(files.name).to_json() if conversion.base and not conversion.store else None
    location = locate(store.address)
    if location.below(segment.path).exists():
        certain = all(record.fingerprints for record in records)  # else the record would fit other tensors too
        certain = certain and all(checkpoint.files for checkpoint in conversion.read)
        same = _as_sources(_recorded(store, segment.path)) == _as_sources(sources)
        if source is not None:
            same = same and _as_sources([_recorded(store, "base", "source")]) == _as_sources([source])
        if certain and same:
            files.write()
            set_attribute(store, segment.path, "sources", sources)
            return True
    if (
        not conversion.forgotten
    ):  # else ``store`` is not what is committed, and what an interrupted run left is gone already
        sweep(store)
    location.below(f"base/{FINISHED}").remove()
    files.write()
    create_segment(store, segment)
    if source is not None:
        set_attribute(store, "base", "source", source)
    set_attribute(store, segment.path, "sources", sources)
    return False


def _recorded(store: Store, path: str, name: str = "sources") -> Any:
    """The sources that a segment was begun for; None if it was left too early, or damaged, to say."""
    try:
        return attribute(store, path, name)
    except StoreError:
        return None


def _as_sources(records: Any) -> Any:
    """Sources without what was not stored of them: a trainer may have removed its state meanwhile."""
    return [{k: v for k, v in (record or {}).items() if k != "not_stored"} for record in records or []]


def _commit(
    conversion: Conversion, store: Store, segment: Segment, written: list[tuple[Block, tuple[Written, Written | None]]]
) -> tuple[Store, tuple[str, ...]]:
    write_small(store, segment.path, [(block, moves) for block, (moves, _) in written])
    write_changed(store, segment, _changed(store, segment, [(block, moves) for block, (moves, _) in written]))
    base = store.base_content
    if not conversion.store:
        write_small(store, "base", [(block, bits) for block, (_, bits) in written if bits])
        base = content_hashes(store, "base", 0)[0]
    segment = replace(segment, content=tuple(content_hashes(store, segment.path, segment.columns)))
    if base in segment.content:
        step = segment.steps[segment.content.index(base)]
        raise BaseItselfError(f"step {step}: is the base itself (bit for bit); leave it out with --steps", step)
    where = locate(store.address)
    for part in ("base", segment.path):
        where.below(f"{part}/{FINISHED}").remove()
    done = commit_chain(replace(store, base_content=base), (*store.segments, segment))
    return done, tuple(_notes(done))


def _changed(store: Store, segment: Segment, written: list[tuple[Block, Written]]) -> np.ndarray:
    """How many elements of each tensor differ from the base in each state of a new segment: int64 [tensors, K]."""
    table = {tensor.name: np.zeros(segment.columns, np.int64) for tensor in store.tensors}
    if store.segments:  # blocks count from the step before
        for counts, before in zip(table.values(), store.changed(store.segments[-1])[:, -1], strict=False):
            counts += before
    for block, note in written:
        for piece, changed in zip(block.pieces, note.changed, strict=True):
            table[piece.tensor.name] += changed
    return np.stack([*table.values()]) if table else np.zeros((1, segment.columns), np.int64)


def _notes(store: Store) -> Iterator[str]:
    """What the user should know of the steps just added."""
    segment = store.segments[-1]
    base, last = (
        {name: store.file(record.side[name]) for name in COMPARED if name in record.side}
        for record in (store.base(), store.record(segment.steps[-1]))
    )
    differing = differences(base, last)
    if differing:
        yield (
            f"step {segment.steps[-1]} differs from the base in {', '.join(differing)}: predictions take these from "
            f"the last step of their window"
        )
    seen = {content: step for step, content in store.contents.items() if step not in segment.steps}
    for step, content in zip(segment.steps, segment.content, strict=True):
        if content in seen:
            yield f"step {step} is bit for bit the same as step {seen[content]}"
        seen.setdefault(content, step)
    for tensor, counts in zip(store.tensors, store.changed(segment), strict=False):
        if counts.any() and not tensor.kind.is_float:
            fate = "predictions carry over its last state" if is_buffer(tensor.dtype) else "it cannot be predicted"
            yield f"{tensor.name} ({tensor.dtype}) changes; it is stored; {fate}"
