"""``predict``: checkpoints streamed out of a trajectory; none has its name before it is complete."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relexio import atomic
from relexio.checkpoints.side import carried
from relexio.checkpoints.write import CARD, PROVENANCE, model_card, write_files
from relexio.engine import graph
from relexio.engine.executor import Executor
from relexio.engine.plan import Plan
from relexio.engine.resources import Resources
from relexio.errors import BudgetError
from relexio.fit.fit import Fit, FitPlan, make_fit, plan_fit
from relexio.methods import Recipe
from relexio.methods.roles import Choice
from relexio.progress import Stages
from relexio.store.storage import locate
from relexio.store.store import Store
from relexio.verbs.output import Sink, Target, bytes_of, check_targets, needed_files, output_files, side_files, staged
from relexio.version import __version__
from relexio.words import describe_steps


@dataclass(frozen=True)
class PredictJob:
    """A prediction, checked and planned: what ``--dry-run`` prints and ``run`` does, ``batch`` targets in one pass."""

    fit: FitPlan
    targets: list[Target]
    executor: Executor
    batch: int
    bytes_read: int
    bytes_written: int
    bytes_free: int

    @property
    def kept(self) -> bool:
        """Whether the store has the fit already."""
        return self.fit.grams.kept

    @property
    def plan(self) -> Plan:
        """That of the pass that takes most memory."""
        plans = [executor.plan for executor in (self.executor, self.fit.grams.executor) if executor is not None]
        return max(plans, key=lambda plan: plan.projected)


def prepare(
    store: Store,
    window: tuple[int, ...],
    recipe: Recipe,
    solver: str,
    targets: list[Target],
    resources: Resources,
    choice: Choice | None = None,
) -> PredictJob:
    """Check and plan a prediction; no tensor is read, nothing is written.

    Raises RequestError for a window or a target that the recipe does not fit and for a tensor that cannot be predicted,
    ExistsError for an output that exists, BudgetError and StorageError for too little memory or disk.
    """
    recipe.check(np.array(window), [target.step for target in targets])
    check_targets(store, targets)
    fit = plan_fit(store, window, recipe, solver, resources, choice)
    executor, batch = _most_at_once(store, len(window), len(targets), resources)
    passes = -(-len(targets) // batch) + (0 if fit.grams.kept else 1)
    written, free = bytes_of(store) * len(targets), atomic.free_bytes(targets[0].out)
    return PredictJob(fit, targets, executor, batch, passes * stored_bytes(store), written, free)


def run(job: PredictJob, stages: Stages, note: Callable[[str], None]) -> Fit:
    """Fit, pass on the notes of the fit, and write the predicted checkpoint of every target."""
    fit = make_fit(job.fit, stages)
    for text in fit.notes:
        note(text)
    if names := _beside(fit)[1]:
        note(f"left out of the prediction, which has its own files in their place: {', '.join(names[:6])}")
    _write(fit, job.targets, job.executor, job.batch, stages)
    return fit


def stored_bytes(store: Store) -> int:
    """Bytes of base and committed steps in the store."""
    top = locate(store.address)
    return sum(top.below(name).nbytes() for name in ("base", "files", *(segment.path for segment in store.segments)))


def predict(fit: Fit, targets: list[Target], resources: Resources, stages: Stages) -> None:
    """Write the predicted checkpoint of every target; as many in one pass over the store as the memory allows.

    Raises RequestError for a target that the recipe cannot reach, ExistsError for an output that exists.
    """
    check_targets(fit.store, targets)
    _write(fit, targets, *_most_at_once(fit.store, len(fit.steps), len(targets), resources), stages)


def _write(fit: Fit, targets: list[Target], executor: Executor, batch: int, stages: Stages) -> None:
    store, weights = fit.store, fit.weights_for([target.step for target in targets])
    files = output_files(store, store.base(), loadable=True)
    with staged(targets, files) as outputs:
        for target, output in zip(targets, outputs, strict=True):
            _write_side_files(fit, target, Path(output.directory))
        executor.require(needed_files(store, outputs, files))
        with stages("predict", bytes_of(store) * len(targets)) as advance:
            for first in range(0, len(targets), batch):
                sink = Sink(tuple(outputs[first : first + batch]))
                part = {name: array[:, first : first + batch] for name, array in weights.items()}
                graph.combine(store, part, len(sink.outputs), fit.steps, sink, executor, advance)
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


def _beside(fit: Fit) -> tuple[dict[str, str], list[str]]:
    return carried(fit.store.base(), fit.store.record(fit.steps[-1]), fit.store.table, fit.store.file, fit.store.shown)


def _write_side_files(fit: Fit, target: Target, directory: Path) -> None:
    """The last observed step's side files and what only the base has besides, a model card, and where it all came from."""
    write_files(directory, side_files(fit.store, _beside(fit)[0]))
    facts = provenance(fit, target.step)
    public = {**facts, "window": describe_steps(fit.steps), "base": fit.store.base_content}
    method = fit.recipe.way
    did = "extrapolated" if method.extrapolates else "reconstructed" if method.aims else "mixed"
    origin = f"relexio {__version__} {did} them from observed checkpoints of a training run ({method.name}: {method.source})."
    card = model_card(facts["base"]["model"], public, origin)
    write_files(directory, [(CARD, card.encode()), (PROVENANCE, (json.dumps(facts, indent=2) + "\n").encode())])


def provenance(fit: Fit, step: int | None) -> dict[str, Any]:
    """Everything needed to make the same prediction again, and what the backtest said about it.

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
