"""``relexio predict``."""

from functools import partial
from pathlib import Path
from shlex import quote

import click
import numpy as np

from relexio.cli import options
from relexio.cli.command import Result, on_trajectory
from relexio.cli.show import note, stages, table
from relexio.engine.resources import Resources
from relexio.fit.fit import Fit, command, name_window
from relexio.fit.grams import SOLVERS
from relexio.methods import AUTO, Recipe
from relexio.methods.roles import Choice
from relexio.store.storage import local
from relexio.store.store import Store
from relexio.verbs import predict as verb
from relexio.verbs.advice import Advice, take_advice
from relexio.verbs.backtest import EVAL
from relexio.verbs.output import Target, check_targets
from relexio.words import describe_steps, show, stem

_NO_VERDICT = "none: a backtest needs 3 steps, tensors that move, a rank below the number of steps, and the gram solver"

_NOT_JUDGED = "not judged: a mix is no step's, so no step can be compared with it; evaluate it"


@on_trajectory(
    click.option(
        "--step",
        "asked",
        type=options.StepOr(AUTO),
        multiple=True,
        default=(AUTO,),
        show_default=True,
        help="Step to predict: auto is the farthest at which the backtest has skill. Repeatable. A mix has none.",
    ),
    click.option(
        "-o",
        "--out",
        help="Directory to write. With several steps it must contain {step}.  [default: named after run, recipe and step]",
    ),
    options.recipe,
    options.tensors,
    click.option(
        "--solver",
        type=click.Choice(SOLVERS),
        default="auto",
        show_default=True,
        help="gram: one pass; its result is kept for later fits. blocks: one pass per iteration, for very many steps.",
    ),
    options.device,
    dry_run=True,
)
def predict(
    store: Store,
    window: tuple[int, ...],
    resources: Resources,
    recipe: Recipe | None,
    choice: Choice,
    asked: tuple[int | str, ...],
    out: str | None,
    solver: str,
    dry_run: bool,
) -> Result:
    """Write the checkpoint that training would reach later.

    Fits the stored steps of TRAJECTORY (once; the fit is kept there) and writes a Hugging Face directory with the
    base's tensors, dtypes and shards, and the configuration and tokenizer of the window's last step.

    Recipe and step are those that relexio backtest recommends. Where it recommends none, nothing is written. The paper's
    own method is --method relex.
    """
    given, named = window, recipe is not None
    if recipe is not None and not recipe.way.aims and asked == (AUTO,):
        asked = ()
    if out is not None:
        options.check_out(asked, out)
    steps = tuple(step for step in asked if isinstance(step, int))
    if recipe is None or AUTO in asked:
        _check_early(store, window, choice, steps, out)
        advice = take_advice(store, window, resources, stages, recipe, solver, choice)
        steps = tuple(step if isinstance(step, int) else advice.step for step in asked)
        note(_chosen(store, advice, recipe is None, AUTO in asked))
        recipe, window = advice.recipe, advice.window
    targets = [Target(step, _out(out, store, recipe, step)) for step in (steps or (None,))]
    job = verb.prepare(store, window, recipe, solver, targets, resources, choice)
    if dry_run:
        return _plan(job)
    fit = verb.run(job, stages, note)
    _warn(fit, steps)
    return Result(partial(_facts, fit, targets), partial(_show, fit, targets), next=_next(fit, targets, given, named))


def _out(out: str | None, store: Store, recipe: Recipe, step: int | None) -> Path:
    """The directory of one prediction."""
    return local(out.replace("{step}", str(step)) if out else f"{stem(store.address)}-{recipe.named(step)}")


def _check_early(
    store: Store, window: tuple[int, ...], choice: Choice, steps: tuple[int, ...], out: str | None
) -> None:
    """Refuse what can be refused before a backtest, which may take long."""
    choice.of(tensor.name for tensor in store.tensors)
    if len(window) > 1:
        Recipe().check(np.array(window), list(steps))
    if out is not None and "{step}" not in out:
        check_targets(store, [Target(None, local(out))])


def _next(fit: Fit, targets: list[Target], window: tuple[int, ...], named: bool) -> tuple[str, ...]:
    """The command that evaluates such predictions beside the checkpoints that were observed."""
    recipe = fit.recipe
    if not recipe.way.extrapolates:
        return tuple(f"python my_eval.py {quote(str(target.out))}" for target in targets)
    options = []
    if named:
        options = [f"--methods {recipe.method}", f"--steps {','.join(target.name for target in targets)}"]
        options += [f"--strengths {recipe.strength:g}"] * (recipe.strength != 1) + [f"--rank {recipe.rank}"] * (
            recipe.rank != 1
        )
    return (command("sweep", fit.store, *options, EVAL, window=window),)


def _chosen(store: Store, advice: Advice, recipe: bool, step: bool) -> str:
    """What was chosen, and why."""
    parts = [f"{advice.recipe.label}, fitted to {name_window(store, advice.window)}"] * recipe
    parts += [f"step {advice.step}, as far as it has skill"] * step
    return f"{'; '.join(parts)}: recommended by the backtest ({advice.sure})"


def _plan(job: verb.PredictJob) -> Result:
    facts = {
        "window": list(job.fit.steps),
        **job.fit.recipe.to_json(),
        "outputs": {target.name: str(target.out) for target in job.targets},
        "fit_kept": job.kept,
        "bytes_read": job.bytes_read,
        "bytes_written": job.bytes_written,
        "bytes_free": job.bytes_free,
        **job.plan.to_json(),
        "device": job.executor.device,
    }
    rows = [
        ("window", describe_steps(job.fit.steps)),
        ("method", job.fit.recipe.label),
        ("to write", ", ".join(str(target.out) for target in job.targets)),
        ("fit", "kept in the store" if job.kept else "to be computed, and kept in the store if it can be written"),
        ("to read", show(job.bytes_read)),
        ("disk", f"{show(job.bytes_written)} needed, {show(job.bytes_free)} free"),
        ("memory", str(job.plan)),
        ("device", job.executor.device),
    ]
    return Result(lambda: facts, lambda: table(rows))


def _facts(fit: Fit, targets: list[Target]) -> object:
    facts = [{**verb.provenance(fit, target.step), "out": str(target.out)} for target in targets]
    return facts[0] if len(facts) == 1 else facts


def _show(fit: Fit, targets: list[Target]) -> None:
    rows, recipe = fit.rows(), fit.recipe
    for target in targets:
        rows.append(("wrote", f"{target.out}: {'a mix' if target.step is None else f'step {target.step}'}"))
        if recipe.way.extrapolates:
            rows.append(("verdict", str(fit.outlook(target.step) or _NO_VERDICT)))
        elif not recipe.way.aims:
            rows.append(("verdict", _NOT_JUDGED))
    table(rows)


def _warn(fit: Fit, steps: tuple[int, ...]) -> None:
    """Print notes on reasons not to trust these predictions."""
    if not fit.recipe.way.extrapolates:
        return
    for text in fit.signs():
        note(f"not one line: {text}")
    outlooks = [outlook for step in steps if (outlook := fit.outlook(step)) is not None]
    beaten = [str(outlook.target) for outlook in outlooks if outlook.skill is not None and outlook.skill <= 0]
    if beaten:
        note(
            f"step {', '.join(beaten)}: inside the window, predictions this far ahead had no skill; relexio backtest says "
            f"which method has; evaluate before you trust {'this one' if len(beaten) == 1 else 'them'}"
        )
    beyond = [str(outlook.target) for outlook in outlooks if outlook.target > outlook.farthest]
    if beyond:
        note(
            f"step {', '.join(beyond)} is beyond step {outlooks[0].farthest}, the last that the backtest covers: evaluate "
            f"nearer steps as well (relexio sweep)"
        )
