"""``relexio verify``, and what ``convert --verify`` prints."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from relexio.cli import options
from relexio.cli.show import not_stored, note, printable, stages, table

if TYPE_CHECKING:
    from relexio.verbs.verify import Verified

_SHOWN = 20


@click.command()
@click.argument("trajectory", type=click.Path())
@click.argument("checkpoints", required=False, type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="Compare the base with this model too.")
@options.memory
@options.workers
@options.scheduler
@options.as_json
def verify(
    trajectory: str,
    checkpoints: Path | None,
    base: Path | None,
    memory: int,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Check that a trajectory is whole, to the last bit.

    Reads all of TRAJECTORY: checksums, hashes of every tensor at every step, and structure. With CHECKPOINTS, the
    directory that it was converted from, compares every stored step with its files bit for bit, and lists what is there
    and not in the trajectory. Do that before you delete them.
    """
    from relexio.engine.resources import Resources
    from relexio.store.store import open_store
    from relexio.verbs.verify import find_originals
    from relexio.verbs.verify import verify as check

    store = open_store(trajectory)
    with Resources(memory, workers, "cpu", scheduler=scheduler) as resources:
        found = check(store, find_originals(store, checkpoints, base), resources, stages)
    report(trajectory, found, as_json)


def _compared(found: "Verified") -> str:
    from relexio.words import describe_steps

    base = "the base" if found.base_compared else "not the base (--base names it)"
    return (
        f"{describe_steps(found.compared)}; {base}" if found.compared or found.base_compared else "with no checkpoint"
    )


def _counted(found: "Verified") -> str:
    return f"{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}"


def _whole(found: "Verified") -> str:
    compared = found.compared or found.base_compared
    return f"whole: every hash is right{', and the files compared are the same' if compared else ''}"


def report(trajectory: str, found: "Verified", as_json: bool) -> None:
    """Print what was verified. Ends the program with 1 if anything is wrong."""
    from relexio.words import describe_steps, show, shown

    for text in found.notes:
        note(text)
    if as_json:
        facts = {
            "whole": not found.problems,
            "steps": list(found.steps),
            "compared": list(found.compared),
            "base_compared": found.base_compared,
            "bytes_checked": found.bytes_checked,
            "problems": list(found.problems),
            "not_stored": [one.to_json() for one in found.left],
        }
        click.echo(json.dumps(facts))
    else:
        table(
            [
                ("trajectory", shown(trajectory)),
                ("checked", f"the base and {describe_steps(found.steps)}: {show(found.bytes_checked)} of tensors"),
                ("compared", _compared(found)),
                ("result", _counted(found) if found.problems else _whole(found)),
                *not_stored(found.left),
            ]
        )
    for text in found.problems[:_SHOWN]:
        click.echo(f"error: {printable(text)}", err=True)
    if len(found.problems) > _SHOWN:
        click.echo(f"error: and {len(found.problems) - _SHOWN} more (--json has all)", err=True)
    if found.problems:
        raise click.exceptions.Exit(1)
