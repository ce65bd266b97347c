"""``predict`` and restore: whole checkpoints streamed out of a trajectory; none has its name before it is whole."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from relexio import atomic, graph, plan
from relexio.checkpoints.files import is_tensors
from relexio.checkpoints.header import header_for_transformers, parse_header
from relexio.checkpoints.read import EMBEDDINGS, HEAD, INDEX
from relexio.checkpoints.side import TEMPLATE, TOKENIZER, template
from relexio.checkpoints.write import (
    CARD,
    Output,
    OutputShard,
    begin,
    model_card,
    validate,
    without_clashes,
    write_files,
)
from relexio.errors import BudgetError, ExistsError, RequestError, StorageError, StoreError
from relexio.executor import Executor
from relexio.extrapolate.methods import METHODS, Recipe
from relexio.extrapolate.parts import Choice
from relexio.fitting import Fit, check_carried
from relexio.grams import choose_solver, is_kept
from relexio.places import METADATA, place
from relexio.progress import Stages
from relexio.resources import Resources
from relexio.trajectory.schema import Block, StoredCheckpoint
from relexio.trajectory.state import check_content, digest_of
from relexio.trajectory.store import Store, describe_steps
from relexio.trajectory.tiles import observed
from relexio.version import __version__

#: Side files of a training step that say nothing of the model.
_NOT_CARRIED = {CARD, "trainer_state.json"}
_CONFIG = "config.json"
PROVENANCE = "relexio.json"


@dataclass(frozen=True)
class Target:
    """One checkpoint to be written: the step and the directory."""

    step: int
    out: Path


@dataclass(frozen=True)
class Sink:
    """Puts a block's results into the checkpoints being written, one for each target."""

    outputs: tuple[Output, ...]

    def __call__(self, block: Block, target: int, bits: np.ndarray) -> None:
        """Write one block of one target at its place."""
        data = memoryview(np.ascontiguousarray(bits)).cast("B")
        self.outputs[target].write(block.tensor.name, block.start * block.kind.itemsize, data)


def check_targets(store: Store, targets: list[Target]) -> None:
    """Raise ExistsError, RequestError or StorageError where the outputs cannot be written: taken, twice, or no room."""
    if len({target.step for target in targets}) != len(targets):
        raise RequestError("a step is given twice")
    if len({target.out.resolve() for target in targets}) != len(targets):
        raise RequestError("two predictions with one name; put {step} into -o, as in -o 'pred/step-{step}'")
    for target in targets:
        if target.out.exists():
            raise ExistsError(f"{target.out}: exists; give another -o")
        parent = atomic.existing_parent(target.out)
        if not os.access(parent, os.W_OK):
            raise StorageError(f"{parent}: no permission to write there; give another -o")
    needed = bytes_of(store) * len(targets)
    free = atomic.free_bytes(targets[0].out)
    if needed > free:
        raise StorageError(
            f"{targets[0].out.parent}: {plan.show(needed)} are needed and {plan.show(free)} free; free space, or give another -o"
        )


def bytes_of(store: Store) -> int:
    """Bytes of the shards of one checkpoint."""
    return sum(shard.size for shard in store.base().shards)


@dataclass(frozen=True)
class Prospect:
    """What a ``predict`` will do: bytes to read and write, whether the fit is kept already, and the memory it takes."""

    kept: bool
    bytes_read: int
    bytes_written: int
    bytes_free: int
    plan: plan.Plan
    device: str


def prospect(
    store: Store,
    window: tuple[int, ...],
    recipe: Recipe,
    solver: str,
    targets: list[Target],
    resources: Resources,
    choice: Choice | None = None,
) -> Prospect:
    """Check a prediction and say what it takes; no tensor is read, nothing is written. Raises as ``predict`` does."""
    recipe.check(np.array(window), [target.step for target in targets])
    check_carried(store, window, choice or Choice())
    check_targets(store, targets)
    chosen, executor = choose_solver(store, window, solver, resources)
    kept = is_kept(store, window, recipe.rank, chosen)
    combine, batch = _most_at_once(store, len(window), len(targets), resources)
    plans = [combine.plan] if kept else [combine.plan, executor.plan]
    passes = -(-len(targets) // batch) + (0 if kept else 1)
    return Prospect(
        kept,
        passes * stored_bytes(store),
        bytes_of(store) * len(targets),
        atomic.free_bytes(targets[0].out),
        max(plans, key=lambda p: p.projected),
        combine.device,
    )


def stored_bytes(store: Store) -> int:
    """Bytes of base and committed steps in the store."""
    where = place(store.address)
    return sum(where.below(top).nbytes() for top in ("base", *(group.path for group in store.groups)))


def predict(fit: Fit, targets: list[Target], resources: Resources, stages: Stages) -> None:
    """Write the predicted checkpoint of every target; as many in one pass over the store as the memory allows.

    Raises RequestError for a target that the recipe cannot reach, ExistsError for an output that is there already.
    """
    store = fit.store
    check_targets(store, targets)
    weights = fit.weights([target.step for target in targets])
    executor, batch = _most_at_once(store, len(fit.steps), len(targets), resources)
    shards = list(_shards(store, store.base(), header_for_transformers))
    with _staged(targets, shards) as outputs:
        for target, output in zip(targets, outputs, strict=True):
            _write_side_files(fit, target, Path(output.directory))
        executor.require(_needed(store, outputs, shards))
        with stages("predict", bytes_of(store) * len(targets)) as advance:
            for first in range(0, len(targets), batch):
                sink = Sink(tuple(outputs[first : first + batch]))
                some = {name: w[:, first : first + batch] for name, w in weights.items()}
                graph.combine(store, some, len(sink.outputs), fit.steps, sink, executor, advance)
        executor.settle(Path(output.directory) for output in outputs)


def _needed(store: Store, outputs: list[Output], shards: list[OutputShard]) -> list[Path]:
    """The files that whoever does the work must see: the store's marker, and the checkpoints begun."""
    begun = [Path(output.directory, shard.name) for output in outputs for shard in shards]
    return [*store.files(METADATA), *begun]


def _most_at_once(store: Store, steps: int, count: int, resources: Resources) -> tuple[Executor, int]:
    """An executor, and how many of ``count`` targets it can make in one pass. Raises BudgetError if not even one."""
    while True:
        try:
            return resources.for_combine(store, steps, count), count
        except BudgetError:
            if count == 1:
                raise
            count = (count + 1) // 2


def restore(store: Store, step: int | None, out: Path, resources: Resources, stages: Stages) -> None:
    """Write an observed step (None: the base) exactly as it was: same shard names, headers, bytes, and side files.

    Raises StoreError where what was put together is not what was committed; then nothing gets the name ``out``.
    """
    targets = [Target(step or 0, out)]
    check_targets(store, targets)
    record = store.record(step)
    shards = list(_shards(store, record, bytes))
    executor = resources.for_combine(store, 1, 1)
    with _staged(targets, shards) as outputs:
        sink = Sink((outputs[0].tied({tensor.name for tensor in store.tensors}),))
        write_files(Path(outputs[0].directory), _files(store, record))
        executor.require(_needed(store, outputs, shards))
        with stages("restore", sum(shard.size for shard in shards)) as advance:
            digests = graph.each(store, 1, partial(_restore_block, store, step, sink), executor, advance)
        executor.settle([Path(outputs[0].directory)])
        check_content(store, step, digests)  # before it gets its name


def _restore_block(store: Store, step: int | None, sink: Sink, block: Block) -> bytes:
    bits = store.base_bits(block) if step is None else observed(store, block, step)
    sink(block, 0, bits)
    return digest_of(bits)


def _shards(store: Store, record: StoredCheckpoint, change: Callable[[bytes], bytes]) -> Iterator[OutputShard]:
    table = {tensor.name: (tensor.dtype, tensor.shape) for tensor in store.tensors}
    tied = {HEAD: next((name for name in EMBEDDINGS if name in table), "")}
    for shard in record.shards:
        if shard.name != Path(shard.name).name or shard.name in ("", ".", ".."):
            raise StoreError(f"{store.shown}: names a shard outside its directory: {shard.name!r}")
        header = store.file(shard.header)
        for entry in parse_header(header, shard.size, f"{store.shown}: {shard.header}"):
            # a tensor longer in the table than in its file would be written over the next one
            if (entry.dtype, entry.shape) != table.get(entry.name if entry.name in table else tied.get(entry.name, "")):
                raise StoreError(f"{store.shown}: {shard.header}: tensor {entry.name} is not as in the table; damaged")
        yield OutputShard(shard.name, change(header), shard.size - 8 - len(header))


@contextmanager
def _staged(targets: list[Target], shards: list[OutputShard]) -> Iterator[list[Output]]:
    """Staging directories with all files at full size; validated and renamed at the end, removed after an error."""
    with ExitStack() as stack:
        outputs, staged = [], []
        for target in targets:
            directory = atomic.staging(target.out)
            stack.enter_context(atomic.storage_errors(target.out))
            directory.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic.locked(directory, make=True))
            stack.enter_context(_removed_after_error(directory))
            if target.out.exists():  # another process has ended since ours looked
                raise ExistsError(f"{target.out} has appeared meanwhile; give another -o")
            atomic.empty_tree(directory)
            outputs.append(begin(directory, shards))
            staged.append(directory)
        yield outputs
        for target, directory in zip(targets, staged, strict=True):
            validate(directory, shards)
            atomic.publish(directory, target.out)


@contextmanager
def _removed_after_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # also Ctrl-C: a half-written prediction is of no use to the next run
        atomic.remove_tree(directory)
        raise


def _files(store: Store, record: StoredCheckpoint) -> Iterator[tuple[str, bytes | Iterator[bytes]]]:
    for name, array in record.side.items():
        yield name, store.pieces(array)
    if record.index is not None:
        yield INDEX, store.file(record.index)


def left_out(store: Store, window: tuple[int, ...]) -> list[str]:
    """Side files that a prediction cannot have: where it writes a file of its own, there can be no directory."""
    return _carried(store, window)[1]


def _carried(store: Store, window: tuple[int, ...]) -> tuple[dict[str, str], list[str]]:
    """The side files of a prediction, by the arrays that hold them, and the names of those that cannot stand there."""
    base = store.base()
    last = store.checkpoints(store.find(window[-1])[0])[window[-1]]
    wanted = {n: array for n, array in last.side.items() if n not in _NOT_CARRIED and not is_tensors(n)}
    if _CONFIG in base.side and _tensors(store, last) != _tensors(store, base):
        wanted[_CONFIG] = base.side[_CONFIG]  # it says whether the head is tied, and so which tensors the files hold
    wanted |= {name: array for name, array in lacking(store, last).items() if name not in _NOT_CARRIED}
    own = [CARD, PROVENANCE, *(shard.name for shard in base.shards), *([] if base.index is None else [INDEX])]
    names = without_clashes(wanted, own)
    gone = [name for name in wanted if name not in names and name != PROVENANCE]
    return {name: wanted[name] for name in names}, gone


def _write_side_files(fit: Fit, target: Target, directory: Path) -> None:
    """The last observed step's side files and what only the base has besides, a model card, and where it all came from."""
    store, base = fit.store, fit.store.base()
    write_files(directory, _files(store, replace(base, side=_carried(store, fit.steps)[0])))
    facts = provenance(fit, target.step)
    public = {**facts, "window": describe_steps(fit.steps), "base": store.base_content}
    method = METHODS[fit.recipe.method]
    did = "extrapolated" if method.extrapolates else "reconstructed"
    made = f"relexio {__version__} {did} them from observed checkpoints of a training run ({method.name}: {method.source})."
    card = model_card(_model_name(base.source), public, made)
    own = [(CARD, card.encode()), (PROVENANCE, (json.dumps(facts, indent=2) + "\n").encode())]
    write_files(directory, own)


def _tensors(store: Store, record: StoredCheckpoint) -> set[str]:
    headers = {shard.header: shard.size for shard in record.shards}
    return {entry.name for header, size in headers.items() for entry in parse_header(store.file(header), size, header)}


def lacking(store: Store, record: StoredCheckpoint) -> dict[str, str]:
    """The arrays of those of the base's side files that a step lacks, by name; none that hold tensors.

    Where the step's tokenizer has its chat template in its configuration, a file with the base's would displace it.
    """
    found = {
        name: array for name, array in store.base().side.items() if name not in record.side and not is_tensors(name)
    }
    own = {name: store.file(record.side[name]) for name in (TOKENIZER,) if TEMPLATE in found and name in record.side}
    if template(own) is not None:
        del found[TEMPLATE]
    return found


def provenance(fit: Fit, step: int) -> dict[str, Any]:
    """All that one needs to make the same prediction again, and what the backtest said of it.

    It is published with the checkpoint: no path of this machine is in it.
    """
    store, recipe, choice = fit.store, fit.recipe, fit.choice
    group, column = store.find(fit.steps[-1])
    expected = fit.outlook(step)
    return {
        "step": step,
        **asdict(recipe),
        "include": list(choice.include),
        "exclude": list(choice.exclude),
        "others": choice.others,
        "window": list(fit.steps),
        "base": {"model": _model_name(store.base().source), "content": store.base_content},
        "last_observed": {"step": fit.steps[-1], "content": group.content[column]},
        "backtest": None if expected is None else {**asdict(expected), "words": str(expected)},
        "relexio": __version__,
    }


def _model_name(source: str) -> str:
    """What is published as the name of the base: its name on the Hub if it lies in the Hub's cache, else its directory's."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", source)
    return f"{cached[1]}/{cached[2]}" if cached else Path(source).name
