"""The training command of a round: run in a directory of its own, and what it left."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path

from relexio import atomic
from relexio.bounded import loads
from relexio.errors import TrainingError
from relexio.sweep.candidates import filled
from relexio.sweep.command import run
from relexio.sweep.evaluate import how_it_ended
from relexio.sweep.leap.request import Files, Request
from relexio.words import without_secrets


@dataclass(frozen=True)
class Trained:
    """A training command that ended well: what it was asked, from which model, where in its round it wrote, and its seconds."""

    train: str
    steps: int
    model: str
    out: str
    seconds: float


def read(file: Path) -> Trained | None:
    """What a training command has left; None where it did not end well, or its directory has gone."""
    try:
        found = loads(file.read_bytes())
        train, steps, model, out, seconds = (found[field.name] for field in fields(Trained))
        trained = Trained(str(train), int(steps), str(model), str(out), float(seconds))
    except (FileNotFoundError, LookupError, TypeError, ValueError):
        return None
    return trained if isfinite(trained.seconds) and (file.parent / Path(trained.out).name).is_dir() else None


def train(
    request: Request,
    files: Files,
    number: int,
    model: Path,
    begins: Callable[[Path], None],
    note: Callable[[str], None],
) -> Trained:
    """Run the training command, unless it has ended well before, from this model. Raises TrainingError."""
    done, asked = files.trained(number), without_secrets(request.train)
    known = read(done)
    if known is not None and known.model == str(model.resolve()):
        if (known.train, known.steps) != (asked, request.steps):
            note(f"round {number} was trained before, by {known.train}")
        return known
    files.begin(number)
    steps, log = files.steps(number), files.round(number) / "train.log"
    steps.mkdir()
    begins(log)
    command = filled(request.train, base=model, steps=request.steps, out=steps, round=number)
    ended = run(command, {"RELEXIO_ROUND": str(number)}, log, None)
    if ended.code:
        raise TrainingError(
            f"--train fails in round {number}: {how_it_ended(ended.code)}{last_line(ended.tail)} (see {log}); mend the "
            f"command, and run the same again"
        )
    trained = Trained(asked, request.steps, str(model.resolve()), steps.name, round(ended.seconds, 3))
    atomic.sync_tree(steps)
    atomic.write_new(done, json.dumps(asdict(trained)).encode())
    return trained


def last_line(tail: str) -> str:
    """The last line that a failed command has printed, to be added to an error."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return f" ({lines[-1][:120]})" if lines else ""
