"""``relexio restore``."""

import json

import click

from relexio.cli import options
from relexio.cli.show import not_stored, stages, table


class _Step(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    name = "step"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """A step's number, or "base" (not None: click before 8.4 takes it for an option that is missing)."""
        text = str(value)
        if text == "base":
            return text
        if not (text.isascii() and text.isdigit() and len(text) <= 15):
            self.fail(f"{text!r} is neither a step nor base", param, ctx)
        return int(text)


@click.command()
@click.argument("trajectory", type=click.Path())
@click.option("--step", type=_Step(), required=True, metavar="STEP", help="Stored step, or base.")
@click.option("-o", "--out", required=True, type=click.Path(), help="Directory to write.")
@options.memory
@options.workers
@options.scheduler
@options.as_json
def restore(
    trajectory: str,
    step: int | str,
    out: str,
    memory: int,
    workers: int | None,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Write a stored checkpoint again: the model's files, exactly as they were.

    The same shards with the same bytes, the same index, config, tokenizer and whatever else belongs to the model,
    whether or not the original directory is still there. Each bit is compared with what was committed before -o gets its
    name. What training needs to go on (optimizer, scheduler, random numbers) is not stored.
    """
    from relexio.engine.resources import Resources
    from relexio.store.storage import local
    from relexio.store.store import open_store
    from relexio.verbs.convert.left import recorded_of
    from relexio.verbs.restore import restore as verb

    store, number = open_store(trajectory), step if isinstance(step, int) else None
    with Resources(memory, workers, "cpu", scheduler=scheduler) as resources:
        verb(store, number, local(out), resources, stages)
    left = recorded_of(store.record(number))
    if as_json:
        click.echo(json.dumps({"step": number, "out": out, "not_stored": [one.to_json() for one in left]}))
        return
    what = "the base" if number is None else f"step {number}"
    table([("wrote", f"{out}: {what}, the model's files as they were"), *not_stored(left)])
