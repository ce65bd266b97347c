"""``relexio restore``."""

from shlex import quote

import click

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import not_stored, stages, table
from relexio.engine.resources import Resources
from relexio.store.storage import local
from relexio.store.store import Store
from relexio.verbs.convert.left import not_stored_summary_of
from relexio.verbs.restore import restore as verb


@on_trajectory(
    click.option("--step", type=options.StepOr("base"), required=True, metavar="STEP", help="Stored step, or base."),
    click.option("-o", "--out", required=True, type=click.Path(readable=False), help="Directory to write."),
    window=False,
)
def restore(store: Store, resources: Resources, step: int | str, out: str) -> Result:
    """Write a stored checkpoint again: the model's files, exactly as they were.

    The same shards with the same bytes, the same index, config, tokenizer and whatever else belongs to the model,
    whether or not the original directory still exists. Every bit is compared with what was committed before -o gets its
    name. What training needs to resume (optimizer, scheduler, random numbers) is not stored.
    """
    number = step if isinstance(step, int) else None
    from_base = verb(store, number, local(out), resources, stages)
    record = store.record(number)
    left = not_stored_summary_of(record)
    name = "the base" if number is None else f"step {number}"
    how = record.comes_back(store.table) or "the model's files as they were"
    if from_base:
        how += f", with the base's {', '.join(sorted(from_base))}"
    rows = [("wrote", f"{out}: {name}, {how}"), *not_stored(left)]
    facts = {"step": number, "out": out, "not_stored": [one.to_json() for one in left]}
    return Result(lambda: facts, lambda: table(rows), next=(f"python my_eval.py {quote(out)}",))
