"""Before anything is written: find the checkpoints, check that they belong together, and plan the memory."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from relexio.atomic import PARTIAL
from relexio.checkpoints.layout import Source, choose, open_checkpoint, open_step
from relexio.checkpoints.match import match
from relexio.checkpoints.protocol import Checkpoint
from relexio.dtypes import Table
from relexio.engine import graph, plan
from relexio.engine.executor import Executor
from relexio.engine.process import resident_bytes
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError, ExistsError, IncompleteError, RequestError
from relexio.progress import Stages
from relexio.store.schema import FILE_CHUNK, Block, block_elements, lay_out, moves_chunk
from relexio.store.state import digest_of
from relexio.store.storage import METADATA, Location, locate
from relexio.store.store import Store, has_begun, open_store
from relexio.verbs.convert.before import doubt_of_base, refuse_base_among, written_again
from relexio.verbs.convert.encode import read_block
from relexio.words import Selection, describe_steps


@dataclass(frozen=True)
class Request:
    """What the user asked of ``convert``: a directory of steps and steps by name, the base, and the store to write."""

    out: str | Path
    base: Source | None = None
    root: Path | None = None
    named: Mapping[int, Source] | None = None
    selection: Selection | None = None


@dataclass(frozen=True)
class Conversion:
    """What a ``convert`` will do: into ``out``, from ``base`` (None: the store's own), the steps that are new."""

    out: Location
    store: Store | None
    base: Checkpoint | None
    checkpoints: tuple[Checkpoint, ...]
    block: int
    executor: Executor
    present: tuple[int, ...]
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
    out, exists = target.shown, target.exists()
    if exists and target.get(METADATA) is None:
        raise ExistsError(f"{out}: exists and is not a trajectory; give another -o")
    if out.endswith(PARTIAL):
        raise RequestError(
            f"{out}: names ending in {PARTIAL} are for unfinished work; give -o {out.removesuffix(PARTIAL)}"
        )
    store = open_store(target.address) if exists and not has_begun(target) else None
    sources, others = choose(request.root, request.named or {}, request.selection)
    if store is None and request.base is None:
        raise RequestError(f"{out} does not exist yet: a new trajectory needs --base, the model before RL")
    opened, unfinished = _open_all(sources, request, store.steps if store else ())
    base = open_checkpoint(request.base) if request.base else None
    table = store.table if store else base.tensors if base else {}
    label = base.label if base else f"the base of {out}"
    checkpoints = tuple(match(checkpoint, table, label) for checkpoint in opened)
    notes = [f"not step directories, left out: {', '.join(others)}"] if others else []
    notes += unfinished
    if base is not None:
        base = match(base, table, f"the base of {out}")
        refuse_base_among(checkpoints, base)
        if store is not None:
            _require_same_base(store, base, resources, stages)
        if doubt := doubt_of_base(base, (*_only_step(store, request), *checkpoints)):
            notes.append(doubt)
    present = tuple(step for step in sources if store and step in store.steps)
    if store is not None and (again := written_again(store, {step: sources[step] for step in present})):
        notes.append(again)
    if present:
        notes.append(f"already stored, not read again: {describe_steps(present)}")
    block = store.block if store else block_elements(max((t.size for t in lay_out(table, 1 << 62)), default=1))
    read = (*checkpoints, *([base] if base else []))
    largest = max((size for checkpoint in read for size in checkpoint.side_sizes), default=0)
    executor = _executor(table, block, len(checkpoints), largest, resources)
    return Conversion(target, store, base, checkpoints, block, executor, present, tuple(notes))


def _only_step(store: Store | None, request: Request) -> list[Checkpoint]:
    """The one step of a store, if it still stands where it was: a base is doubted by two steps, when the second comes."""
    if store is None or len(store.steps) > 1:
        return []
    step, named = store.steps[0], request.named or {}
    sources, _ = choose(request.root, named, None)
    if step in sources:
        with suppress(CheckpointError):
            return [match(open_step(step, sources[step], request.root, named), store.table, store.shown)]
    return []


def _open_all(
    sources: Mapping[int, Source], request: Request, stored: tuple[int, ...]
) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints that are not stored yet, and notes on those at the end of the run that are still being written.

    Raises IncompleteError for one that was asked for by its number, or that a later one stands behind.
    """
    opened, unfinished, named = [], {}, request.named or {}
    for step, source in sources.items():
        if step in stored:
            continue
        try:
            opened.append(open_step(step, source, request.root, named))
        except IncompleteError as error:
            if step in named or step in (request.selection.named if request.selection else []):
                raise
            unfinished[step] = error
    whole = [*stored, *(checkpoint.step or 0 for checkpoint in opened)]
    for step, problem in unfinished.items():
        if not whole or step < max(whole):
            raise problem
    return opened, [f"step {step} is not complete yet, and left out: {problem}" for step, problem in unfinished.items()]


def _executor(table: Table, block: int, count: int, side: int, resources: Resources) -> Executor:
    """Where the blocks of so many steps are encoded, the largest side file ``side`` bytes: within the memory. Raises
    BudgetError."""
    tensors = [tensor for tensor in lay_out(table, block) if tensor.size]
    kinds = {tensor.kind for tensor in tensors}
    steps = max(count, 1)
    itemsize = max((kind.itemsize for kind in kinds), default=1)
    need = plan.convert_need(block, itemsize, steps, moves_chunk(block, steps))
    resources = replace(resources, held=resident_bytes())  # the headers of all steps are held by now
    return resources.on_cpu(need, shared=3 * min(side, FILE_CHUNK))


def _require_same_base(store: Store, base: Checkpoint, resources: Resources, stages: Stages) -> None:
    """Raise CheckpointError unless the named base is the store's: by its files' names, sizes and times, else by hashes."""
    record = store.base()
    if base.files and (base.source, base.fingerprints) == (record.source, record.fingerprints):
        return
    executor = resources.on_cpu(plan.convert_need(store.block, 4, 1, 0))
    executor.require([*store.files(METADATA), *(file.path for file in base.files)])
    with stages("compare the base", base.nbytes) as advance:
        differing = graph.sums(store, 1, partial(_differs, store, base), executor, advance)
    for name, different in differing.items():
        if different[0]:
            raise CheckpointError(
                f"{base.label}: tensor {name} differs from the base of {store.shown}; leave --base out"
            )


def _differs(store: Store, base: Checkpoint, block: Block) -> np.ndarray:
    return np.array([digest_of(read_block(base, block)) != store.digests("base", block).tobytes()])
