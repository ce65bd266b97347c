"""Before anything is written: find the checkpoints, check that they belong together, and plan the memory."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from relexio.atomic import PARTIAL
from relexio.checkpoints.layout import choose, step_directory
from relexio.checkpoints.read import Checkpoint, open_checkpoint
from relexio.engine import graph, plan
from relexio.engine.executor import Executor
from relexio.engine.process import resident_bytes
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError, ExistsError, IncompleteError, RequestError
from relexio.progress import Stages
from relexio.store.schema import FILE_CHUNK, Block, StoredShard, block_elements, lay_out, moves_chunk
from relexio.store.state import digest_of
from relexio.store.storage import METADATA, Place, place
from relexio.store.store import Store, begun, open_store
from relexio.verbs.convert.before import doubt_of_base, written_again
from relexio.verbs.convert.check import Source, Table, fit_to_base, refuse_base_among
from relexio.verbs.convert.encode import Reader
from relexio.words import Selection, describe_steps


@dataclass(frozen=True)
class Request:
    """What the user asked of ``convert``: a directory of steps and steps by name, the base, and the store to write."""

    out: str | Path
    base: Path | None = None
    root: Path | None = None
    named: dict[int, Path] | None = None
    selection: Selection | None = None


@dataclass(frozen=True)
class Conversion:
    """What a ``convert`` will do: into ``out``, from ``base`` (None: the store's own), the steps that are new."""

    out: Place
    store: Store | None
    base: Source | None
    sources: tuple[Source, ...]
    block: int
    executor: Executor
    present: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps to be added, ascending."""
        return tuple(source.checkpoint.step for source in self.sources if source.checkpoint.step is not None)

    @property
    def by_step(self) -> dict[int, Source]:
        """The checkpoints to be added, by step."""
        return dict(zip(self.steps, self.sources, strict=True))

    @property
    def read(self) -> tuple[Source, ...]:
        """The checkpoints to be read: the new steps, and the base of a new store."""
        return self.sources if self.store or self.base is None else (self.base, *self.sources)

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoints to be read."""
        return sum(source.checkpoint.nbytes for source in self.read)

    @property
    def bytes_written_at_most(self) -> int:
        """Bytes to be written if nothing could be left out or compressed; RLVR steps take a small part of theirs."""
        side = sum(sum(source.checkpoint.side_sizes) for source in self.read)
        return self.bytes_read + self.bytes_read // 100 + side + (1 << 20)


def prepare(request: Request, resources: Resources, stages: Stages) -> Conversion:
    """Find, check and plan. Reads headers, and of tensors only a sample; writes nothing.

    Raises a RelexioError that names file, tensor and step for whatever cannot be converted as it is.
    """
    where = place(request.out)
    out, there = where.shown, where.exists()
    if there and where.get(METADATA) is None:
        raise ExistsError(f"{out}: exists and is not a trajectory; give another -o")
    if out.endswith(PARTIAL):
        raise RequestError(f"{out}: the name of unfinished work; give -o {out.removesuffix(PARTIAL)}")
    store = open_store(where.address) if there and not begun(where) else None
    found, others = choose(request.root, request.named or {}, request.selection)
    if store is None and request.base is None:
        raise RequestError(f"{out} does not exist yet: a new trajectory needs --base, the model before RL")
    present = tuple(step for step in found if store and step in store.steps)
    checkpoints, unfinished = _open_all(found, request, store.steps if store else ())
    base = open_checkpoint(request.base) if request.base else None
    table = _table(store, base)
    label = base.label if base else f"the base of {out}"
    sources = tuple(fit_to_base(checkpoint, table, label) for checkpoint in checkpoints)
    base_source = fit_to_base(base, table, f"the base of {out}") if base else None
    if base_source is not None:
        refuse_base_among(sources, base_source)
        if store is not None:
            _require_same_base(store, base_source, resources, stages)
    entries = [(name, dtype, shape) for name, (dtype, shape) in table.items()]
    block = store.block if store else block_elements(max((t.size for t in lay_out(entries, 1 << 62)), default=1))
    notes = [f"not step directories, left out: {', '.join(others)}"] if others else []
    notes += unfinished
    doubt = doubt_of_base(base_source, sources) if base_source is not None and store is None else None
    notes += [doubt] if doubt else []
    again = written_again(store, {step: found[step] for step in present}, table) if store is not None else None
    notes += [again] if again else []
    if present:
        notes.append(f"already stored, not read again: {describe_steps(present)}")
    read = (*sources, *([base_source] if base_source else []))
    largest = max((size for source in read for size in source.checkpoint.side_sizes), default=0)
    executor = _executor(entries, block, len(sources), largest, resources)
    return Conversion(where, store, base_source, sources, block, executor, present, tuple(notes))


def _open_all(found: dict[int, Path], request: Request, stored: tuple[int, ...]) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints that are not stored yet, and notes on those at the end of the run that are still being written.

    Raises IncompleteError for one that was asked for by its number, or that a later one stands behind.
    """
    opened, unfinished = [], {}
    for step, path in found.items():
        if step in stored:
            continue
        try:
            top = (request.named or {}).get(step) or step_directory(path, request.root)
            opened.append(open_checkpoint(path, step, top))
        except IncompleteError as error:
            if step in (request.named or {}) or step in (request.selection.named if request.selection else []):
                raise
            unfinished[step] = error
    whole = [*stored, *(checkpoint.step or 0 for checkpoint in opened)]
    for step, problem in unfinished.items():
        if not whole or step < max(whole):
            raise problem
    return opened, [f"step {step} is not whole yet, left out: {problem}" for step, problem in unfinished.items()]


def _table(store: Store | None, base: Checkpoint | None) -> Table:
    if store is not None:
        return {tensor.name: (tensor.dtype, tensor.shape) for tensor in store.tensors}
    return {entry.name: (entry.dtype, entry.shape) for entry in base.entries.values()} if base else {}


def _executor(
    entries: list[tuple[str, str, tuple[int, ...]]], block: int, count: int, side: int, resources: Resources
) -> Executor:
    """Where the blocks of so many steps are encoded, the largest side file ``side`` bytes: within the memory. Raises
    BudgetError."""
    tensors = [tensor for tensor in lay_out(entries, block) if tensor.size]
    kinds = {tensor.kind for tensor in tensors}
    steps = max(count, 1)
    itemsize = max((kind.itemsize for kind in kinds), default=1)
    need = plan.convert_need(block, itemsize, steps, moves_chunk(block, steps))
    resources = replace(resources, held=resident_bytes())  # the headers of all steps are held by now
    return resources.on_cpu(need, shared=3 * min(side, FILE_CHUNK))


def _require_same_base(store: Store, base: Source, resources: Resources, stages: Stages) -> None:
    """Raise CheckpointError unless the named base is the store's: by its files' names, sizes and times, else by hashes."""
    known = store.base()
    now = tuple((s.path.name, s.size, s.mtime_ns) for s in base.checkpoint.shards)
    if known.source == str(base.checkpoint.path.resolve()) and now == tuple(map(_stamp, known.shards)):
        return

    need = plan.convert_need(store.block, 4, 1, 0)
    executor = resources.on_cpu(need)
    executor.require([*store.files(METADATA), *(shard.path for shard in base.checkpoint.shards)])
    with stages("compare the base", base.checkpoint.nbytes) as advance:
        found = graph.sums(store, 1, partial(_differs, store, base), executor, advance)
    for name, different in found.items():
        if different[0]:
            raise CheckpointError(
                f"{base.checkpoint.label}: tensor {name} differs from the base of {store.shown}; leave --base out"
            )


def _differs(store: Store, base: Source, block: Block) -> np.ndarray:
    bits = np.empty(block.size, block.kind.bits)
    with ExitStack() as stack:
        Reader(base, block, stack).read(0, bits)
    return np.array([digest_of(bits) != store.digests("base", block).tobytes()])


def _stamp(shard: StoredShard) -> tuple[str, int, int]:
    return shard.name, shard.size, shard.mtime_ns
