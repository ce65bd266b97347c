"""``relexio methods``."""

import json

import click

from relexio.cli import options


@click.command()
@options.as_json
def methods(as_json: bool) -> None:
    """List the methods that predict knows, with their sources.

    With each: what it does, where it is from, and which of the options --rank, --fit, --refit and --last it heeds."""
    from relexio.methods import METHODS

    if as_json:
        facts = [
            {"name": m.name, "what": m.what, "source": m.source, "options": sorted(m.uses)} for m in METHODS.values()
        ]
        click.echo(json.dumps(facts))
        return
    width = max(map(len, METHODS))
    for method in METHODS.values():
        heeds = ", ".join(f"--{name}" for name in ("rank", "fit", "refit", "last") if name in method.uses)
        click.echo(f"{method.name:<{width}}  {method.what}")
        click.echo(f"{'':<{width}}  {method.source}{f'; heeds {heeds}' if heeds else ''}")
