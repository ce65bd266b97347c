"""The curve of a sweep as text: score against step, a curve for each method and strength, beside what was observed."""

from itertools import groupby

from relexio.sweep.table import Sweep

#: Characters of a line.
WIDTH = 80
_LEAST = 24  # columns of the curve itself, whatever is written to the left of it


def number(value: float) -> str:
    """A score for people: four digits, more before the point if there are more."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}" if abs(value) < 10**9 else f"{value:.3e}"


def curve(sweep: Sweep) -> list[str]:
    """Lines of at most 80 characters: one for each evaluation, its mark the further right the higher the score."""
    scores = [result.score for result in sweep.results if result.score is not None]
    if not scores:
        return []
    groups = [(name, list(some)) for name, some in groupby(sweep.results, lambda result: result.candidate.series)]
    steps = max(4, max(len(str(result.candidate.at)) for result in sweep.results))
    numbers = max(6, max(len(number(score)) for score in scores))
    label = min(max(len(name) for name, _ in groups), WIDTH - steps - numbers - 6 - _LEAST)
    scale = Scale(min(scores), max(scores), WIDTH - label - steps - numbers - 6)
    better = "lower is better" if sweep.lower_is_better else "higher is better"
    left, right = number(scale.low), number(scale.high)
    head = f"{'':<{label}}  {'step':>{steps}}  {'score':>{numbers}}  "
    lines = [head + f"{left}{right:>{scale.width - len(left)}}"]
    last = sweep.last_observed
    mark = None if last is None or last.score is None else scale.column(last.score)
    for name, some in groups:
        for i, result in enumerate(sorted(some, key=lambda result: result.candidate.at)):
            shown = "failed" if result.score is None else number(result.score)
            title = name[:label] if i == 0 else ""
            start = f"{title:<{label}}  {result.candidate.at:>{steps}}  {shown:>{numbers}}  "
            lines.append((start + scale.line(result.score, mark, result is sweep.best)).rstrip())
    line = "" if mark is None else ", | last observed step"
    lines.append(f"o score, * best prediction{line} ({better})")
    return lines


class Scale:
    """Scores to columns, the lowest at the left end."""

    def __init__(self, low: float, high: float, width: int) -> None:
        self.low, self.high, self.width = low, high, width

    def column(self, score: float) -> int:
        """The column of a score."""
        span = self.high / 2 - self.low / 2  # halves: the difference of two floats may be none
        return round((score / 2 - self.low / 2) / span * (self.width - 1)) if span > 0 else self.width // 2

    def line(self, score: float | None, mark: int | None, best: bool) -> str:
        """The dots that lead to the mark of a score, * if it is the ``best``, else o; and another mark at a column."""
        cells = [" "] * self.width
        at = None if score is None else self.column(score)
        if at is not None:
            cells[: at + 1] = "." * at + ("*" if best else "o")
        if mark is not None and mark != at:
            cells[mark] = "|"
        return "".join(cells)
