"""The demo: checkpoints, trajectory, prediction, and how near it came."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from relexio.engine.resources import Resources
from relexio.errors import ExistsError
from relexio.fit.fit import fit
from relexio.methods import Recipe
from relexio.methods.verdict import Outlook
from relexio.progress import Stages
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.demo.accuracy import accuracy, available
from relexio.verbs.demo.data import TARGET, WINDOW_END, unpack
from relexio.verbs.output import Target
from relexio.verbs.predict import predict
from relexio.words import parse_steps

__all__ = ["TARGET", "WINDOW_END", "Outcome", "free_directory", "run"]


@dataclass(frozen=True)
class Outcome:
    """How near the prediction came to the checkpoint as trained, and the last observed one; accuracies if measured."""

    distance: float
    distance_kept: float
    skill: float
    outlook: Outlook | None
    accuracy: tuple[float, float, float, float] | None


def free_directory(wanted: Path) -> Path:
    """``wanted``, or the same with the first number behind it that is not taken."""
    path, number = wanted, 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def run(directory: Path, stages: Stages, say: Callable[[str], None]) -> Outcome:
    """Do it all in a new directory, and pass on the commands that would do the same. Raises ExistsError if it exists."""
    if directory.exists():
        raise ExistsError(f"{directory}: exists; give another -o or remove it")
    resources = Resources()
    data = unpack(directory)
    store_path, out = directory / "run.zarr", directory / f"predicted-{TARGET}"
    say(f"relexio convert {data.checkpoints} --base {data.base} --steps 1:{WINDOW_END} -o {store_path}")
    request = Request(store_path, data.base, data.checkpoints, {}, parse_steps(f"1:{WINDOW_END}"))
    store = convert(prepare(request, resources, stages), stages).store
    say(f"relexio predict {store_path} --step {TARGET} -o {out}")
    window = store.steps
    fitted = fit(store, window, Recipe(), "auto", resources, stages)
    predict(fitted, [Target(TARGET, out)], resources, stages)
    say(f"relexio convert {data.checkpoints} --steps {TARGET} -o {store_path}")
    request = Request(store_path, None, data.checkpoints, {}, parse_steps(str(TARGET)))
    store = convert(prepare(request, resources, stages), stages).store
    errors = fit(store, window, Recipe(), "auto", resources, stages).errors_at(TARGET)
    measured = None
    if available():
        base, last, predicted, trained = (
            accuracy(path, data.problems) for path in (data.base, data.step(WINDOW_END), out, data.step(TARGET))
        )
        measured = (base, last, predicted, trained)
    return Outcome(
        math.sqrt(errors.predicted), math.sqrt(errors.baseline), errors.skill or 0.0, fitted.outlook(TARGET), measured
    )
