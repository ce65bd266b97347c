"""What ``relexio convert --dry-run`` prints: what was found, what will be done, and how large the store will be."""

import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.trainers import trainer_of
from relexio.checkpoints.whole import marker_of, weight_stamps
from relexio.cli.command import Result
from relexio.cli.show import table
from relexio.verbs.convert import Conversion
from relexio.verbs.convert.estimate import estimate
from relexio.words import describe_steps, show

_NAMED = "--checkpoint"


def plan(conversion: Conversion, named: Collection[int], pattern: re.Pattern[str] | None) -> Result:
    """The plan of a conversion, of which these steps were ``named`` one by one; ``pattern``: the names of the others."""
    free = conversion.out.free_bytes()
    numbers = {step: _NAMED if step in named else _top(one).name for step, one in conversion.by_step.items()}
    markers = _markers(conversion)
    about = estimate(conversion)
    facts = {
        "out": conversion.out.shown,
        "steps": list(conversion.steps),
        "present": list(conversion.present),
        "replaced": list(conversion.forgotten),
        "from": _written_by(conversion),
        "types": _types(conversion),
        "numbers_from": numbers,
        "markers": markers,
        "bytes_read": conversion.bytes_read,
        "bytes_written_at_most": conversion.bytes_written_at_most,
        "estimate": asdict(about) if about else None,
        "bytes_free": free,
        **conversion.executor.plan.to_json(),
    }
    room = "" if free is None else f", {show(free)} free"
    rows = [
        *(_seen(conversion, numbers, markers, pattern) if conversion.steps else []),
        *replaced(conversion),
        ("to add", added(conversion)),
        ("to read", show(conversion.bytes_read)),
        ("disk", f"{show(conversion.bytes_written_at_most)} at most{room}"),
        *([("to write", str(about))] if about else []),
        ("memory", str(conversion.executor.plan)),
    ]
    return Result(lambda: facts, lambda: table(rows))


def added(conversion: Conversion) -> str:
    """The steps that are added, for people."""
    return describe_steps(conversion.steps) if conversion.steps else "nothing: all steps are stored already"


def replaced(conversion: Conversion) -> list[tuple[str, str]]:
    """A row on the steps that are replaced; none without such."""
    return [("replaced", describe_steps(conversion.forgotten))] if conversion.forgotten else []


def _seen(
    conversion: Conversion, numbers: dict[int, str], markers: dict[str, list[int]], pattern: re.Pattern[str] | None
) -> list[tuple[str, str]]:
    """Rows on who wrote the steps, in which types, what numbers them, and what says that they are whole."""
    trainer = _written_by(conversion)
    writer = f"directories named as by {trainer}" if trainer else "a trainer that the names do not tell"
    return [
        ("from", f"{writer}; {_types(conversion)}"),
        ("numbers", _numbered(numbers, pattern)),
        ("markers", _marked(markers, len(conversion.steps))),
    ]


def _numbered(numbers: dict[int, str], pattern: re.Pattern[str] | None) -> str:
    by_name = {step: name for step, name in numbers.items() if name != _NAMED}
    by_hand = tuple(step for step in numbers if step not in by_name)
    by = f", by --pattern {pattern.pattern}" if pattern else ""
    first = next(iter(by_name), None)
    texts = [f"from the names of directories{by}: {by_name[first]} is step {first}"] if first is not None else []
    return "; ".join([*texts, *([f"{describe_steps(by_hand)} by {_NAMED}"] if by_hand else [])])


def _marked(markers: dict[str, list[int]], count: int) -> str:
    if not markers:
        return "none: --follow takes a step when its files have been the same for some seconds"
    found = (f"{name} for {'all' if len(steps) == count else len(steps)} of {count}" for name, steps in markers.items())
    return f"{', '.join(found)}: --follow takes such a step at once"


def _top(checkpoint: Checkpoint) -> Path:
    """The directory of a step, which may hold that of its model."""
    return checkpoint.directory or Path(checkpoint.source)


def _markers(conversion: Conversion) -> dict[str, list[int]]:
    """The steps that each marker calls whole."""
    found: dict[str, list[int]] = {}
    for step, checkpoint in conversion.by_step.items():
        model = Path(checkpoint.source)
        marker = marker_of(step, _top(checkpoint), model, weight_stamps(model))
        if marker is not None:
            found.setdefault(marker, []).append(step)
    return found


def _written_by(conversion: Conversion) -> str | None:
    """The trainer whose directories these are, as far as their names tell."""
    for checkpoint in conversion.checkpoints:
        return trainer_of(_top(checkpoint).resolve(), Path(checkpoint.source))
    return None


def _types(conversion: Conversion) -> str:
    """The types of the steps' files, and those that they are stored in, where these are others."""
    stored = sorted({dtype for checkpoint in conversion.checkpoints for dtype, _ in checkpoint.tensors.values()})
    cast = sorted({checkpoint.cast for checkpoint in conversion.checkpoints if checkpoint.cast})
    return (
        f"{', '.join(cast)} on disk, stored as {', '.join(stored)}"
        if cast
        else f"{', '.join(stored)} on disk and stored"
    )
