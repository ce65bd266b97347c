"""One evaluation: the user's command on a checkpoint, and the score in what it printed."""

import signal
from pathlib import Path

from relexio.errors import EvaluationError
from relexio.sweep.candidates import Candidate, Request, filled
from relexio.sweep.command import CommandResult, run
from relexio.sweep.score import read_score
from relexio.sweep.table import Evaluation


def evaluate(
    candidate: Candidate, checkpoint: Path, request: Request, log: Path, content: str | None = None
) -> Evaluation:
    """Run a sweep's command on a checkpoint, its output in ``log``. A failure is a result, and no error."""
    environment = {
        "RELEXIO_STEP": str(candidate.at),
        "RELEXIO_METHOD": candidate.method,
        "RELEXIO_STRENGTH": "" if candidate.recipe is None else repr(candidate.recipe.strength),
    }
    command = filled(request.command, checkpoint=checkpoint, step=candidate.at)
    ended = run(command, environment, log, request.timeout)
    try:
        score = read_score(_line(ended, request.timeout), request.metric)
        if request.problems is not None and not 0 <= score <= 1:
            raise EvaluationError(
                f"{score:g} is no share of {request.problems} problems: print one from 0 to 1, or leave --problems out"
            )
    except EvaluationError as error:
        line = ended.line if ended.code == 0 else None
        return Evaluation(candidate, None, str(error), ended.seconds, line, ended.tail, content)
    return Evaluation(candidate, score, None, ended.seconds, ended.line, content=content)


def how_it_ended(code: int) -> str:
    """An exit code other than 0 in words; that of a signal with its name."""
    number = -code if code < 0 else code - 128
    names = {int(known): known.name for known in signal.Signals}
    return f"exit code {code}" + (f" ({names[number]})" if number in names else "")


def _line(ended: CommandResult, timeout: float | None) -> str:
    """The line that holds the score. Raises EvaluationError for a command that did not end well."""
    if ended.code is None:
        raise EvaluationError(f"no score within {timeout:g} seconds")
    if ended.code:
        raise EvaluationError(how_it_ended(ended.code))
    return ended.line
