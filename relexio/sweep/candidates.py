"""What a sweep evaluates, and by which command."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from relexio.errors import RequestError
from relexio.methods import AUTO, Recipe

#: What stands for the method of a checkpoint that was not predicted.
BASE, OBSERVED = "base", "observed"
#: Not what a shell would take for a variable, as in ${step}.
_FIELD = re.compile(r"(?<!\$)\{(checkpoint|step)\}")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to be evaluated: a prediction by a recipe, an observed step (no recipe), or the base (no step either).

    ``first``: where the window of its fit begins, if that is later than the sweep's.
    """

    step: int | None = None
    recipe: Recipe | None = None
    first: int | None = None

    @property
    def predicted(self) -> bool:
        """Whether it is a prediction, and not a reference."""
        return self.recipe is not None

    @property
    def method(self) -> str:
        """The method of a prediction; ``base`` or ``observed``."""
        return self.recipe.method if self.recipe else OBSERVED if self.step is not None else BASE

    @property
    def at(self) -> int:
        """Its step; that of the base is 0."""
        return self.step or 0

    @property
    def name(self) -> str:
        """Its name among files."""
        if self.recipe is None:
            return BASE if self.step is None else f"{OBSERVED}-step-{self.step}"
        return self.recipe.named(self.at) + (f"-from-{self.first}" if self.first is not None else "")

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.method if self.step is None else f"{self.series}, step {self.step}"

    @property
    def series(self) -> str:
        """Which curve it is a point of."""
        if self.recipe is None:
            return self.method
        window = f", from {self.first}" if self.first is not None else ""
        return f"{self.recipe.label}{window}"


@dataclass(frozen=True)
class Line:
    """A recipe, the first step of its window if that is not the sweep's, and how many steps ahead a search begins."""

    recipe: Recipe
    first: int | None = None
    ahead: int = 1

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate is one of its predictions."""
        return (candidate.recipe, candidate.first) == (self.recipe, self.first)


@dataclass(frozen=True)
class Request:
    """A sweep: the window of its fits, what is predicted, and how it is evaluated.

    ``steps``: none are searched for. ``methods``: ``auto`` is the recipe that the backtest recommends. ``strengths``: none
    is that of the recommended recipe, 1 for named methods. ``out`` is the directory of its results, ``timeout`` in seconds,
    ``disk`` in bytes; None is no limit. ``problems``: how many the score is a mean over, for its standard error.
    """

    window: tuple[int, ...]
    command: str
    out: Path
    steps: tuple[int, ...] = ()
    strengths: tuple[float, ...] = ()
    methods: tuple[str, ...] = (AUTO,)
    rank: int = 1
    metric: str | None = None
    lower_is_better: bool = False
    timeout: float | None = None
    disk: int | None = None
    problems: int | None = None

    def __post_init__(self) -> None:
        if not any(match[1] == "checkpoint" for match in _FIELD.finditer(self.command)):
            raise RequestError("--eval: must contain {checkpoint}, which stands for the directory to evaluate")

    def references(self, stored: Iterable[int]) -> list[Candidate]:
        """What predictions are compared with: base, last of the window, stored steps among those asked for."""
        observed = sorted({self.window[-1], *(step for step in stored if step in self.steps)})
        return [Candidate(), *map(Candidate, observed)]


def filled(command: str, checkpoint: Path, step: int) -> str:
    """The command with the directory, quoted for the shell, and the step in their places."""
    values = {"checkpoint": shlex.quote(str(checkpoint)), "step": str(step)}
    return _FIELD.sub(lambda match: values[match[1]], command)
