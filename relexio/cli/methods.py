"""``relexio methods``."""

import click

from relexio.cli import options
from relexio.cli.command import Result
from relexio.methods import METHODS, OPTIONS, Method


@click.command()
@options.as_json
def methods(as_json: bool) -> None:
    """List the methods that predict knows, with their sources.

    For each: what it does, its source, and which of the options --rank, --fit, --refit, --last and --weights it uses."""
    Result(lambda: [_facts(method) for method in METHODS.values()], _show, next=("relexio backtest run.zarr",)).print(
        as_json
    )


def _facts(method: Method) -> dict[str, object]:
    return {"name": method.name, "what": method.what, "source": method.source, "options": sorted(method.uses)}


def _show() -> None:
    width = max(map(len, METHODS))
    for method in METHODS.values():
        heeds = ", ".join(f"--{option.flag}" for option in OPTIONS if option.flag in method.uses)
        click.echo(f"{method.name:<{width}}  {method.what}")
        click.echo(f"{'':<{width}}  {method.source}{f'; uses {heeds}' if heeds else ''}")
