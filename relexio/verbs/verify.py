"""``verify``: whether a trajectory is what was written, and whether the checkpoints that it came from hold the same."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from re import Pattern

import numpy as np

from relexio.checkpoints.layout import Source, choose, open_checkpoint, open_step
from relexio.checkpoints.lora_state import META
from relexio.checkpoints.match import match
from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.record import CheckpointRecord
from relexio.checkpoints.whole import weight_stamps
from relexio.engine import graph, plan
from relexio.engine.process import allow_files
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError, StoreError
from relexio.progress import Stages
from relexio.store import cache
from relexio.store.schema import Block, Segment
from relexio.store.seal import consolidated, damage, file_of, hash_of
from relexio.store.state import block_states, digest_of
from relexio.store.storage import METADATA, locate
from relexio.store.store import Store, file_digest
from relexio.store.write import content_hashes
from relexio.verbs.convert.base import StoredBase, as_stored
from relexio.verbs.convert.encode import Fill, held, read_block
from relexio.verbs.convert.left import NotStoredSummary, present
from relexio.words import describe_steps

#: How many elements differ from the base in each state of the chain, int64 [R], by tensor; None: a block could not be read.
Changed = dict[str, np.ndarray | None]


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
class RestoredOtherwise:
    """Checkpoints that were compared, and perhaps the base, whose weight files the trajectory could not give back: ``how`` it
    writes them."""

    steps: tuple[int, ...]
    base: bool
    how: str

    def __str__(self) -> str:
        named = [describe_steps(self.steps)] if self.steps else []
        named += ["the base"] if self.base else []
        return f"the weight files of {' and '.join(named)}: restore writes them {self.how}"


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
    otherwise: tuple[RestoredOtherwise, ...] = ()


@dataclass
class _BlockFindings:
    """What one block gave: problems, and how many elements of each piece differ from the base in each state: [pieces, R]."""

    problems: list[str] = field(default_factory=list)
    changed: np.ndarray | None = None


def find_originals(
    store: Store,
    root: Path | None,
    base: Source | None,
    named: Mapping[int, Source] | None = None,
    pattern: Pattern[str] | None = None,
) -> Originals:
    """The checkpoints that the store holds, below a directory or named one by one, and its base.

    Raises CheckpointError for a base that is not a model.
    """
    label, problems, notes = f"the base of {store.shown}", [], []
    sources = choose(root, named or {}, None, pattern)[0] if root is not None or named else {}
    if absent := tuple(step for step in sources if step not in store.steps):
        notes.append(f"not in the trajectory: {describe_steps(absent)}")
    if root is not None and (alone := tuple(step for step in store.steps if step not in sources)):
        notes.append(f"not compared, no such directory: {describe_steps(alone)}")
    originals, empty, below = {}, [], StoredBase(store)
    for step in (step for step in sources if step in store.steps):
        if isinstance(source := sources[step], Path) and _has_gone(store.record(step), source):
            empty.append(step)
            continue
        try:
            originals[step] = as_stored(open_step(step, sources[step], root, named or {}), below)
        except CheckpointError as error:
            problems.append(str(error))
    if empty:
        notes.append(f"not compared, weights deleted there: {describe_steps(tuple(empty))}")
    original = match(open_checkpoint(base), store.table, label) if base else None
    return Originals(originals, original, root, tuple(problems), tuple(notes))


def _has_gone(record: CheckpointRecord, directory: Path) -> bool:
    """Whether weights that were stored are no longer there, or not all of them, and no others are in their place."""
    stamps = weight_stamps(directory) if directory.is_dir() else ()
    names = {name for name, _, _ in record.fingerprints} - {META}  # that is no weights, and may be beside the directory
    whole = all((directory / name).exists() for name in names)
    return directory.is_dir() and (not stamps or (not whole and not record.changed_in(stamps)))


def verify(store: Store, originals: Originals, resources: Resources, stages: Stages) -> Verification:
    """Read all of a store: checksums, hashes, structure; and compare it bit for bit with the checkpoints given."""
    scratch = max((original.scratch for original in originals.steps.values()), default=0)
    need = plan.convert_need(store.block, 4, len(store.steps), len(store.segments), scratch)
    executor = resources.on_cpu(need)
    executor.require(store.files(METADATA))
    total = sum(tensor.nbytes for tensor in store.tensors) * (1 + len(store.steps))
    files = 2 * len(originals.steps) * executor.plan.workers + 64
    kernel = partial(_check_block, store, originals, executor.plan.tile_bytes, files)
    with stages("verify", total) as advance:
        blocks = graph.each(store, 1 + len(store.steps), kernel, executor, advance)
    changed: Changed = {tensor.name: np.zeros(len(store.steps), np.int64) for tensor in store.tensors}
    problems = list(originals.problems)
    for block, findings in blocks:
        problems += findings.problems
        for place, piece in enumerate(block.pieces):
            so_far, counted = changed[piece.tensor.name], None if findings.problems else findings.changed
            known = None if so_far is None or counted is None else so_far + counted[place]
            changed[piece.tensor.name] = known
    for check in _checks(store, originals, changed):
        try:
            problems += check()
        except StoreError as error:
            problems.append(str(error))
    if problems:
        store.require_current()
    damaged, closed, others = cache.check(store)
    problems += damaged
    notes = (*originals.notes, *_closed(closed), *_of_others(others), *_leftovers(store))
    compared, base = tuple(originals.steps), originals.base is not None
    left, otherwise = tuple(originals.left()), tuple(_otherwise(store, originals))
    return Verification(store.steps, compared, base, total, tuple(dict.fromkeys(problems)), notes, left, otherwise)


def _otherwise(store: Store, originals: Originals) -> Iterator[RestoredOtherwise]:
    """What comes back in another form than these files have, or than those had that were stored."""
    compared: list[tuple[int | None, Checkpoint]] = [*originals.steps.items()]
    compared += [] if originals.base is None else [(None, originals.base)]
    found: dict[str, list[int | None]] = {}
    with suppress(StoreError):  # a record that is damaged is a problem already
        known: dict[int | None, CheckpointRecord] = {None: store.base()}
        known.update(pair for segment in store.segments for pair in store.checkpoints(segment).items())
        for step, original in compared:
            ways = (record.comes_back(store.table) for record in (known[step], original.record(lambda _: "")))
            if how := next(filter(None, ways), None):
                found.setdefault(how, []).append(step)
    for how, steps in found.items():
        yield RestoredOtherwise(tuple(step for step in steps if step is not None), None in steps, how)


def _check_block(store: Store, originals: Originals, nbytes: int, files: int, block: Block) -> _BlockFindings:
    allow_files(files)
    findings = _BlockFindings()
    for check in (_check_base, _check_states):
        try:
            findings.problems += check(store, originals, nbytes, block, findings)
        except (StoreError, CheckpointError) as error:
            findings.problems.append(str(error))
    return findings


def _check_base(store: Store, originals: Originals, _nbytes: int, block: Block, _: _BlockFindings) -> Iterator[str]:
    bits, original = store.base_bits(block), originals.base
    if digest_of(bits) != store.digests("base", block).tobytes():
        yield f"{store.shown}: base: {block.names}: not the bits that were hashed; the store is damaged"
    if original is not None:
        differs = read_block(original, block) != bits
        for piece in block.pieces:
            if differs[piece.span].any():
                yield f"{original.label}: tensor {piece.tensor.name}: differs from what {store.shown} holds"


def _check_states(
    store: Store, originals: Originals, nbytes: int, block: Block, findings: _BlockFindings
) -> Iterator[str]:
    compared = {row: originals.steps[step] for step, row in store.chain.items() if step in originals.steps}
    unlike: set[tuple[int, int]] = set()
    with ExitStack() as stack:
        readers: dict[
            tuple[int, int], Fill
        ] = {}  # of one piece at a time: a block may have many, and there are many steps

        def see(place: int, first: int, bits: np.ndarray) -> None:
            if first == 0:
                stack.close()
                readers.update({(r, place): held(c, block.pieces[place], stack) for r, c in compared.items()})
            row_bits = np.empty(bits.shape[1], bits.dtype)
            for row in compared:
                readers[row, place](first, row_bits)
                if (row_bits != bits[row]).any():
                    unlike.add((row, place))

        digests, findings.changed = block_states(store, block, nbytes, see)
    stored = np.concatenate([store.digests(segment.path, block) for segment in store.segments])
    steps = [*store.chain]
    for other in np.flatnonzero((digests != stored).any(axis=1)):
        yield f"{store.shown}: step {steps[other]}: {block.names}: not the bits that were hashed; the store is damaged"
    for row, place in sorted(unlike):
        yield (
            f"{compared[row].label}: tensor {block.pieces[place].tensor.name}: differs from what {store.shown} holds"
        )


def _checks(store: Store, originals: Originals, changed: Changed) -> Iterator[Callable[[], list[str]]]:
    """What is checked besides blocks: each check by itself, so that one that fails does not hide another."""
    yield partial(_check_content, store, "base", (store.base_content,), 0)
    for path in store.sealed:
        yield partial(_check_sealed, store, path)
    yield partial(_check_copy, store)
    yield partial(_check_files, store)
    for segment in store.segments:
        yield partial(_check_content, store, segment.path, segment.content, segment.columns)
        yield partial(_check_changed, store, segment, changed)
        yield partial(_check_sides, store, {step: originals.steps.get(step) for step in segment.steps})
    yield partial(_check_sides, store, {None: originals.base})


def _check_content(store: Store, path: str, content: tuple[str, ...], steps: int) -> list[str]:
    same = tuple(content_hashes(store, path, steps)) == content
    return [] if same else [f"{store.shown}: {path}: content hashes are not those of its blocks; the store is damaged"]


def _check_sealed(store: Store, path: str) -> list[str]:
    data = locate(store.address).get(file_of(path))
    if data is None or hash_of(data) != store.sealed[path]:
        return [f"{store.shown}: {file_of(path)}: damaged (it is not the one that was committed); the store is damaged"]
    return []


def _check_copy(store: Store) -> list[str]:
    with damage(f"{store.shown}/{METADATA}"):
        if consolidated(locate(store.address).get(METADATA) or b"") is not None:
            return []
    return [
        f"{store.shown}: {METADATA}: its consolidated metadata is not what convert wrote; relexio does not read it, "
        "other programs do; the next step that convert adds writes it again"
    ]


def _check_changed(store: Store, segment: Segment, changed: Changed) -> list[str]:
    first = store.chain[segment.steps[0]]
    for row, tensor in zip(store.changed(segment), store.tensors, strict=False):
        counted = changed[tensor.name]
        if counted is not None and (row != counted[first : first + segment.columns]).any():
            return [f"{store.shown}: {segment.path}/changed: wrong for tensor {tensor.name}; the store is damaged"]
    return []


def _check_files(store: Store) -> list[str]:
    names = [path for path in store.metadata if path.startswith("files/") and path.count("/") == 1]
    problems = []
    for name in sorted(names):
        try:
            for _ in store.pieces(name):
                pass
        except StoreError as error:
            problems.append(str(error))
    return problems


def _check_sides(store: Store, originals: Mapping[int | None, Checkpoint | None]) -> list[str]:
    """What differs of some steps besides their tensors, or of the base (None)."""
    there = {step: original for step, original in originals.items() if original is not None}
    return [problem for step, original in there.items() for problem in _check_side(store, store.record(step), original)]


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
    known = {segment.name for segment in store.segments} | {METADATA}
    left = [f"segments/{name}" for name in locate(store.address).below("segments").names() if name not in known]
    files = (f"files/{name}" for name in locate(store.address).below("files").names() if name != METADATA)
    left += [name for name in files if name not in store.metadata]
    left += [name for name in locate(store.address).names() if name.endswith(".partial")]
    left += [f"cache/{name}" for name in cache.left(store)]
    if left:
        yield f"left by an interrupted command, not read: {', '.join(sorted(left))}"
