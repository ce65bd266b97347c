"""The ``relexio`` command, and how errors end it."""

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import click

from relexio.cli import INTERRUPTED, WORDS
from relexio.cli.show import note, printable
from relexio.engine.process import use_one_heap
from relexio.errors import RelexioError, RelexioWarning
from relexio.version import __version__
from relexio.words import without_secrets

#: Every command with the first line of its help (a test compares): the list of commands loads none of them.
_GROUPS = {
    "Run": {
        "convert": "Store a run's checkpoints losslessly, as a small trajectory.",
        "predict": "Write the checkpoint that training would reach later.",
        "sweep": "Evaluate predictions with your own command; keep the best.",
        "leap": "Train, extrapolate, evaluate, and train on from the best, round after round.",
        "demo": "Try it all on a real, tiny RLVR run that comes with relexio.",
    },
    "Judge": {
        "backtest": "Say which method to use on this run, how far ahead, and how sure that is.",
        "inspect": "Show what a trajectory holds, and how each tensor moved.",
        "findings": "See whether the findings of the RELEX paper hold on this run.",
        "reconstruct": "Write what a few directions keep of an observed step.",
        "report": "Write a page that shows how the run moved, and what to believe about its future.",
        "methods": "List the methods that predict knows, with their sources.",
    },
    "Keep": {
        "verify": "Check that a trajectory is whole, to the last bit.",
        "restore": "Write a stored checkpoint again: the model's files, exactly as they were.",
    },
}
_COMMANDS = [name for group in _GROUPS.values() for name in group]


class _Lazy(click.Group):
    """Loads a command's module when the command is used, so that ``relexio --help`` is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return _COMMANDS

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"relexio.cli.{cmd_name}"), cmd_name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            near = get_close_matches(name, _COMMANDS, n=1)
            ctx.fail(f"No such command {name!r}.{''.join(f' Did you mean {other!r}?' for other in near)}")
        ctx.meta[WORDS] = list(args)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group, commands in _GROUPS.items():
            with formatter.section(group):
                formatter.write_dl(list(commands.items()))


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="relexio")
def relexio_command() -> None:
    """Predict later checkpoints of an RLVR run from its first ones.

    convert turns a run's checkpoints into a small lossless store; predict fits the store and writes the checkpoint
    that training would reach, as far as a backtest inside the run advises. Start with: relexio demo
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. Exit codes: 0 done, 1 an error of input or machine, 2 wrong usage, 128 + N ended by signal N."""
    use_one_heap()
    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL + 1
    )  # of writes that Zarr had under way, one error is enough
    try:
        with _warnings_as_notes():
            code = relexio_command(args=arguments, prog_name="relexio", standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.message = without_secrets(error.message)  # type: ignore[misc]  # final, and shown as it is
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as stop:
        click.echo(INTERRUPTED, err=True)
        sys.exit(getattr(stop.__cause__ or stop.__context__ or stop, "code", 130))  # click wraps it
    except BrokenPipeError:
        sys.exit(1)
    except (RelexioError, OSError) as error:
        click.echo(f"error: {printable(_in_words(error))}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print relexio's own warnings as notes, and others as Python does."""
    with warnings.catch_warnings():
        as_python_does = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, RelexioWarning):
                note(str(message))
            else:
                as_python_does(message, category, *where, **more)

        warnings.showwarning = say
        yield


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, RelexioError) and error.filename:
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    return str(error)
