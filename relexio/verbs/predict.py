"""``predict`` and restore: whole checkpoints streamed out of a trajectory; none has its name before it is whole."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from relexio import atomic
from relexio.checkpoints.files import is_tensors
from relexio.checkpoints.record import StoredCheckpoint
from relexio.checkpoints.side import TEMPLATE, TOKENIZER, template
from relexio.checkpoints.write import CARD, model_card, write_files
from relexio.engine import graph, plan
from relexio.engine.executor import Executor
from relexio.engine.resources import Resources
from relexio.errors import BudgetError
from relexio.fit.fit import Fit, check_carried
from relexio.fit.grams import choose_solver, is_kept
from relexio.methods import Recipe
from relexio.methods.roles import Choice
from relexio.progress import Stages
from relexio.store.storage import place
from relexio.store.store import Store
from relexio.verbs.output import Sink, Target, bytes_of, check_targets, needed_files, output_shards, side_files, staged
from relexio.version import __version__
from relexio.words import describe_steps

#: Side files of a training step that say nothing of the model.
_NOT_CARRIED = {CARD, "trainer_state.json"}
_CONFIG = "config.json"
PROVENANCE = "relexio.json"


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
    shards = output_shards(store, store.base(), loadable=True)
    with staged(targets, shards) as outputs:
        for target, output in zip(targets, outputs, strict=True):
            _write_side_files(fit, target, Path(output.directory))
        executor.require(needed_files(store, outputs, shards))
        with stages("predict", bytes_of(store) * len(targets)) as advance:
            for first in range(0, len(targets), batch):
                sink = Sink(tuple(outputs[first : first + batch]))
                some = {name: w[:, first : first + batch] for name, w in weights.items()}
                graph.combine(store, some, len(sink.outputs), fit.steps, sink, executor, advance)
        executor.settle(Path(output.directory) for output in outputs)


def _most_at_once(store: Store, steps: int, count: int, resources: Resources) -> tuple[Executor, int]:
    """An executor, and how many of ``count`` targets it can make in one pass. Raises BudgetError if not even one."""
    while True:
        try:
            return resources.for_combine(store, steps, count), count
        except BudgetError:
            if count == 1:
                raise
            count = (count + 1) // 2


def _write_side_files(fit: Fit, target: Target, directory: Path) -> None:
    """The last observed step's side files and what only the base has besides, a model card, and where it all came from."""
    store, base = fit.store, fit.store.base()
    last = store.checkpoints(store.find(fit.steps[-1])[0])[fit.steps[-1]]
    side = {n: array for n, array in last.side.items() if n not in _NOT_CARRIED and not is_tensors(n)}
    if _CONFIG in base.side and _tensors(store, last) != _tensors(store, base):
        side[_CONFIG] = base.side[_CONFIG]  # it says whether the head is tied, and so which tensors the files hold
    side |= {name: array for name, array in lacking(store, last).items() if name not in _NOT_CARRIED}
    write_files(directory, side_files(store, replace(base, side=side).beside))
    facts = provenance(fit, target.step)
    public = {**facts, "window": describe_steps(fit.steps), "base": store.base_content}
    method = fit.recipe.way
    did = "extrapolated" if method.extrapolates else "reconstructed"
    made = f"relexio {__version__} {did} them from observed checkpoints of a training run ({method.name}: {method.source})."
    card = model_card(_model_name(base.source), public, made)
    own = [(CARD, card.encode()), (PROVENANCE, (json.dumps(facts, indent=2) + "\n").encode())]
    write_files(directory, own)


def _tensors(store: Store, record: StoredCheckpoint) -> list[str]:
    return sorted(name for shard in output_shards(store, record) for name, _ in shard.places)


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
        **recipe.to_json(),
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
