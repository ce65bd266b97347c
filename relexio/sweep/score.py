"""The score in what an evaluation printed: its last line, a number or JSON."""

import json
import math
import re
from typing import Any

from relexio.errors import EvaluationError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_ERROR = "stderr"
_SOME = 6  # names that an error text lists


def read_score(line: str, metric: str | None) -> float:
    """The score in the last line that an evaluation printed; ``metric`` names one number of a JSON object.

    Names of numbers in nested objects are joined by dots. Raises EvaluationError where there is no finite number, or
    more than one.
    """
    line = line.strip()
    if not line:
        raise EvaluationError("it printed nothing; the last line of its output must be the score")
    if _NUMBER.fullmatch(line) or _NOT_FINITE.fullmatch(line):
        if metric is not None:
            raise EvaluationError(f"--metric {metric}: the last line is a number alone: {_short(line)}")
        return _finite(float(line), line)
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"the last line is neither a number nor JSON: {_short(line)}") from error
    numbers = _numbers(found)
    if metric is None:
        numbers = {name: value for name, value in numbers.items() if not _bare(name).endswith(_ERROR)}
    else:
        if metric not in numbers:
            raise EvaluationError(
                f"--metric {metric}: no number of that name in the last line; it has {_names(numbers)}"
            )
        return _finite(numbers[metric], metric)
    if len(numbers) != 1:
        raise EvaluationError(f"{_names(numbers)} in the last line; choose one with --metric")
    ((name, value),) = numbers.items()
    return _finite(value, name or line)


def read_error(line: str, metric: str | None) -> float | None:
    """The standard error of the score in that line, if it has one: ``NAME_stderr`` for NAME, or ``stderr`` beside it.

    In the harness's names (``exact_match,strict-match``) the filter follows.
    """
    try:
        numbers = _numbers(json.loads(line))
    except (ValueError, RecursionError):
        return None
    scores = [name for name in numbers if not _bare(name).endswith(_ERROR)]
    if metric is None and len(scores) != 1:
        return None
    name = scores[0] if metric is None else metric
    parent, dot, own = name.rpartition(".")
    own, comma, kind = own.partition(",")
    found = [numbers.get(f"{parent}{dot}{other}") for other in (f"{own}_{_ERROR}{comma}{kind}", _ERROR)]
    return next((value for value in found if value is not None and 0 <= value < math.inf), None)


def _bare(name: str) -> str:
    """The last part of a dotted name, without a filter."""
    return name.rpartition(".")[2].partition(",")[0]


def _finite(value: float, text: str) -> float:
    if not math.isfinite(value):
        raise EvaluationError(f"not a finite number: {_short(text)} is {value}")
    return value


def _numbers(value: Any) -> dict[str, float]:
    """Every number in a JSON value by its dotted name; that of the value itself is empty."""
    found: dict[str, float] = {}
    waiting = [("", value)]
    while waiting:
        name, part = waiting.pop()
        if isinstance(part, dict | list):
            entries = part.items() if isinstance(part, dict) else enumerate(part)
            waiting += [(f"{name}.{key}" if name else str(key), inner) for key, inner in entries]
        elif isinstance(part, int | float) and not isinstance(part, bool):
            found[name] = _float(part)
    return found


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _names(numbers: dict[str, float]) -> str:
    if not numbers:
        return "no number at all"
    more = f" and {len(numbers) - _SOME} more" if len(numbers) > _SOME else ""
    return f"{len(numbers)} number{'s' * (len(numbers) > 1)} ({', '.join(sorted(numbers)[:_SOME])}{more})"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
