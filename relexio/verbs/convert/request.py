"""Before anything is written: find the checkpoints, check that they belong together, and plan the memory."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from re import Pattern

from relexio.atomic import PARTIAL
from relexio.checkpoints.layout import Source, choose, open_checkpoint, open_step, weights
from relexio.checkpoints.match import match
from relexio.checkpoints.protocol import Checkpoint
from relexio.dtypes import Table, can_cast, kind_of
from relexio.engine import graph, plan
from relexio.engine.executor import Executor
from relexio.engine.process import resident_bytes
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError, ExistsError, IncompleteError, MissingError, RelexioError, RequestError
from relexio.progress import Stages
from relexio.store.opening import has_begun, open_store
from relexio.store.schema import FILE_CHUNK, MOST_STEPS, Block, block_elements, lay_out
from relexio.store.state import digest_of
from relexio.store.storage import METADATA, Location, locate
from relexio.store.store import Store
from relexio.verbs.convert.base import StoredBase, as_stored
from relexio.verbs.convert.before import doubt_of_base, refuse_base_among, written_again
from relexio.verbs.convert.encode import read_block
from relexio.words import Selection, describe_steps


@dataclass(frozen=True)
class Request:
    """What the user asked of ``convert``: a directory of steps and steps by name, the base, and the store to write.

    ``dtype``: a new store has the types of the ``base``, or those that are ``stored`` in the steps' files. ``pattern``: names
    of step directories. Raises RequestError for another dtype.
    """

    out: str | Path
    base: Source | None = None
    root: Path | None = None
    named: Mapping[int, Source] | None = None
    selection: Selection | None = None
    replace: Selection | None = None
    dtype: str = "base"
    pattern: Pattern[str] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("base", "stored"):
            raise RequestError(f"unknown dtype {self.dtype!r}; known are base, stored")


@dataclass(frozen=True)
class Conversion:
    """What a ``convert`` will do: into ``out``, from ``base`` (None: the store's own), the steps that are new.

    ``forgotten`` are stored steps that go in the same commit; ``stored`` has checkpoints of the base and of the last step that
    stays, where their files are still those that were stored.
    """

    out: Location
    store: Store | None
    base: Checkpoint | None
    checkpoints: tuple[Checkpoint, ...]
    stored: tuple[Checkpoint | None, Checkpoint | None]
    block: int
    executor: Executor
    present: tuple[int, ...]
    forgotten: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps to be added, ascending."""
        return tuple(self.by_step)

    @property
    def by_step(self) -> dict[int, Checkpoint]:
        """The checkpoints to be added, by step."""
        return {checkpoint.step: checkpoint for checkpoint in self.checkpoints if checkpoint.step is not None}

    @property
    def read(self) -> tuple[Checkpoint, ...]:
        """The checkpoints to be read: the new steps, and the base of a new store."""
        return self.checkpoints if self.store or self.base is None else (self.base, *self.checkpoints)

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoints to be read."""
        return sum(checkpoint.nbytes for checkpoint in self.read)

    @property
    def bytes_written_at_most(self) -> int:
        """Bytes to be written if nothing could be left out or compressed; RLVR steps take a small part of that."""
        side = sum(sum(checkpoint.side_sizes) for checkpoint in self.read)
        return self.bytes_read + self.bytes_read // 100 + side + (1 << 20)


def prepare(request: Request, resources: Resources, stages: Stages) -> Conversion:
    """Find, check and plan. Reads headers, and of tensors only a sample; writes nothing.

    Raises a RelexioError that names file, tensor and step for whatever cannot be converted as it is.
    """
    target = locate(request.out)
    out, store = target.shown, existing_store(request.out)
    sources, others = choose(request.root, request.named or {}, request.selection, request.pattern)
    if store is None and request.base is None:
        raise RequestError(f"{out} does not exist yet: a new trajectory needs --base, the model before RL")
    forgotten = _forgotten(store, request, sources)
    stored = tuple(step for step in store.steps if step not in forgotten) if store else ()
    opened, unfinished = _open_all(sources, request, stored)
    if request.replace and not any((checkpoint.step or 0) in request.replace for checkpoint in opened):
        raise IncompleteError(f"--replace {request.replace.text}: nothing was replaced: {'; '.join(unfinished)}")
    base = open_checkpoint(request.base) if request.base else None
    table = store.table if store else _table(base, opened, request.dtype)
    label = base.label if base else f"the base of {out}"
    below = base or (StoredBase(store, going_on=True) if store else None)
    checkpoints = tuple(match(c.over(below) if below else c, table, label) for c in opened)
    notes = [f"not step directories, left out: {', '.join(others)}"] if others else []
    notes += [*unfinished, *_casts(checkpoints, table, request, store)]
    if base is not None:
        base = match(base, table, f"the base of {out}")
        refuse_base_among(checkpoints, base)
        if store is not None:
            _require_same_base(store, base, resources, stages)
        if doubt := doubt_of_base(base, (*_only_step(store, request), *checkpoints)):
            notes.append(doubt)
    present = tuple(step for step in sources if step in stored)
    named = {step: path for step, path in (request.named or {}).items() if step in present}
    if store is not None and (
        again := written_again(store, {step: sources[step] for step in present}, request.root, named)
    ):
        notes.append(again)
    if present:
        notes.append(f"already stored, not read again: {describe_steps(present)}")
    block = store.block if store else block_elements(_most_elements(table))
    if len(stored) + len(checkpoints) > MOST_STEPS:
        raise RequestError(f"{out}: a trajectory holds {MOST_STEPS:,} steps at most; choose some with --steps")
    read = (*checkpoints, *([base] if base else []))
    largest = max((size for checkpoint in read for size in checkpoint.side_sizes), default=0)
    segments = len(store.segments) if store else 0
    if any(isinstance(source, Path) for source in sources.values()):
        resources = replace(resources, held=resident_bytes())  # the headers of all steps are held by now
    scratch = max((checkpoint.scratch for checkpoint in checkpoints), default=0)
    executor = _executor(table, block, len(checkpoints), segments, largest, scratch, resources)
    still = _still_there(store, forgotten) if store and checkpoints else (None, None)
    return Conversion(target, store, base, checkpoints, still, block, executor, present, forgotten, tuple(notes))


def _table(base: Checkpoint | None, steps: list[Checkpoint], dtype: str) -> Table:
    """The tensors of a new store: the base's, with the float types of the first step if those on disk are wanted."""
    table = dict(base.tensors) if base else {}
    for name, (own, shape) in table.items() if dtype == "stored" and steps else ():
        found = steps[0].tensors.get(name, (own, shape))[0]
        table[name] = (found if can_cast(own, found) else own, shape)
    return table


def _casts(checkpoints: Sequence[Checkpoint], table: Table, request: Request, store: Store | None) -> list[str]:
    """A note on steps whose floats are stored in other types than they have. Raises RequestError where none was to be cast."""
    cast = sorted({checkpoint.cast for checkpoint in checkpoints if checkpoint.cast})
    if not cast:
        return []
    types = sorted({dtype for dtype, _ in table.values() if kind_of(dtype).is_float})
    if request.dtype == "stored" and store is not None:
        raise RequestError(
            f"{store.shown} has {', '.join(types)}: --dtype stored is for a new trajectory; give another -o"
        )
    why = (
        "" if store else "; --dtype stored keeps theirs, and is larger, since in fp32 every element moves at every step"
    )
    return [
        f"steps have {', '.join(cast)}, and the base {', '.join(types)}: stored in the base's types, rounded to nearest even{why}"
    ]


def existing_store(out: str | Path) -> Store | None:
    """The store to add to; None where a new one is to be made. Raises ExistsError or RequestError where neither can be."""
    target = locate(out)
    exists = target.exists()
    if exists and target.get(METADATA) is None:
        raise ExistsError(f"{target.shown}: exists and is not a trajectory; give another -o")
    if target.shown.endswith(PARTIAL):
        rest = target.shown.removesuffix(PARTIAL)
        raise RequestError(f"{target.shown}: names ending in {PARTIAL} are for unfinished work; give -o {rest}")
    return open_store(target.address) if exists and not has_begun(target) else None


def _most_elements(table: Table) -> int:
    """Elements of the kind that has most."""
    sizes: Counter[str] = Counter()
    for tensor in lay_out(table, 1):
        sizes[tensor.kind.name] += tensor.size
    return max(sizes.values(), default=1)


def _forgotten(store: Store | None, request: Request, sources: Mapping[int, Source]) -> tuple[int, ...]:
    """The stored steps that others will replace. Raises RequestError where none would."""
    if request.replace is None:
        return ()
    chosen = tuple(step for step in store.steps if step in request.replace) if store else ()
    if not chosen:
        raise RequestError(f"--replace {request.replace.text}: no such step is stored; leave --replace out")
    if not any(step in request.replace for step in sources):
        raise RequestError(
            f"--replace {request.replace.text}: no checkpoint of such a step was found to stand in the place of "
            f"{describe_steps(chosen)}; give the directory that has them"
        )
    return chosen


def _still_there(store: Store, forgotten: tuple[int, ...]) -> tuple[Checkpoint | None, Checkpoint | None]:
    """Checkpoints of the base, and of the last step in the chain that stays, whose files are still those that were stored."""
    staying = [step for step in store.chain if step not in forgotten]
    records = store.base(), store.record(staying[-1]) if staying else None
    found: list[Checkpoint | None] = [None, None]
    for place, record in enumerate(records):
        with suppress(CheckpointError, OSError):
            if record is not None and record.from_safetensors and record.is_still_in(directory := Path(record.source)):
                found[place] = match(open_checkpoint(directory, record.step), store.table, store.shown)
    return found[0], found[1]


def _only_step(store: Store | None, request: Request) -> list[Checkpoint]:
    """The one step of a store, if it still stands where it was: a base is doubted by two steps, when the second comes."""
    if store is None or len(store.steps) > 1:
        return []
    step, named = store.steps[0], request.named or {}
    sources, _ = choose(request.root, named, None, request.pattern)
    if step in sources:
        with suppress(CheckpointError):
            return [as_stored(open_step(step, sources[step], request.root, named), StoredBase(store))]
    return []


def _open_all(
    sources: Mapping[int, Source], request: Request, stored: tuple[int, ...]
) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints that are not stored yet, and notes on those at the end of the run that are still being written.

    One without weights that can be read is left out wherever it is. Raises IncompleteError for one that was asked for by its
    number, or that has a part missing while a later one is whole.
    """
    opened, unfinished, named = [], dict[int, RelexioError](), request.named or {}
    for step, source in sources.items():
        if step in stored:
            continue
        try:
            opened.append(open_step(step, source, request.root, named))
        except (CheckpointError, MissingError) as error:
            asked = step in named or step in (request.selection.named if request.selection else [])
            if asked or not (isinstance(error, IncompleteError) or _has_gone(source)):
                raise
            unfinished[step] = error
    whole = [*stored, *(checkpoint.step or 0 for checkpoint in opened)]
    for step, problem in unfinished.items():
        if not whole or (step < max(whole) and not _has_gone(sources[step])):
            raise problem
    notes = [f"step {step} is left out: {problem}" for step, problem in unfinished.items() if step < max(whole)]
    late = {step: problem for step, problem in unfinished.items() if step > max(whole)}
    return opened, notes + [f"step {s} is not complete yet, and left out: {problem}" for s, problem in late.items()]


def _has_gone(source: Source) -> bool:
    """Whether a directory has no weights that can be read: removed by the trainer, or in another form."""
    return isinstance(source, Path) and not weights(source)


def _executor(
    table: Table, block: int, count: int, segments: int, side: int, scratch: int, resources: Resources
) -> Executor:
    """Where the blocks of so many steps are encoded, and so many ``segments`` read, the largest side file ``side`` bytes, and
    ``scratch`` to read a step: within the memory. Raises BudgetError."""
    tensors = [tensor for tensor in lay_out(table, block) if tensor.size]
    kinds = {tensor.kind for tensor in tensors}
    steps = max(count, 1)
    itemsize = max((kind.itemsize for kind in kinds), default=1)
    need = plan.convert_need(block, itemsize, steps, segments, scratch)
    return resources.on_cpu(need, shared=3 * min(side, FILE_CHUNK))


def _require_same_base(store: Store, base: Checkpoint, resources: Resources, stages: Stages) -> None:
    """Raise CheckpointError unless the named base is the store's: by its files' names, sizes and times, else by hashes."""
    record = store.base()
    if base.files and (base.source, base.fingerprints) == (record.source, record.fingerprints):
        return
    executor = resources.on_cpu(plan.convert_need(store.block, 4, 1, 0))
    executor.require([*store.files(METADATA), *(file.path for file in base.files)])
    with stages("compare the base", base.nbytes) as advance:
        for _, name in graph.each(store, 1, partial(_differing, store, base), executor, advance):
            if name is not None:
                raise CheckpointError(
                    f"{base.label}: tensor {name} differs from the base of {store.shown}; leave --base out"
                )


def _differing(store: Store, base: Checkpoint, block: Block) -> str | None:
    """The first tensor in a block that differs from the base."""
    bits = read_block(base, block)
    if digest_of(bits) == store.digests("base", block).tobytes():
        return None
    differs = bits != store.base_bits(block)
    return next((p.tensor.name for p in block.pieces if differs[p.span].any()), block.pieces[0].tensor.name)
