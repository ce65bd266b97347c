"""``verify``: whether a trajectory is what was written, and whether the checkpoints that it came from hold the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from relexio.checkpoints.layout import Source, choose, open_checkpoint, open_step
from relexio.checkpoints.match import match
from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.record import CheckpointRecord
from relexio.engine import graph, plan
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError, StoreError
from relexio.progress import Stages
from relexio.store import cache
from relexio.store.schema import Block, Group, moves_chunk
from relexio.store.state import block_state, digest_of
from relexio.store.storage import METADATA, locate
from relexio.store.store import Store, file_digest
from relexio.store.write import content_hashes
from relexio.verbs.convert.encode import held, read_block
from relexio.verbs.convert.left import NotStoredSummary, present
from relexio.words import describe_steps

_UNKNOWN = ""  # in place of a group: of that tensor a block could not be read
#: How many elements differ from the base at each step, int64 [K], by the names of group and tensor.
Changed = dict[tuple[str, str], np.ndarray | int]


@dataclass(frozen=True)
class Originals:
    """Checkpoints to compare with: those of stored steps, and the base if it was named.

    ``root`` is the directory that they are in. ``problems`` are those that cannot be compared, ``notes`` say what is left
    out.
    """

    steps: dict[int, Checkpoint] = field(default_factory=dict)
    base: Checkpoint | None = None
    root: Path | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def left(self) -> list[NotStoredSummary]:
        """What the checkpoints hold besides, and the trajectory does not."""
        return present(self.steps.values(), self.base, self.root)


@dataclass(frozen=True)
class Verification:
    """What was checked, and the problems: one line each, none if all is well.

    ``left`` is what the compared directories hold besides, and the trajectory does not.
    """

    steps: tuple[int, ...]
    compared: tuple[int, ...]
    base_compared: bool
    bytes_checked: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    left: tuple[NotStoredSummary, ...] = ()


@dataclass
class _BlockFindings:
    """What one block gave: problems, and by group how many elements differ from the base at each step."""

    problems: list[str] = field(default_factory=list)
    changed: dict[str, np.ndarray] = field(default_factory=dict)


def find_originals(
    store: Store, root: Path | None, base: Source | None, named: Mapping[int, Source] | None = None
) -> Originals:
    """The checkpoints that the store holds, below a directory or named one by one, and its base.

    Raises CheckpointError for a base that is not a model.
    """
    label, problems, notes = f"the base of {store.shown}", [], []
    sources = choose(root, named or {}, None)[0] if root is not None or named else {}
    if absent := tuple(step for step in sources if step not in store.steps):
        notes.append(f"not in the trajectory: {describe_steps(absent)}")
    if root is not None and (alone := tuple(step for step in store.steps if step not in sources)):
        notes.append(f"not compared, no such directory: {describe_steps(alone)}")
    originals = {}
    for step in (step for step in sources if step in store.steps):
        try:
            originals[step] = match(open_step(step, sources[step], root, named or {}), store.table, label)
        except CheckpointError as error:
            problems.append(str(error))
    original = match(open_checkpoint(base), store.table, label) if base else None
    return Originals(originals, original, root, tuple(problems), tuple(notes))


def verify(store: Store, originals: Originals, resources: Resources, stages: Stages) -> Verification:
    """Read all of a store: checksums, hashes, structure; and compare it bit for bit with the checkpoints given."""
    most = max(len(group.steps) for group in store.groups)
    need = plan.convert_need(store.block, 4, most, moves_chunk(store.block, most))
    executor = resources.on_cpu(need)
    executor.require(store.files(METADATA))
    total = sum(tensor.nbytes for tensor in store.tensors) * (1 + len(store.steps))
    kernel = partial(_check_block, store, originals, executor.plan.tile_bytes)
    with stages("verify", total) as advance:
        blocks = graph.each(store, 1 + len(store.steps), kernel, executor, advance)
    changed: Changed = {}
    problems = list(originals.problems)
    for block, findings in blocks:
        problems += findings.problems
        if findings.problems:
            changed[_UNKNOWN, block.tensor.name] = 1
        for group, counts in findings.changed.items():
            key = group, block.tensor.name
            changed[key] = changed.get(key, 0) + counts
    for check in _checks(store, originals, changed):
        try:
            problems += check()
        except StoreError as error:
            problems.append(str(error))
    damaged, closed, others = cache.check(store)
    problems += damaged
    notes = (*originals.notes, *_closed(closed), *_of_others(others), *_leftovers(store))
    compared, base = tuple(originals.steps), originals.base is not None
    left = tuple(originals.left())
    return Verification(store.steps, compared, base, total, tuple(dict.fromkeys(problems)), notes, left)


def _check_block(store: Store, originals: Originals, nbytes: int, block: Block) -> _BlockFindings:
    findings = _BlockFindings()
    try:
        findings.problems += _check_base(store, originals.base, block)
        for group in store.groups:
            findings.problems += _check_group(store, originals.steps, nbytes, group, block, findings.changed)
    except (StoreError, CheckpointError) as error:
        findings.problems.append(str(error))
    return findings


def _check_base(store: Store, original: Checkpoint | None, block: Block) -> Iterator[str]:
    bits = store.base_bits(block)
    if digest_of(bits) != store.digests("base", block).tobytes():
        yield f"{store.shown}: base: tensor {block.tensor.name}: not the bits that were hashed; the store is damaged"
    if original is not None and (read_block(original, block) != bits).any():
        yield f"{original.label}: tensor {block.tensor.name}: differs from what {store.shown} holds"


def _check_group(
    store: Store,
    originals: dict[int, Checkpoint],
    nbytes: int,
    group: Group,
    block: Block,
    changed: dict[str, np.ndarray],
) -> Iterator[str]:
    compared = {column: originals[step] for column, step in enumerate(group.steps) if step in originals}
    unlike: set[int] = set()
    with ExitStack() as stack:
        readers = {column: held(original, block, stack) for column, original in compared.items()}

        def see(first: int, bits: np.ndarray) -> None:
            row = np.empty(bits.shape[1], bits.dtype)
            for column, read in readers.items():
                read(first, row)
                if (row != bits[column]).any():
                    unlike.add(column)

        digests, changed[group.name] = block_state(store, group, block, nbytes, see)
    for column in np.flatnonzero((digests != store.digests(group.path, block)).any(axis=1)):
        yield (
            f"{store.shown}: step {group.steps[column]}: tensor {block.tensor.name}: "
            f"not the bits that were hashed; the store is damaged"
        )
    for label in (compared[column].label for column in sorted(unlike)):
        yield f"{label}: tensor {block.tensor.name}: differs from what {store.shown} holds"


def _checks(store: Store, originals: Originals, changed: Changed) -> Iterator[Callable[[], list[str]]]:
    """What is checked besides blocks: each check by itself, so that one that fails does not hide another."""
    yield partial(_check_content, store, "base", (store.base_content,), 0)
    for node in store.sealed:
        yield partial(_check_node, store, node)
    for group in store.groups:
        yield partial(_check_content, store, group.path, group.content, len(group.steps))
        yield partial(_check_changed, store, group, changed)
        yield partial(_check_files, store, group)
        for step, record in store.checkpoints(group).items():
            if step in originals.steps:
                yield partial(_check_side, store, record, originals.steps[step])
    if originals.base is not None:
        yield partial(_check_side, store, store.base(), originals.base)


def _check_content(store: Store, path: str, content: tuple[str, ...], steps: int) -> list[str]:
    same = tuple(content_hashes(store, path, steps)) == content
    return [] if same else [f"{store.shown}: {path}: content hashes are not those of its blocks; the store is damaged"]


def _check_node(store: Store, node: str) -> list[str]:
    store.metadata(node)
    return []


def _check_changed(store: Store, group: Group, changed: Changed) -> list[str]:
    table = store.changed(group)
    for row, tensor in zip(table, store.tensors, strict=True):
        known = (_UNKNOWN, tensor.name) not in changed
        if known and (row != changed.get((group.name, tensor.name), 0)).any():
            return [f"{store.shown}: {group.path}/changed: wrong for tensor {tensor.name}; the store is damaged"]
    return []


def _check_files(store: Store, group: Group) -> list[str]:
    records = [store.base(), *store.checkpoints(group).values()]
    names = {name for record in records for name in record.files}
    problems = []
    for name in sorted(names):
        try:
            for _ in store.pieces(name):
                pass
        except StoreError as error:
            problems.append(str(error))
    return problems


def _check_side(store: Store, record: CheckpointRecord, original: Checkpoint) -> list[str]:
    """What differs of a checkpoint besides its tensors: headers, the index, config, tokenizer."""
    what = {True: "differs from what", False: "is not among what"}
    differing = record.unlike(original.record(file_digest))
    return [f"{original.label}: {name}: {what[stored]} {store.shown} holds" for name, stored in differing]


def _closed(names: list[str]) -> Iterator[str]:
    """Kept fits that may not be read are no part of the data: nothing of yours depends on them."""
    if names:
        yield f"no permission to read kept fits, not checked: {', '.join(names)}; they are computed again where needed"


def _of_others(names: list[str]) -> Iterator[str]:
    """Kept fits of another trajectory that stood here, or was copied over this one; nothing reads them."""
    if names:
        yield f"kept fits of other data, not read: {', '.join(names)}; they are computed again where needed"


def _leftovers(store: Store) -> Iterator[str]:
    """What an interrupted command left; nothing reads it, and the next one removes it or goes on with it."""
    known = {group.name for group in store.groups} | {METADATA}
    left = [f"groups/{name}" for name in locate(store.address).below("groups").names() if name not in known]
    left += [name for name in locate(store.address).names() if name.endswith(".partial")]
    left += [f"cache/{name}" for name in cache.left(store)]
    if left:
        yield f"left by an interrupted command, not read: {', '.join(sorted(left))}"
