"""The order of work of ``convert``: describe what is coming, write the blocks, make them durable, commit."""

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from relexio import atomic
from relexio.checkpoints.record import CheckpointRecord
from relexio.checkpoints.side import COMPARED, differences
from relexio.dtypes import is_buffer
from relexio.engine import graph
from relexio.errors import CheckpointError, ClusterError, ExistsError, RelexioError, StorageError, StoreError
from relexio.progress import Stages
from relexio.store.schema import Block, Group
from relexio.store.storage import METADATA, Location, locate
from relexio.store.store import Store, has_begun, open_store, unfinished_store
from relexio.store.write import (
    Files,
    attribute,
    commit,
    content_hashes,
    create_steps_group,
    create_store,
    set_attribute,
    write_changed,
)
from relexio.verbs.convert.encode import Job, encode_block
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
        return ConversionResult(conversion.store, False, ())
    unfinished = _begun(conversion)
    if unfinished:  # an interrupted run was about some of these steps: finish that, then add the rest
        parts = [tuple(c for c in conversion.checkpoints if (c.step in unfinished) == first) for first in (True, False)]
        done = _convert(replace(conversion, checkpoints=parts[0]), stages)
        rest = _convert(replace(conversion, store=done.store, checkpoints=parts[1]), stages)
        return ConversionResult(rest.store, True, (*done.notes, *rest.notes))
    return _convert(conversion, stages)


def _begun(conversion: Conversion) -> set[int]:
    """The steps that an interrupted run was about, if they are some but not all of those wanted now."""
    where = conversion.out if conversion.store else conversion.out.staged
    store = conversion.store or unfinished_store(where)
    name = f"groups/{len(store.groups) if store else 0:04d}"
    if store is None or where.below(name).get(METADATA) is None:
        return set()
    sources = _recorded(replace(store, address=where.address), name) or {"steps": []}
    steps = {record["step"] for record in sources["steps"]}
    return steps if steps < set(conversion.steps) else set()


def _convert(conversion: Conversion, stages: Stages) -> ConversionResult:
    """Write and commit the steps of a conversion as one group."""
    with _needed_said(conversion), conversion.out.storage_errors(), _workspace(conversion) as store:
        group = Group(f"{len(store.groups):04d}", conversion.steps)
        resumed = _begin(conversion, store, group)
        base = conversion.base if conversion.store is None else None
        job = Job(store, group, conversion.checkpoints, base, conversion.executor.plan.tile_bytes, resumed)
        executor = conversion.executor
        files = [file.path for checkpoint in conversion.read for file in checkpoint.files]
        executor.require([*store.files(f"{group.path}/{METADATA}"), *files])
        encode = partial(_encode, job, 2 * len(job.checkpoints) * executor.plan.workers + 64)
        with stages("convert", conversion.bytes_read) as advance:
            counts = graph.sums(store, len(conversion.read), encode, executor, advance)
        executor.settle(store.files(""))
        for checkpoint in conversion.read:
            checkpoint.assert_unchanged()
        write_changed(store, group, counts)
        done, notes = _commit(conversion, store, group)
    return ConversionResult(done.moved_to(conversion.out.address), resumed, notes)


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


def _encode(job: Job, files: int, block: Block) -> np.ndarray:
    _allow_files(files)  # here, since this may be another process than the one that made the plan
    return encode_block(job, block)


@contextmanager
def _workspace(conversion: Conversion) -> Iterator[Store]:
    """The store to write to, locked: the existing one, or a new one where it is staged, published at the end."""
    out = conversion.out
    if conversion.store is not None:
        with out.locked():
            store = open_store(out.address)  # another writer may have committed since
            if store.groups != conversion.store.groups:
                raise CheckpointError(f"{out.shown}: another process has added steps meanwhile; run again")
            with _clean_up(lambda: _drop_group(store)):
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


def _drop_group(store: Store) -> None:
    """Remove the group that was not committed."""
    locate(store.address).below(f"groups/{len(store.groups):04d}").remove()


def _staged_store(conversion: Conversion, staged: Location) -> Store:
    """The store that is being built: as an interrupted run left it if that was this same conversion, else new."""
    table = conversion.base.tensors if conversion.base else {}
    store = unfinished_store(staged)
    if store is not None and (store.block, list(store.table.items())) == (conversion.block, list(table.items())):
        return store
    staged.empty()
    return create_store(staged.address, conversion.block, table)


def _begin(conversion: Conversion, store: Store, group: Group) -> bool:
    """Create the group, its files, and the record of its sources; True if an interrupted run did so already."""
    known = [name for old in store.groups for name in _names(*store.checkpoints(old).values())]
    base = store.base() if conversion.store is not None else None
    files = Files(store, group.path, [*known, *(_names(base) if base else [])])
    records = [checkpoint.record(files.name) for checkpoint in conversion.checkpoints]
    base_record = conversion.base.record(files.name) if base is None and conversion.base else base
    value = {"base": base_record.to_json() if base_record else None, "steps": [r.to_json() for r in records]}
    begun_group = locate(store.address).below(group.path)
    if begun_group.exists():
        certain = all(checkpoint.files for checkpoint in conversion.read)  # else the record would fit other tensors too
        if certain and _as_sources(_recorded(store, group.path)) == _as_sources(value):
            set_attribute(store, group.path, "sources", value)
            return True
        begun_group.remove()
    create_steps_group(store, group)
    files.write()
    set_attribute(store, group.path, "sources", value)
    return False


def _recorded(store: Store, path: str) -> Any:
    """The sources that a group was begun for; None if it was left too early, or damaged, to say."""
    try:
        return attribute(store, path, "sources")
    except StoreError:
        return None


def _as_sources(value: Any) -> Any:
    """Sources without what was not stored of them: a trainer may have removed its state meanwhile."""
    if not value:
        return value
    records = [value["base"], *value["steps"]]
    return [{k: v for k, v in (record or {}).items() if k != "not_stored"} for record in records]


def _names(*records: CheckpointRecord) -> list[str]:
    return [name for record in records for name in record.files]


def _commit(conversion: Conversion, store: Store, group: Group) -> tuple[Store, tuple[str, ...]]:
    content = content_hashes(store, group.path, len(group.steps))
    base = content_hashes(store, "base", 0)[0]
    if conversion.store and base != store.base_content:
        raise StoreError(
            f"{store.shown}: base: its blocks are not those that were committed; the store is damaged; "
            f"take the trajectory from a copy"
        )
    if base in content:
        step = group.steps[content.index(base)]
        raise CheckpointError(f"step {step}: is the base itself (bit for bit); leave it out with --steps")
    where = locate(store.address)
    for written in ("base", "groups"):
        where.below(written).settle()
    records = _recorded(store, group.path)
    files = _names(*map(CheckpointRecord.from_json, [records["base"], *records["steps"]]))
    done = commit(store, replace(group, content=tuple(content)), files, base)
    return done, tuple(_notes(done))


def _notes(store: Store) -> Iterator[str]:
    """What the user should know of the steps just added."""
    group = store.groups[-1]
    base, last = (
        {name: store.file(record.side[name]) for name in COMPARED if name in record.side}
        for record in (store.base(), store.checkpoints(group)[group.steps[-1]])
    )
    differing = differences(base, last)
    if differing:
        yield (
            f"step {group.steps[-1]} differs from the base in {', '.join(differing)}: predictions take these from "
            f"the last step of their window"
        )
    seen: dict[str, int] = {h: s for old in store.groups[:-1] for s, h in zip(old.steps, old.content, strict=True)}
    for step, content in zip(group.steps, group.content, strict=True):
        if content in seen:
            yield f"step {step} is bit for bit the same as step {seen[content]}"
        seen.setdefault(content, step)
    for tensor, counts in zip(store.tensors, store.changed(group), strict=True):
        if counts.any() and not tensor.kind.is_float:
            fate = "predictions carry over its last state" if is_buffer(tensor.dtype) else "it cannot be predicted"
            yield f"{tensor.name} ({tensor.dtype}) changes; it is stored; {fate}"


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files to what the plan needs, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
