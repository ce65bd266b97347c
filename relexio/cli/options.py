"""Options and parameter types that several commands share."""

from collections.abc import Callable
from typing import Any

import click

from relexio.errors import RequestError
from relexio.words import Selection, parse_size, parse_steps


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """Bytes: ``2GB``, ``512MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse; wrong text is wrong usage."""
        try:
            return value if isinstance(value, int) else parse_size(value)
        except RequestError as error:
            self.fail(str(error), param, ctx)


class Steps(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """Steps: ``1:75``, ``80:``, ``10:300:10``, ``1,2,5``."""

    name = "steps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Selection:
        """Parse; wrong text is wrong usage."""
        try:
            return value if isinstance(value, Selection) else parse_steps(value)
        except RequestError as error:
            self.fail(str(error), param, ctx)


memory = click.option(
    "--memory", type=Size(), default="2GB", show_default=True, help="Resident memory to stay under, e.g. 512MB or 4GiB."
)
workers = click.option(
    "--workers", type=click.IntRange(min=1), help="Blocks worked on at once.  [default: one for each core]"
)
scheduler = click.option(
    "--scheduler",
    metavar="WHERE",
    help="processes: --workers of them, on this machine. tcp://HOST:PORT: a Dask cluster.  [default: threads]",
)
dry_run = click.option("--dry-run", is_flag=True, help="Print the plan and stop: nothing is written.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
window = click.option(
    "--window", type=Steps(), help="Stored steps to fit, e.g. 1:75, 80:, 10:300:10 or 1,2,5.  [default: all]"
)
rank = click.option(
    "--rank", type=click.IntRange(min=1), default=1, show_default=True, help="Directions over time for each tensor."
)


def device(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--device`` and ``--device-memory``."""
    command = click.option(
        "--device-memory", type=Size(), help="Device memory to stay under.  [default: four fifths of what is free]"
    )(command)
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where blocks are computed.",
    )(command)


#: As in METHODS and CURVES of relexio.methods, which take too long to import for a help text (a test compares).
METHODS = (
    "relex", "pinned", "reconstruct", "secant", "two-point", "scaled-last", "scaled-first", "mean", "ema",
)  # fmt: skip
CURVES = ("line", "poly2", "poly3", "sinusoid")


def recipe(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--method``, and what some of the methods heed: ``--rank``, ``--fit``, ``--refit``, ``--last``, ``--strength``."""
    for option in reversed(
        (
            click.option(
                "--method",
                type=click.Choice(METHODS),
                default="relex",
                show_default=True,
                help="How to predict; relexio methods tells what each does.",
            ),
            rank,
            click.option(
                "--fit",
                "curve",
                type=click.Choice(CURVES),
                default="line",
                show_default=True,
                help="Curve through the coefficients.",
            ),
            click.option(
                "--refit",
                type=click.IntRange(min=1),
                help="Steps to read off before the window moves on, fitted again.",
            ),
            click.option(
                "--last", type=click.IntRange(min=1), help="Checkpoints in a mean or ema.  [default: the window]"
            ),
            click.option("--strength", type=float, default=1.0, show_default=True, help="Factor on the update."),
        )
    ):
        command = option(command)
    return command


def tensors(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--include``, ``--exclude`` and ``--others``: which tensors are predicted, and what the others keep."""
    for option in reversed(
        (
            click.option(
                "--include",
                multiple=True,
                metavar="GLOB",
                help="Predict these tensors alone, e.g. '*.mlp.*'. Repeatable.",
            ),
            click.option("--exclude", multiple=True, metavar="GLOB", help="Do not predict these tensors. Repeatable."),
            click.option(
                "--others",
                type=click.Choice(["last", "base"]),
                default="last",
                show_default=True,
                help="What the tensors that are not predicted keep: the window's last step, or the base.",
            ),
        )
    ):
        command = option(command)
    return command


def check_out(steps: tuple[int, ...], out: str) -> None:
    """Wrong usage where several steps would get one name."""
    if len(steps) > 1 and "{step}" not in out:
        raise click.UsageError("Several steps need {step} in -o, as in -o 'pred/step-{step}'.")
