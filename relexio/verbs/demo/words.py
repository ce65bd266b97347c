"""What the demo found, as text: a bar for each checkpoint, and what is to be seen in them."""

from relexio.methods import Recipe
from relexio.verbs.demo.run import Measured, Outcome

_WIDTH = 80


def head(outcome: Outcome) -> str:
    """What the bars show, with the largest standard error that a share of so many problems can have, 0.5 / sqrt(n)."""
    error = 50 / outcome.problems**0.5
    return f"Right answers to {outcome.problems:,} held-out problems (standard error: at most {error:.1f} points)"


def bars(outcome: Outcome) -> list[str]:
    """Lines of at most 80 characters: what a checkpoint is, its accuracy, and a bar as long; the best fills the width."""
    groups = ["trained" if one.recipe is None else "predicted" for one in outcome.measured]
    labels = [_label(one, outcome.window[-1]) for one in outcome.measured]
    width, best = max(map(len, labels)), max(one.accuracy for one in outcome.measured)
    lines = []
    for i, (one, group, label) in enumerate(zip(outcome.measured, groups, labels, strict=True)):
        shown = group if groups[i - 1 : i] != [group] else ""
        start = f"{shown:<9}  {label:<{width}}  {100 * one.accuracy:5.1f} %  "
        length = round((_WIDTH - len(start)) * one.accuracy / best) if best else 0
        lines.append((start + "#" * length).rstrip())
    return lines


def sentences(outcome: Outcome) -> list[str]:
    """What is seen: how much of what training gained each prediction gained, how near it came, and which were untested."""
    _, last, *predicted, trained = outcome.measured
    parts = [f"{_label(one)}: {_gain(one, last, trained)}" for one in predicted]
    skills = [
        f"{_label(one).removesuffix(', untested')}: {one.skill:+.2f}" for one in predicted if one.skill is not None
    ]
    untested = dict.fromkeys(str(one.outlook) for one in predicted if one.untested and one.outlook is not None)
    return [
        f"Training from step {last.step} to step {trained.step}: {_gain(trained, last)}; predicted from the steps up to "
        f"{last.step}, without training: {'; '.join(parts)}.",
        f"Skill in weights, now that step {trained.step} is known: {'; '.join(skills)}.",
        *(f"{text[0].upper()}{text[1:]}." for text in untested),
    ]


def _label(one: Measured, last: int | None = None) -> str:
    if one.recipe is None:
        return f"step {one.step}{', last observed' if one.step == last else ''}" if one.step else "base"
    method = one.recipe.method if one.recipe != Recipe() else f"{one.recipe.method} (the paper)"
    if one.untested:
        return f"step {one.step}, {'same recipe' if one.advised else method}, untested"
    return f"step {one.step}, {method}{', recommended' if one.advised else ''}"


def _gain(one: Measured, last: Measured, trained: Measured | None = None) -> str:
    """How much better than the last observed step; of a prediction also its share of what training gained there."""
    gain = one.accuracy - last.accuracy
    text = f"{100 * gain:+.1f} points"
    if trained is None:
        return text
    if one.step != trained.step:
        return f"{text} (step {one.step} as trained does not come with relexio)"
    whole = trained.accuracy - last.accuracy
    return f"{text} ({100 * gain / whole:.0f} % of what training gained)" if min(gain, whole) > 0 else text
