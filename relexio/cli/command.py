"""What the commands share: their resources, the trajectory, and how a result is printed."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from shlex import join
from typing import Any

import click

from relexio.cli import WORDS, options
from relexio.cli.options import Decorator, together
from relexio.cli.show import printable
from relexio.engine.resources import Resources
from relexio.fit.fit import choose_window
from relexio.store.opening import open_store
from relexio.words import without_secrets

_YOURS = "  # my_eval.py is yours: its last line is the score"


@dataclass(frozen=True)
class Result:
    """What a command prints: facts for ``--json``, computed only when needed, or text for people.

    ``errors``: lines for stderr where the work was done but something is wrong. ``next``: commands to run next, for people.
    """

    facts: Callable[[], Any]
    show: Callable[[], None]
    errors: tuple[str, ...] = ()
    next: tuple[str, ...] = ()

    def print(self, as_json: bool) -> int:
        """Print one line of JSON, or the text for people; then the errors. Returns the exit code."""
        if as_json:
            click.echo(json.dumps(self.facts()))
        else:
            self.show()
            if self.next and not self.errors:
                click.echo("\nnext")
                for command in self.next:
                    click.echo(f"  {printable(command)}{_YOURS if 'my_eval.py' in command else ''}")
        for text in self.errors:
            click.echo(f"error: {printable(text)}", err=True)
        return 1 if self.errors else 0


def _in_earnest() -> str:
    """The command as it was typed, without ``--dry-run``."""
    words = click.get_current_context().meta[WORDS]
    return without_secrets(join(["relexio", *(word for word in words if word != "--dry-run")]))


def at_work(
    *own: Decorator,
    scheduler: bool = True,
    dry_run: bool = False,
    read: Callable[[dict[str, Any]], None] = lambda given: None,
) -> Callable[[Callable[..., Result]], click.Command]:
    """Make a command of a function (resources, its own options) -> Result.

    It gets the ``resources`` that it may use; a command without ``--device`` works on the CPU. ``read`` may change
    the options before that.
    """

    def make(function: Callable[..., Result]) -> click.Command:
        @wraps(function)
        def run(
            memory: int,
            workers: int | None,
            as_json: bool,
            scheduler: str | None = None,
            device: str = "cpu",
            device_memory: int | None = None,
            quiet: bool = False,
            **given: Any,
        ) -> int:
            read(given)
            with Resources(memory, workers, device, device_memory, scheduler=scheduler) as resources:
                result = function(resources=resources, **given)
            if given.get("dry_run"):
                result = replace(result, next=(_in_earnest(),))
            return result.print(as_json)

        shared = [options.memory, options.workers, *([options.scheduler] if scheduler else [])]
        shared += [*([options.dry_run] if dry_run else []), options.quiet, options.as_json]
        return click.command()(together(*own, *shared)(run))

    return make


def on_trajectory(
    *own: Decorator, window: bool = True, scheduler: bool = True, dry_run: bool = False
) -> Callable[[Callable[..., Result]], click.Command]:
    """Make a command of a function (store, resources, its own options) -> Result, as ``at_work`` does.

    It gets TRAJECTORY as ``store``, and with ``window`` the chosen steps.
    """

    def read(given: dict[str, Any]) -> None:
        given["store"] = open_store(given.pop("trajectory"))
        if window:
            given["window"] = choose_window(given["store"], given["window"])

    first = [click.argument("trajectory", type=click.Path(readable=False)), *([options.window] if window else [])]
    return at_work(*first, *own, scheduler=scheduler, dry_run=dry_run, read=read)
