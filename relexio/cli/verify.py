"""``relexio verify``, and what ``convert --verify`` prints."""

import re
from dataclasses import asdict
from pathlib import Path

import click

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import not_stored, note, stages, table
from relexio.engine.resources import Resources
from relexio.fit.fit import command
from relexio.store.store import Store
from relexio.verbs.verify import Verification, find_originals
from relexio.verbs.verify import verify as verb
from relexio.words import describe_steps, show

_SHOWN = 20


@on_trajectory(
    click.argument("checkpoints", required=False, type=click.Path(path_type=Path, readable=False)),
    click.option(
        "--base", type=click.Path(path_type=Path, readable=False), help="Compare the base with this model too."
    ),
    options.pattern,
    window=False,
)
def verify(
    store: Store, resources: Resources, checkpoints: Path | None, base: Path | None, pattern: re.Pattern[str] | None
) -> Result:
    """Check that a trajectory is whole, to the last bit.

    Reads all of TRAJECTORY: checksums, hashes of every tensor at every step, and structure. With CHECKPOINTS, the
    directory that it was converted from, it also compares every stored step with its files bit for bit, and lists what
    the trajectory does not hold. Do that before you delete the checkpoints.
    """
    return report(store, verb(store, find_originals(store, checkpoints, base, pattern=pattern), resources, stages))


def report(store: Store, verified: Verification) -> Result:
    """What was verified; its notes are printed at once."""
    for text in verified.notes:
        note(text)
    problems = list(verified.problems)
    facts = {
        "whole": not problems,
        "steps": list(verified.steps),
        "compared": list(verified.compared),
        "base_compared": verified.base_compared,
        "bytes_checked": verified.bytes_checked,
        "problems": problems,
        "not_stored": [one.to_json() for one in verified.left],
        "restored_otherwise": [asdict(one) for one in verified.otherwise],
    }
    rows = [
        ("trajectory", store.shown),
        ("checked", f"the base and {describe_steps(verified.steps)}: {show(verified.bytes_checked)} of tensors"),
        ("compared", _compared(verified)),
        ("result", _verdict(verified)),
        *not_stored((*verified.otherwise, *verified.left)),
    ]
    more = [f"and {len(problems) - _SHOWN} more (--json has all)"] if len(problems) > _SHOWN else []
    return Result(lambda: facts, lambda: table(rows), (*problems[:_SHOWN], *more), (command("backtest", store),))


def _compared(verified: Verification) -> str:
    if not verified.compared and not verified.base_compared:
        return "with no checkpoint"
    if not verified.compared:
        return "the base"
    base = "the base" if verified.base_compared else "not the base (--base names it)"
    return f"{describe_steps(verified.compared)}; {base}"


def _verdict(verified: Verification) -> str:
    if verified.problems:
        return f"{len(verified.problems)} problem{'s' if len(verified.problems) > 1 else ''}"
    same = "the files compared are the same" if verified.compared or verified.base_compared else ""
    if verified.otherwise:
        same = "so is what is stored of the files compared"
    return f"whole: every hash is right{', and ' if same else ''}{same}"
