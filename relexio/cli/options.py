"""Options and parameter types that several commands share."""

import re
from collections.abc import Callable
from functools import wraps
from math import isfinite
from typing import Any

import click
from click.core import ParameterSource

from relexio.checkpoints.trainers import parse_pattern
from relexio.engine.device import DEVICES
from relexio.engine.plan import DEFAULT_MEMORY
from relexio.errors import RequestError
from relexio.methods import AUTO, METHODS, OPTIONS, Recipe
from relexio.methods.roles import OTHERS, Choice
from relexio.verbs.convert.delete import Keep, parse_keep
from relexio.words import Selection, parse_duration, parse_size, parse_steps, show

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """A text that a function parses; one that it cannot parse is a usage error."""

    def __init__(self, name: str, parsed: type, parse: Callable[[str], Any]) -> None:
        self.name, self.parsed, self.parse = name, parsed, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of a text; a value, such as a default, stays as it is."""
        try:
            return value if isinstance(value, self.parsed) else self.parse(value)
        except RequestError as error:
            self.fail(str(error), param, ctx)


class StepOr(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """The number of a step, or a word that stands for one."""

    name = "step"

    def __init__(self, word: str) -> None:
        self.word = word

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """A step's number, or the word (not None: click before 8.4 takes it for an option that is missing)."""
        text = str(value)
        if text == self.word:
            return text
        if not (text.isascii() and text.isdigit() and len(text) <= 15):
            self.fail(f"{text!r} is neither a step nor {self.word}", param, ctx)
        return int(text)


SIZE = _Parsed("size", int, parse_size)
STEPS = _Parsed("steps", Selection, parse_steps)
DURATION = _Parsed("duration", float, parse_duration)
PATTERN = _Parsed("pattern", re.Pattern, parse_pattern)
KEEP = _Parsed("keep", Keep, parse_keep)


class FiniteSeconds(click.FloatRange):
    """A number of seconds above 0."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse; wrong text and what is not finite is a usage error."""
        found: float = super().convert(value, param, ctx)
        return found if isfinite(found) else self.fail(f"{found} is not a number of seconds.", param, ctx)


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in their order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


memory = click.option(
    "--memory",
    type=SIZE,
    default=show(DEFAULT_MEMORY).replace(" ", ""),
    show_default=True,
    help="Limit on resident memory, e.g. 512MB or 4GiB.",
)
workers = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Blocks processed at once.  [default: one per core; at most 8 to fit or predict]",
)
scheduler = click.option(
    "--scheduler",
    metavar="WHERE",
    help="Where to run: processes (--workers of them, on this machine), or tcp://HOST:PORT for a Dask cluster.  "
    "[default: threads]",
)
quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
dry_run = click.option("--dry-run", is_flag=True, help="Print the plan and stop; write no output.")
pattern = click.option(
    "--pattern",
    type=PATTERN,
    help="Names of step directories, if no trainer names them so: a regular expression, e.g. 'iter_(\\d+)_hf'.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
window = click.option(
    "--window", type=STEPS, help="Stored steps to fit, e.g. 1:75, 80:, 10:300:10 or 1,2,5.  [default: all]"
)
#: How a command of the user's is run and judged.
judging = together(
    click.option("--metric", metavar="NAME", help="Number to take from a JSON object, e.g. gsm8k.exact_match."),
    click.option(
        "--problems",
        type=click.IntRange(min=1),
        metavar="N",
        help="The score is the share of N problems solved: a drop within its standard error is none.",
    ),
    click.option("--lower-is-better", is_flag=True, help="The score is a loss."),
    click.option(
        "--timeout",
        type=FiniteSeconds(),
        metavar="SECONDS",
        help="Stop an evaluation after this time.",
    ),
)
evaluation = click.option(
    "--eval",
    "command",
    required=True,
    metavar="COMMAND",
    help="Shell command that contains {checkpoint} and prints the score.",
)
device = together(
    click.option(
        "--device",
        type=click.Choice(DEVICES),
        default="auto",
        show_default=True,
        help="Where blocks are computed; auto takes a GPU where that saves time.",
    ),
    click.option("--device-memory", type=SIZE, help="Limit on device memory.  [default: four fifths of what is free]"),
)


def _option(flag: str) -> Decorator:
    """One option of a recipe, as its table says."""
    option = next(option for option in OPTIONS if option.flag == flag)
    kind: Any = click.Choice(option.choices) if option.choices else option.type
    return click.option(
        f"--{flag}",
        option.field,
        type=click.IntRange(min=1) if kind is int else kind,
        default=option.default,
        show_default=option.default is not None,
        help=option.help,
    )


rank = _option("rank")


def recipe(command: Command) -> Command:
    """``--method`` and the options that some methods use; the command gets them as ``recipe``, None for ``auto``."""
    flags = sorted((option.flag for option in OPTIONS), key=lambda flag: flag == "strength")  # which all of them use
    names = ["method", *(option.field for option in OPTIONS)]

    @wraps(command)
    def run(**given: Any) -> Any:
        asked = {name: given.pop(name) for name in names}
        return command(recipe=None if _auto(asked["method"]) else Recipe(**asked), **given)

    method = click.option(
        "--method",
        type=click.Choice([AUTO, *METHODS]),
        metavar="NAME",
        default=AUTO,
        show_default=True,
        help="How to predict: auto is the recipe that relexio backtest recommends; relexio methods lists the others.",
    )
    return together(method, *map(_option, flags))(run)


def is_given(field: str) -> bool:
    """Whether an option is on the command line, be it with its default."""
    return click.get_current_context().get_parameter_source(field) is not ParameterSource.DEFAULT


def _auto(method: str) -> bool:
    """Whether the recipe is left to the backtest. Raises a usage error where a part of it is given all the same."""
    given = [option for option in OPTIONS if is_given(option.field)]
    if method == AUTO and given:
        (name, *others) = given[0].users or ["NAME"]
        name = "NAME" if others else name
        raise click.UsageError(
            f"--{given[0].flag} goes with --method {name}: --method auto takes all from the backtest."
        )
    return method == AUTO


def tensors(command: Command) -> Command:
    """``--include``, ``--exclude`` and ``--others``; the command gets them as ``choice``."""

    @wraps(command)
    def run(include: tuple[str, ...], exclude: tuple[str, ...], others: str, **given: Any) -> Any:
        return command(choice=Choice(include, exclude, others), **given)

    return together(
        click.option(
            "--include",
            multiple=True,
            metavar="GLOB",
            help="Predict only these tensors, e.g. '*.mlp.*'. Repeatable.",
        ),
        click.option("--exclude", multiple=True, metavar="GLOB", help="Do not predict these tensors. Repeatable."),
        click.option(
            "--others",
            type=click.Choice(OTHERS),
            default="last",
            show_default=True,
            help="Values of the other tensors: from the window's last step, or from the base.",
        ),
    )(run)


def check_out(steps: tuple[object, ...], out: str) -> None:
    """Raise a usage error where several steps would be written to one directory, or a mix to one named by a step."""
    if not steps and "{step}" in out:
        raise click.UsageError("A mix has no step: leave {step} out of -o.")
    if len(steps) > 1 and "{step}" not in out:
        raise click.UsageError("Several steps need {step} in -o, as in -o 'pred/step-{step}'.")
