"""What a sweep predicts: the recipes that were asked for, or the one that the backtest recommends."""

from dataclasses import replace

from relexio.engine.resources import Resources
from relexio.errors import RequestError
from relexio.methods import AUTO, Recipe
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.sweep.candidates import Line, Request
from relexio.verbs.advice import take_advice


def find_lines(
    store: Store, request: Request, resources: Resources, stages: Stages
) -> tuple[tuple[Line, ...], str | None]:
    """The recipes of a sweep, and why the recommended one was chosen, if it was. Raises RequestError where none is."""
    if not request.methods:
        raise RequestError("nothing to predict: a sweep needs at least one method")
    lines: list[Line] = []
    why = None
    for method in request.methods:
        if method != AUTO:
            ahead = max(request.window[-1] // 2, 1)
            recipes = [Recipe(method, request.rank, strength) for strength in request.strengths or (1.0,)]
            lines += [Line(recipe, None, ahead) for recipe in recipes]
            continue
        advice = take_advice(store, request.window, resources, stages)
        first = advice.window[0] if advice.window != request.window else None
        ahead, why = max(advice.step - request.window[-1], 1), f"{advice.recipe.label}: {advice.sure}"
        strengths = request.strengths or (advice.recipe.strength,)
        lines += [Line(replace(advice.recipe, strength=strength), first, ahead) for strength in strengths]
    known: dict[tuple[Recipe, int | None], Line] = {}
    for line in lines:
        known.setdefault((line.recipe, line.first), line)  # a named method may be the one that is recommended
    return tuple(known.values()), why
