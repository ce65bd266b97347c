"""What a leap does: which commands, from which model, how often; and where its files are."""

from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

from relexio import atomic
from relexio.errors import RequestError
from relexio.methods import METHODS
from relexio.sweep import candidates
from relexio.sweep.candidates import require_field
from relexio.sweep.files import Directory

_STEPS = "steps-"


@dataclass(frozen=True)
class Request:
    """A leap: ``rounds`` rounds that train ``steps`` steps each, from ``base``, a model's directory; results go to ``out``.

    ``train`` and ``command`` (the evaluation) are shell commands; ``test`` is one that chooses nothing. The rest is as in a
    sweep: ``timeout`` in seconds is that of an evaluation. Raises RequestError for a command that lacks a field, and for a
    method that a search along a line cannot use.
    """

    base: Path
    train: str
    command: str
    out: Path
    steps: int = 10
    rounds: int = 6
    method: str = "scaled-last"
    test: str | None = None
    metric: str | None = None
    lower_is_better: bool = False
    timeout: float | None = None
    problems: int | None = None

    def __post_init__(self) -> None:
        require_field("--train", self.train, "base", "the model to train on from")
        require_field("--train", self.train, "out", "the directory to write checkpoints to")
        for option, command in (("--eval", self.command), ("--test", self.test)):
            if command is not None:
                require_field(option, command, "checkpoint", "the directory to evaluate")
        lines = [name for name, way in METHODS.items() if way.extrapolates and way.aims and not way.fixed]
        if self.method not in lines:
            raise RequestError(f"--method {self.method}: a leap needs one that goes farther: {', '.join(lines)}")

    def sweep(self, window: tuple[int, ...], out: Path, command: str | None = None) -> candidates.Request:
        """The sweep over what was trained in one round, whose base has a score; ``command`` in the place of the evaluation."""
        return candidates.Request(
            window, command or self.command, out, methods=(self.method,), metric=self.metric,
            lower_is_better=self.lower_is_better, timeout=self.timeout, problems=self.problems, with_base=False,
        )  # fmt: skip


class Files(Directory):
    """Paths in the directory of a leap, and what is done with them."""

    KIND, TABLE = "leap", "leap.json"

    def round(self, number: int) -> Path:
        """What belongs to one round: trajectory, sweep, logs, and for a while the trained steps."""
        return self.top / f"round-{number}"

    def steps(self, number: int) -> Path:
        """A new directory for the training command: another for each try, which one that lives on cannot write to."""
        return self.round(number).absolute() / f"{_STEPS}{token_hex(3)}"

    def trained(self, number: int) -> Path:
        """Says that the training command of a round has ended well, where it wrote, and what it took."""
        return self.round(number) / "trained.json"

    def store(self, number: int) -> Path:
        """The trajectory of a round."""
        return self.round(number) / "run.zarr"

    def sweep(self, number: int) -> Path:
        """The sweep over a round's trajectory."""
        return self.round(number) / "sweep"

    def model(self, number: int) -> Path:
        """The model that a round ends with, and the next one trains on from."""
        return self.round(number).absolute() / "model"

    def tidy(self, done: int) -> None:
        """Remove what no round to come needs: trained steps that are stored, losers, and the models before the last."""
        for number in range(1, done + 1):
            self.drop_steps(number)
            atomic.remove_tree(self.sweep(number) / "best")
            if number < done:
                atomic.remove_tree(self.model(number))

    def drop_steps(self, number: int) -> None:
        """Remove what training commands have written in a round."""
        for path in self.round(number).glob(f"{_STEPS}*"):
            atomic.remove_tree(path)

    def begin(self, number: int) -> None:
        """Remove all that a round has left, and nothing else."""
        self.drop_steps(number)
        self.trained(number).unlink(missing_ok=True)
        for path in (self.store(number), self.sweep(number), self.model(number)):
            atomic.remove_tree(path)
            atomic.remove_tree(atomic.staging(path))
        self.round(number).mkdir(exist_ok=True)
