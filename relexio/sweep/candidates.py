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
_FIELD = re.compile(r"(?<!\$)\{(\w+)\}")


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
    ``with_base``: the base is evaluated, too.
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
    with_base: bool = True

    def __post_init__(self) -> None:
        require_field("--eval", self.command, "checkpoint", "the directory to evaluate")

    def references(self, stored: Iterable[int]) -> list[Candidate]:
        """What predictions are compared with: base, last of the window, stored steps among those asked for."""
        observed = sorted({self.window[-1], *(step for step in stored if step in self.steps)})
        return [*([Candidate()] if self.with_base else []), *map(Candidate, observed)]


def require_field(option: str, command: str, name: str, what: str) -> None:
    """Raise RequestError where a command does not contain a field."""
    if name not in _FIELD.findall(command):
        raise RequestError(f"{option}: must contain {{{name}}}, which stands for {what}")


def filled(command: str, **values: object) -> str:
    """The command with these values, quoted for the shell, in the places of their names; other braces stay."""
    return _FIELD.sub(lambda found: shlex.quote(str(values[found[1]])) if found[1] in values else found[0], command)
