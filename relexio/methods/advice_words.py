"""A verdict in plain sentences. The caveat that goes with it is ``verdict.caveat()``."""

import numpy as np

from relexio.methods.backtest import Backtest
from relexio.methods.trials import Trial
from relexio.methods.verdict import Verdict


def window_words(trial: Trial, steps: np.ndarray) -> str:
    """A trial's window at the end of ascending steps."""
    count = trial.window(len(steps)) or len(steps)
    return f"all {count} steps" if count == len(steps) else f"the last {count} of {len(steps)} steps"


def words(test: Backtest, verdict: Verdict) -> list[str]:
    """The verdict in sentences: what to use, how far, how sure. The caveat is not among them."""
    pick, tries = verdict.pick, len(verdict.history)
    history = (
        f"Advice chosen the same way at {tries} earlier cut-off{'s' if tries > 1 else ''} was right at {verdict.right}."
    )
    if not tries:
        history = "There are too few steps to test advice at earlier cut-offs."
    if verdict.sure == "none":
        return [_why_not(verdict, history), "Train on instead of extrapolating from here."]
    sentences = [
        f"Use {pick.recipe}, strength {pick.strength:g}, fitted to {window_words(pick.trial, test.steps)}.",
        _how_far(verdict, int(test.steps[-1])),
        f"Confidence (in weights): {verdict.sure}. {history}",
    ]
    median = np.nanmean(test.medians(pick.trial, pick.strength))
    if median < 0:
        sentences.insert(2, f"But most tensors end farther away: their median skill is {median:+.2f}.")
    return sentences


def _why_not(verdict: Verdict, history: str) -> str:
    pick, still = verdict.pick, verdict.still
    if still is not None:
        return (
            f"Do not extrapolate this run: averaging the observed steps ({still.recipe}, strength {still.strength:g}: mean "
            f"skill {still.score:+.2f}) does as well as any direction ({pick.score:+.2f}). What moves is noise."
        )
    if pick.score > 0 and verdict.reach is not None:
        return (
            f"The best is {pick.recipe}, strength {pick.strength:g}, with a mean skill of {pick.score:+.2f}. {history}"
        )
    return f"Nothing tried here beats keeping the last checkpoint; the best is {pick.recipe} with {pick.score:+.2f}."


def _how_far(verdict: Verdict, last: int) -> str:
    start, end = verdict.reach or (1.0, 1.0)
    beyond = "; nothing farther was tested" if end >= verdict.tested * 0.999 else ", but not farther"
    nearer = f" Nearer than {start:.2f} times the last known step it does not." if _first(verdict.skills) <= 0 else ""
    return (
        f"In weights it beats keeping the last checkpoint (mean skill {verdict.pick.score:+.2f}) up to step "
        f"{verdict.farthest}, {verdict.farthest - last} steps ahead{beyond}.{nearer}"
    )


def _first(skills: np.ndarray) -> float:
    """The skill within the nearest horizon that was tested."""
    return float(skills[~np.isnan(skills)][0])
