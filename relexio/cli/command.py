"""What commands on a trajectory share: the argument, what the work may use, and how a result is printed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from relexio.cli import options
from relexio.cli.options import Command, Decorator, together
from relexio.engine.resources import Resources
from relexio.errors import RelexioError
from relexio.fit.fit import choose_window
from relexio.store.store import open_store


@dataclass(frozen=True)
class Result:
    """What a command has to print: facts for ``--json``, made when they are asked for, or what it shows to people.

    A ``failure`` is raised afterwards; then there are only facts.
    """

    facts: Callable[[], Any]
    show: Callable[[], None]
    failure: RelexioError | None = None

    def print(self, as_json: bool) -> None:
        """One line of JSON, or what people read."""
        if as_json:
            click.echo(json.dumps(self.facts()))
        elif self.failure is None:
            self.show()
        if self.failure is not None:
            raise self.failure


def on_trajectory(*own: Decorator, window: bool = True, scheduler: bool = True) -> Callable[[Command], click.Command]:
    """Make a command of a function (store, resources, its own options) -> Result.

    It gets TRAJECTORY as ``store``, with ``window`` the chosen steps, and what the work may use as ``resources``. A command
    without ``--device`` works on the CPU.
    """

    def make(function: Callable[..., Result]) -> click.Command:
        @wraps(function)
        def run(
            trajectory: str,
            memory: int,
            workers: int | None,
            as_json: bool,
            scheduler: str | None = None,
            device: str = "cpu",
            device_memory: int | None = None,
            **given: Any,
        ) -> None:
            store = open_store(trajectory)
            if window:
                given["window"] = choose_window(store, given["window"])
            with Resources(memory, workers, device, device_memory, scheduler=scheduler) as resources:
                result = function(store, resources=resources, **given)
            result.print(as_json)

        shared = [options.memory, options.workers, *([options.scheduler] if scheduler else []), options.as_json]
        first = [click.argument("trajectory", type=click.Path()), *([options.window] if window else [])]
        return click.command()(together(*first, *own, *shared)(run))

    return make
