"""The table of a sweep: what was measured, which result is best, and both as JSON and CSV."""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from relexio.bounded import loads
from relexio.errors import EvaluationError, RequestError
from relexio.methods import Recipe
from relexio.sweep.candidates import BASE, Candidate
from relexio.sweep.score import read_error, read_score
from relexio.version import __version__

#: Of results.json.
FORMAT = 2
_COLUMNS = (
    "name", "method", "step", "strength", "first", "score", "error", "gain", "best", "failed", "seconds", "log",
)  # fmt: skip


_T = TypeVar("_T")


@dataclass(frozen=True)
class Evaluation:
    """How one evaluation ended: a score, or ``failed``, the reason why there is none.

    ``line`` is the last line that the command printed, if it ended well; ``tail`` the end of its log, if there is no
    score; ``content`` the hash in the store of a checkpoint that was observed.
    """

    candidate: Candidate
    score: float | None
    failed: str | None
    seconds: float
    line: str | None = None
    tail: str = ""
    content: str | None = None

    @property
    def log(self) -> str:
        """Where the output of its command is, in the directory of the sweep."""
        return f"logs/{self.candidate.name}.log"

    def rescored(self, metric: str | None) -> "Evaluation":
        """The same with the score by another metric: the line that was printed is kept for that."""
        if self.line is None:
            return self
        try:
            return replace(self, score=read_score(self.line, metric), failed=None)
        except EvaluationError as error:
            return replace(self, score=None, failed=str(error))


@dataclass(frozen=True)
class Setting:
    """What all results of one table have in common: data by content hashes, and the command."""

    base: str
    window: tuple[tuple[int, str], ...]
    command: str

    def unlike(self, other: "Setting") -> str | None:
        """How two settings differ, in words; None where their results can stand in one table."""
        if self.command != other.command:
            return f"--eval {other.command!r}"
        if [step for step, _ in self.window] != [step for step, _ in other.window]:
            steps = [step for step, _ in other.window]
            return f"a window of {len(steps)} steps, {steps[0]} to {steps[-1]}"
        return None if self == other else "other checkpoints"


@dataclass(frozen=True)
class Sweep:
    """All results so far, and how they are judged. ``problems``: how many each score is a mean over, if that is known."""

    trajectory: str
    setting: Setting
    metric: str | None = None
    lower_is_better: bool = False
    problems: int | None = None
    results: tuple[Evaluation, ...] = ()

    def judged(self, like: "Sweep") -> "Sweep":
        """The same results by another's metric, direction and number of problems; no evaluation is needed for that."""
        results = self.results if like.metric == self.metric else tuple(r.rescored(like.metric) for r in self.results)
        return replace(like, results=results)

    def added(self, result: Evaluation) -> "Sweep":
        """With one more result, in place of an earlier one of the same candidate."""
        others = [known for known in self.results if known.candidate != result.candidate]
        return replace(self, results=tuple(sorted([*others, result], key=_place)))

    def of(self, candidate: Candidate) -> Evaluation | None:
        """The result of a candidate, if there is one."""
        return next((known for known in self.results if known.candidate == candidate), None)

    def find(self, chosen: Callable[[Evaluation], bool]) -> list[Evaluation]:
        """The results that have a score and are chosen."""
        return [result for result in self.results if result.score is not None and chosen(result)]

    @property
    def last_observed(self) -> Evaluation | None:
        """The result of the window's last step: what predictions are to beat."""
        return self.of(Candidate(self.setting.window[-1][0]))

    @property
    def predicted(self) -> list[Evaluation]:
        """The predictions that have a score."""
        return self.find(lambda result: result.candidate.predicted)

    @property
    def best(self) -> Evaluation | None:
        """The prediction of the best score; of several the one of the nearest step, then the smallest strength."""

        def order(result: Evaluation) -> tuple[float, int, float]:
            score, candidate = result.score or 0.0, result.candidate
            strength = candidate.recipe.strength if candidate.recipe else 0.0
            return score if self.lower_is_better else -score, candidate.at, abs(strength)

        return min(self.predicted, key=order, default=None)

    def error(self, result: Evaluation) -> float | None:
        """The standard error of a score: as the evaluation printed it, or that of a share of right answers."""
        if result.line is not None and (printed := read_error(result.line, self.metric)) is not None:
            return printed
        if self.problems is None or result.score is None or not 0 <= result.score <= 1:
            return None
        return math.sqrt(result.score * (1 - result.score) / self.problems)

    def gain(self, result: Evaluation) -> float | None:
        """By how much it is better than the last observed checkpoint; None where one of the two has no score."""
        last = self.last_observed
        if last is None or last.score is None or result.score is None:
            return None
        gain = last.score - result.score if self.lower_is_better else result.score - last.score
        return float(f"{gain:.12g}") if math.isfinite(gain) else None  # 0.15, and not 0.15000000000000002

    def row(self, result: Evaluation) -> dict[str, Any]:
        """One line of the table."""
        candidate = result.candidate
        values = (
            candidate.name, candidate.method, candidate.at, candidate.recipe.strength if candidate.recipe else None,
            candidate.first, result.score, self.error(result), self.gain(result), result is self.best, result.failed,
            round(result.seconds, 3), result.log,
        )  # fmt: skip
        return dict(zip(_COLUMNS, values, strict=True))

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        best, last = self.best, self.last_observed
        return {
            "format": FORMAT,
            "relexio": __version__,
            "trajectory": self.trajectory,
            "base": self.setting.base,
            "window": [{"step": step, "content": content} for step, content in self.setting.window],
            "eval": self.setting.command,
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "problems": self.problems,
            "last_observed": None if last is None else last.score,
            "best": None if best is None else best.candidate.name,
            "results": [
                {
                    **self.row(result),
                    "recipe": result.candidate.recipe.to_json() if result.candidate.recipe else None,
                    "line": result.line,
                    "tail": result.tail,
                    "content": result.content,
                }
                for result in self.results
            ],
        }

    def to_csv(self) -> str:
        """The table; a missing value is empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for result in self.results:
            row = self.row(result)
            writer.writerow({**row, "best": "true" if row["best"] else "false"})
        return text.getvalue()


def _place(result: Evaluation) -> tuple[bool, bool, str, int]:
    candidate = result.candidate
    return candidate.predicted, candidate.method != BASE, candidate.series, candidate.at


def parse(data: bytes, where: str) -> Sweep:
    """Read what ``to_json`` wrote. Raises RequestError for anything else."""
    try:
        found = loads(data)
        if found["format"] != FORMAT:
            raise _OtherFormatError(
                f"{where}: written by another version of relexio (format {found['format']}); give another -o"
            )
        window = tuple((_a(int, step["step"]), _a(str, step["content"])) for step in found["window"])
        setting = Setting(_a(str, found["base"]), window, _a(str, found["eval"]))
        metric, problems = _maybe(str, found["metric"]), _maybe(int, found["problems"])
        if not window or (problems is not None and problems < 1):
            raise ValueError("no window, or no problems")
        results = tuple(_result(row, [step for step, _ in window]) for row in found["results"])
        lower = _a(bool, found["lower_is_better"])
        return Sweep(_a(str, found["trajectory"]), setting, metric, lower, problems, results)
    except _OtherFormatError as error:
        raise RequestError(str(error)) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"{where}: not a table that a sweep wrote; give another -o, or remove it") from error


class _OtherFormatError(Exception):
    """A table of another version."""


def _result(row: dict[str, Any], window: list[int]) -> Evaluation:
    recipe = None if row["recipe"] is None else Recipe.from_json(row["recipe"])
    step = None if row["method"] == BASE else _a(int, row["step"])
    candidate = Candidate(step, recipe, _maybe(int, row["first"]))
    if recipe is not None:
        _a(str, recipe.method)
        _a(float, recipe.strength)
        recipe.check(np.array([one for one in window if one >= (candidate.first or 0)]), [step])
    score, failed, line = _maybe(float, row["score"]), _maybe(str, row["failed"]), _maybe(str, row["line"])
    if (score is None) is (failed is None):
        raise ValueError("either a score or why there is none")
    seconds, tail, content = _a(float, row["seconds"]), _a(str, row["tail"]), _maybe(str, row["content"])
    return Evaluation(candidate, score, failed, seconds, line, tail, content)


def _a(kind: type[_T], value: Any) -> _T:
    """A value of a type; a float may be whole, and is finite. Raises ValueError for another."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{str(value)[:40]} is no {kind.__name__}")
    return value


def _maybe(kind: type[_T], value: Any) -> _T | None:
    return None if value is None else _a(kind, value)
