"""What a sweep evaluates, in which order, and by which command."""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from relexio.errors import RequestError

#: What stands for the method of a checkpoint that was not predicted.
BASE, OBSERVED = "base", "observed"
#: Not what a shell would take for a variable, as in ${step}.
_FIELD = re.compile(r"(?<!\$)\{(checkpoint|step)\}")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to be evaluated: a prediction, or (strength None) the base, which is step 0, or an observed step."""

    method: str
    step: int
    strength: float | None = None

    @property
    def predicted(self) -> bool:
        """Whether it is a prediction, and not a reference."""
        return self.strength is not None

    @property
    def name(self) -> str:
        """Its name among files."""
        if self.method == BASE:
            return BASE
        strength = f"-strength-{_number(self.strength)}" if self.strength is not None else ""
        return f"{self.method}-step-{self.step}{strength}"

    @property
    def label(self) -> str:
        """Its name for people."""
        if self.method == BASE:
            return "base"
        strength = f", strength {_number(self.strength)}" if self.strength is not None else ""
        return f"{self.method}, step {self.step}{strength}"

    @property
    def series(self) -> str:
        """Which curve it is a point of."""
        return f"{self.method}, strength {_number(self.strength)}" if self.strength is not None else self.method


def _number(value: float) -> str:
    """All its digits, and no more: two strengths never have one name."""
    return repr(value).removesuffix(".0")


@dataclass(frozen=True)
class Request:
    """A sweep: the window and rank of its fits, what is predicted, and how it is evaluated.

    ``out`` is the directory of its results, ``timeout`` in seconds, ``disk`` in bytes; None is no limit.
    """

    window: tuple[int, ...]
    steps: tuple[int, ...]
    strengths: tuple[float, ...]
    methods: tuple[str, ...]
    command: str
    out: Path
    rank: int = 1
    metric: str | None = None
    lower_is_better: bool = False
    timeout: float | None = None
    disk: int | None = None

    def __post_init__(self) -> None:
        if not any(match[1] == "checkpoint" for match in _FIELD.finditer(self.command)):
            raise RequestError("--eval: must contain {checkpoint}, which stands for the directory to evaluate")

    def candidates(self, stored: Iterable[int]) -> list[Candidate]:
        """All of it: references first (base, last of the window, stored steps among those asked for), then predictions."""
        observed = sorted({self.window[-1], *(step for step in stored if step in self.steps)})
        references = [Candidate(BASE, 0), *(Candidate(OBSERVED, step) for step in observed)]
        return references + [
            Candidate(method, step, strength)
            for method in self.methods
            for strength in self.strengths
            for step in self.steps
        ]

    @property
    def last_observed(self) -> Candidate:
        """The reference that gains are over."""
        return Candidate(OBSERVED, self.window[-1])


def filled(command: str, checkpoint: Path, step: int) -> str:
    """The command with the directory, quoted for the shell, and the step in their places."""
    values = {"checkpoint": shlex.quote(str(checkpoint)), "step": str(step)}
    return _FIELD.sub(lambda match: values[match[1]], command)
