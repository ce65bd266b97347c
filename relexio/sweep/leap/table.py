"""The table of a leap: what each round reached, and what the leaps amount to; as JSON and CSV."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from math import isfinite
from typing import Any

from relexio.bounded import loads
from relexio.errors import RequestError
from relexio.version import __version__

#: Of leap.json.
FORMAT = 1
_COLUMNS = (
    "round", "method", "trained", "score", "trained_score", "error", "step", "last", "taken", "leap", "evaluations", "failed",
    "train_seconds", "evaluate_seconds", "seconds", "total_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all rounds of one table have in common: the directory of the base, and how a model is scored."""

    base: str
    eval: str
    metric: str | None
    lower_is_better: bool

    def unlike(self, other: "Setting") -> str | None:
        """How another one differs, in words; None where their rounds can stand in one table."""
        options = zip(("--base", "--eval", "--metric", "--lower-is-better"), fields(self), strict=True)
        differing = (
            (option, getattr(other, field.name))
            for option, field in options
            if getattr(self, field.name) != getattr(other, field.name)
        )
        return next((f"{option} {value!r}" for option, value in differing), None)


@dataclass(frozen=True)
class Round:
    """One round: by which method and command, the score of the last trained step, and of the best prediction, if one has one.

    ``steps`` were trained, and the last of them has the number ``last``; ``step`` is that of the best prediction, ``taken`` if
    training goes on from it. ``error``: the standard error of its score, if known. ``evaluations`` are all that have a score,
    ``failed`` those that have none. Seconds are those of the commands, and of the round in all.
    """

    method: str
    train: str
    steps: int
    last: int
    trained_score: float
    step: int | None
    best_score: float | None
    error: float | None
    taken: bool
    evaluations: int
    failed: int
    train_seconds: float
    evaluate_seconds: float
    seconds: float

    @property
    def score(self) -> float:
        """That of the model with which the round ends."""
        return self.best_score if self.taken and self.best_score is not None else self.trained_score

    @property
    def leap(self) -> float:
        """How many times as far as training the round went."""
        return self.step / self.last if self.taken and self.step is not None else 1.0


@dataclass(frozen=True)
class Leap:
    """All rounds so far. ``base_score`` is that of the base; ``tests`` are those of base and last
    model by the command ``test``."""

    setting: Setting
    base_score: float
    rounds: tuple[Round, ...] = ()
    test: str | None = None
    tests: tuple[float, float] | None = None

    @property
    def trained(self) -> int:
        """Steps that were trained."""
        return sum(one.steps for one in self.rounds)

    @property
    def far(self) -> float:
        """How many times as far as training all rounds went together; 1 before the first."""
        return sum(one.leap * one.steps for one in self.rounds) / self.trained if self.rounds else 1.0

    @property
    def score(self) -> float:
        """That of the last model."""
        return self.rounds[-1].score if self.rounds else self.base_score

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of the table, the base first."""
        nothing = dict.fromkeys(_COLUMNS)
        yield {**nothing, "round": 0, "trained": 0, "score": self.base_score, "total_seconds": 0.0}
        trained = accumulate(one.steps for one in self.rounds)
        seconds = accumulate(one.seconds for one in self.rounds)
        for number, (one, steps, total) in enumerate(zip(self.rounds, trained, seconds, strict=True), 1):
            more = {"round": number, "trained": steps, "score": one.score, "leap": one.leap}
            found = {**asdict(one), **more, "total_seconds": round(total, 3)}
            yield {name: found[name] for name in _COLUMNS}

    def to_csv(self) -> str:
        """The table; a missing value is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "format": FORMAT,
            "relexio": __version__,
            **asdict(self.setting),
            "base_score": self.base_score,
            "trained": self.trained,
            "far": self.far,
            "test": self.test,
            "tests": self.tests,
            "rounds": [{**asdict(one), "score": one.score, "leap": one.leap} for one in self.rounds],
        }


def parse(data: bytes, where: str) -> Leap:
    """Read what ``to_json`` wrote. Raises RequestError for anything else."""
    try:
        found = loads(data)
        if found["format"] != FORMAT:
            raise ValueError("another version")
        setting = Setting(**{field.name: _a(field.type, found[field.name]) for field in fields(Setting)})
        rounds = tuple(
            Round(**{field.name: _a(field.type, row[field.name]) for field in fields(Round)}) for row in found["rounds"]
        )
        tests = None if found["tests"] is None else tuple(_a(float, score) for score in found["tests"])
        if (tests is not None and len(tests) != 2) or not all(map(_is_whole, rounds)):
            raise ValueError("what does not fit together")
        return Leap(setting, _a(float, found["base_score"]), rounds, _a(str | None, found["test"]), tests)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RequestError(
            f"{where}: not a table that a leap wrote; give another -o, or remove all of that directory"
        ) from error


def _is_whole(one: Round) -> bool:
    """Whether the facts of a round fit together."""
    ahead = one.step is not None and one.best_score is not None and one.last < one.step < 10**15
    return one.steps > 0 and one.last > 0 and (ahead or not one.taken)


def _a(kind: Any, value: Any) -> Any:
    """A value of a type, or of one of a union of types. Raises ValueError for another."""
    kinds = (kind,) if isinstance(kind, type) else kind.__args__
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and not isfinite(value)):
        raise ValueError(f"{json.dumps(value)[:40]} is no {kind}")
    return value
