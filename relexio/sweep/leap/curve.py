"""The curve of a leap as text: a line for each round, from the score that training reached to that of the leap."""

from relexio.sweep.curve import WIDTH, Scale, number
from relexio.sweep.leap.table import Leap


def curve(leap: Leap) -> list[str]:
    """Lines of at most 80 characters; the further right a mark, the higher the score."""
    rows = [(0, leap.base_score, leap.base_score, "")]
    trained = 0
    for one in leap.rounds:
        trained += one.steps
        rows.append((trained, one.trained_score, one.score, f"{one.leap:.3g}x" if one.taken else ""))
    scores = [score for _, first, second, _ in rows for score in (first, second)]
    steps = max(7, len(str(trained)))
    numbers, leaps = max(6, max(len(number(score)) for score in scores)), max(4, max(len(row[3]) for row in rows))
    scale = Scale(min(scores), max(scores), WIDTH - steps - numbers - leaps - 6)
    left, right = number(scale.low), number(scale.high)
    head = f"{'trained':>{steps}}  {'score':>{numbers}}  {'leap':>{leaps}}  "
    lines = [head + f"{left}{right:>{scale.width - len(left)}}"]
    for at, before, score, far in rows:
        mark = scale.column(before) if far else None
        start = f"{at:>{steps}}  {number(score):>{numbers}}  {far:>{leaps}}  "
        lines.append((start + scale.line(score, mark, bool(far))).rstrip())
    better = "lower is better" if leap.setting.lower_is_better else "higher is better"
    return [*lines, f"* taken leap, from | as trained; o as trained ({better})"]
