"""The demo: checkpoints, trajectory, verdict, predictions, and how many problems each checkpoint solves."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from relexio.engine.resources import Resources
from relexio.errors import ExistsError
from relexio.fit.fit import fit, name_window
from relexio.methods import Recipe
from relexio.methods.verdict import Outlook
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.verbs.backtest import Judgement, judge
from relexio.verbs.convert import Request, convert, prepare
from relexio.verbs.demo.accuracy import accuracy
from relexio.verbs.demo.data import TARGET, WINDOW_END, unpack
from relexio.verbs.demo.data import Run as Data
from relexio.verbs.output import Target
from relexio.verbs.predict import predict
from relexio.words import parse_steps

__all__ = ["TARGET", "WINDOW_END", "Measured", "Outcome", "free_directory", "run"]


@dataclass(frozen=True)
class Measured:
    """A checkpoint of a step (0: the base) and its accuracy. What training reached has no ``recipe``.

    ``advised``: whether the backtest recommends the recipe. ``outlook``: what the backtest of the recipe says of the step,
    if there is one. ``skill``: that of the prediction, where the step was trained too.
    """

    step: int
    accuracy: float
    recipe: Recipe | None = None
    advised: bool = False
    outlook: Outlook | None = None
    skill: float | None = None

    @property
    def untested(self) -> bool:
        """Whether a prediction is farther ahead than any that the backtest could try."""
        return self.recipe is not None and (self.outlook is None or self.step > self.outlook.farthest)


@dataclass(frozen=True)
class Outcome:
    """What the demo found: the trajectory, the window, and the accuracy of each checkpoint on so many ``problems``.

    The first of ``measured`` is the base, the second the last observed step, the last one the target as trained.
    """

    store: Store
    window: tuple[int, ...]
    problems: int
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class _Prediction:
    """A recipe to fit to a window (which ``expression`` names), steps to predict with it, and where to write each."""

    recipe: Recipe
    window: tuple[int, ...]
    expression: str
    steps: tuple[int, ...]
    out: str
    advised: bool

    @property
    def targets(self) -> dict[int, Target]:
        return {step: Target(step, Path(self.out.replace("{step}", str(step)))) for step in self.steps}

    def command(self, store: Store) -> str:
        """The command line that does the same."""
        steps = " ".join(f"--step {step}" for step in self.steps)
        options = f"{' '.join(self.recipe.arguments())} --window {self.expression} {steps}"
        return f"$ relexio predict {quote(store.shown)} {options} -o {quote(self.out)}"


def free_directory(wanted: Path) -> Path:
    """``wanted``, or the same with the first number behind it that is not taken."""
    path, number = wanted, 1
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def run(directory: Path, stages: Stages, say: Callable[[str], None]) -> Outcome:
    """Do it all in a new directory. Each command that does the same, and what is about to take long, is said before.

    Raises ExistsError if the directory exists.
    """
    if directory.exists():
        raise ExistsError(f"{directory}: exists; give another -o or remove it")
    resources, data, path = Resources(), unpack(directory), directory / "run.zarr"
    source, base, out = (quote(str(one)) for one in (data.checkpoints, data.base, path))
    say(f"$ relexio convert {source} --base {base} --steps 1:{WINDOW_END} -o {out}")
    store = _convert(path, data.base, data, f"1:{WINDOW_END}", resources, stages)
    window = store.steps
    say(f"$ relexio backtest {out} --window {window[0]}:{window[-1]}")
    judged = judge(store, window, resources, stages)
    nothing = [] if judged.advised else ["So nothing is recommended; what follows is the paper's recipe alone."]
    for sentence in (*judged.sentences(), *nothing):
        say(sentence)
    predictions = _predictions(judged, directory)
    for prediction in predictions:
        say(prediction.command(store))
        fitted = fit(store, prediction.window, prediction.recipe, "auto", resources, stages)
        predict(fitted, [*prediction.targets.values()], resources, stages)
    say(f"$ relexio convert {source} --steps {TARGET} -o {out}")
    store = _convert(path, None, data, str(TARGET), resources, stages)
    say(f"Accuracy: each checkpoint answers {len(data.problems):,} problems that training has not seen ...")
    return Outcome(store, window, len(data.problems), _measure(store, data, predictions, resources, stages))


def _convert(path: Path, base: Path | None, data: Data, steps: str, resources: Resources, stages: Stages) -> Store:
    return convert(
        prepare(Request(path, base, data.checkpoints, {}, parse_steps(steps)), resources, stages), stages
    ).store


def _predictions(judged: Judgement, directory: Path) -> list[_Prediction]:
    """What the backtest recommends, if anything, as far as it recommends and at the target; and the paper's recipe there."""
    window, predictions, pick, verdict = judged.window, [], judged.advised, judged.verdict
    if pick is not None and verdict is not None:
        known, steps = judged.window_of(pick), tuple(sorted({verdict.farthest, TARGET}))
        expression = name_window(judged.store, known)
        out = str(directory / "recommended-{step}")
        predictions.append(_Prediction(pick.recipe, known, expression, steps, out, True))
    out = str(directory / f"predicted-{TARGET}")
    return [*predictions, _Prediction(Recipe(), window, f"{window[0]}:{window[-1]}", (TARGET,), out, False)]


def _measure(
    store: Store, data: Data, predictions: list[_Prediction], resources: Resources, stages: Stages
) -> tuple[Measured, ...]:
    """The accuracy of base and last observed step, of every prediction, and of the target as trained."""
    solved = partial(accuracy, problems=data.problems)
    found = [Measured(0, solved(data.base)), Measured(WINDOW_END, solved(data.step(WINDOW_END)))]
    for prediction in predictions:
        fitted = fit(store, prediction.window, prediction.recipe, "auto", resources, stages)
        for step, target in prediction.targets.items():
            skill = fitted.skill(step) if step in store.steps else None
            outlook = fitted.outlook(step)
            found.append(Measured(step, solved(target.out), fitted.recipe, prediction.advised, outlook, skill))
    return (*found, Measured(TARGET, solved(data.step(TARGET))))
