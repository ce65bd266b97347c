"""``relexio demo``."""

from pathlib import Path

import click

from relexio.cli.show import stages, table
from relexio.verbs.demo.run import TARGET, WINDOW_END, Outcome, free_directory, run


@click.command()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="A new directory for its files.  [default: relexio-demo]"
)
def demo(out: Path | None) -> None:
    """Try it all on a real, tiny RLVR run that comes with relexio.

    Writes its checkpoints, converts the first 50 steps, predicts step 200, and compares it with the checkpoint that
    training really reached.
    """
    directory = out or free_directory(Path("relexio-demo"))
    outcome = run(directory, stages, lambda line: click.echo(f"$ {line}"))
    click.echo()
    size = f"1.6 M parameters, GRPO on additions; a checkpoint every 5 steps up to {WINDOW_END}, and step {TARGET}"
    weights = (
        f"step {TARGET} as trained is {outcome.distance_kept:.3f} away from step {WINDOW_END}, "
        f"and {outcome.distance:.3f} from the prediction (skill {outcome.skill:+.2f})"
    )
    table(
        [
            ("run", size),
            ("in weights", weights),
            ("verdict", str(outcome.outlook)),
            ("in task", _accuracies(outcome)),
        ]
    )
    click.echo(f"\nEverything is in {directory}; look around, and remove it when you are done. Next:")
    click.echo(f"$ relexio backtest {directory / 'run.zarr'} --window 5:{WINDOW_END}")


def _accuracies(outcome: Outcome) -> str:
    if outcome.accuracy is None:
        return "not measured: this needs torch and transformers (pip install torch transformers)"
    names = ("base", "step 50", "predicted 200", "trained 200")
    return "accuracy " + ", ".join(f"{name} {value:.1%}" for name, value in zip(names, outcome.accuracy, strict=True))
