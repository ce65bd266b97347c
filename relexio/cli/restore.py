"""``relexio restore``."""

import click

from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import not_stored, stages, table
from relexio.engine.resources import Resources
from relexio.store.storage import local
from relexio.store.store import Store
from relexio.verbs.convert.left import recorded_of
from relexio.verbs.restore import restore as verb


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


@on_trajectory(
    click.option("--step", type=_Step(), required=True, metavar="STEP", help="Stored step, or base."),
    click.option("-o", "--out", required=True, type=click.Path(), help="Directory to write."),
    window=False,
)
def restore(store: Store, resources: Resources, step: int | None, out: str) -> Result:
    """Write a stored checkpoint again: the model's files, exactly as they were.

    The same shards with the same bytes, the same index, config, tokenizer and whatever else belongs to the model,
    whether or not the original directory is still there. Each bit is compared with what was committed before -o gets its
    name. What training needs to go on (optimizer, scheduler, random numbers) is not stored.
    """
    verb(store, step, local(out), resources, stages)
    left = recorded_of(store.record(step))
    name = "the base" if step is None else f"step {step}"
    rows = [("wrote", f"{out}: {name}, the model's files as they were"), *not_stored(left)]
    facts = {"step": step, "out": out, "not_stored": [one.to_json() for one in left]}
    return Result(lambda: facts, lambda: table(rows))
