"""What the backtest recommends, where a recipe or how far to predict is left to it."""

from dataclasses import dataclass

from relexio.engine.resources import Resources
from relexio.errors import RequestError
from relexio.fit.fit import Fit, command, fit
from relexio.methods import Recipe
from relexio.methods.roles import Choice
from relexio.methods.verdict import Verdict, advise
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.verbs.backtest import EVAL, judge


@dataclass(frozen=True)
class Advice:
    """A recipe, the window that it is fitted to, the farthest step at which it has skill, and how sure that is, in words."""

    recipe: Recipe
    window: tuple[int, ...]
    step: int
    sure: str


def take_advice(
    store: Store, window: tuple[int, ...], resources: Resources, stages: Stages, recipe: Recipe | None = None,
    solver: str = "auto", choice: Choice | None = None,
) -> Advice:  # fmt: skip
    """What a backtest of a window recommends: the recipe and how far, or only how far for a given ``recipe``.

    Raises RequestError where it recommends nothing, and BudgetError.
    """
    if len(window) < 2:
        raise RequestError(
            f"{store.shown}: a window of 1 step cannot be fitted; add steps: a backtest needs at least 3"
        )
    if len(window) < 3:
        raise _nothing(store, window, f"A backtest needs at least 3 observed steps; there are {len(window)}")
    if recipe is None:
        judged = judge(store, window, resources, stages)
        if judged.verdict is None or judged.advised is None:
            raise _nothing(store, window, " ".join(judged.sentences()))
        pick = judged.advised
        return Advice(pick.recipe, judged.window_of(pick), judged.verdict.farthest, _sure(judged.verdict))
    return how_far(fit(store, window, recipe, solver, resources, stages, choice))


def how_far(fitted: Fit) -> Advice:
    """How far the backtest of a fit's own recipe recommends to go. Raises RequestError where it recommends nothing."""
    store, window, recipe, test = fitted.store, fitted.steps, fitted.recipe, fitted.backtest
    verdict = None if test is None else advise(test)
    if verdict is not None and verdict.sure != "none":
        return Advice(recipe, window, verdict.farthest, _sure(verdict))
    why = (
        "has no backtest here: it needs 3 steps, tensors that move, a method that goes beyond them, and the gram solver"
    )
    if verdict is not None:
        why = f"is not recommended at any step: its mean skill is {verdict.pick.score:+.2f}"
    same = command("predict", store, *recipe.arguments(), f"--step {_farther(window)}", window=window)
    raise RequestError(
        f"{store.shown}: {recipe.label} {why}. What is recommended: {command('backtest', store, window=window)}. To predict "
        f"all the same: {same}"
    )


def _sure(verdict: Verdict) -> str:
    return f"mean skill {verdict.pick.score:+.2f}, confidence {verdict.sure}"


def _nothing(store: Store, window: tuple[int, ...], why: str) -> RequestError:
    predict = command("predict", store, f"--method relex --step {_farther(window)}", window=window)
    sweep = command("sweep", store, "--methods relex,pinned", EVAL, window=window)
    return RequestError(
        f"{store.shown}: nothing is recommended. {why.rstrip('.')}. To have your own evaluation judge: {sweep}. To predict all "
        f"the same: {predict}"
    )


def _farther(window: tuple[int, ...]) -> int:
    return window[-1] + max(window[-1] // 2, 1)
