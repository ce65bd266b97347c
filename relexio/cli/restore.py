"""``relexio restore``."""

import json

import click

from relexio.cli import options
from relexio.cli.show import not_stored, stages, table


class _Step(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    name = "step"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """A step's number, None for the base."""
        text = str(value)
        if text == "base":
            return None
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
    step: int | None,
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

    store = open_store(trajectory)
    with Resources(memory, workers, "cpu", scheduler=scheduler) as resources:
        verb(store, step, local(out), resources, stages)
    record = store.record(step)
    left = recorded_of(record)
    if as_json:
        click.echo(json.dumps({"step": step, "out": out, "not_stored": [one.to_json() for one in left]}))
        return
    what = "the base" if step is None else f"step {step}"
    how = "the model's files as they were"
    if not record.from_safetensors:
        how = "as safetensors: it was not stored from safetensors files"
    table([("wrote", f"{out}: {what}, {how}"), *not_stored(left)])
