"""From a backtest to what to believe: which recipe, how far, and how sure that is.

Advice is judged as it would have been used: at each cut-off, take what was best on the steps known by then, and see how
it did on those after it. Only skill in weights is judged; only an evaluation tells whether a checkpoint is any good.
"""

from dataclasses import dataclass, replace

import numpy as np

from relexio.methods.backtest import Backtest
from relexio.methods.recipe import Recipe
from relexio.methods.trials import Trial, within

#: What skill in weights does not say; it goes with every piece of advice.
CAVEAT = (
    "skill is a distance between weights, not task accuracy: it can choose between methods; only your own evaluation "
    "can choose how far to go (relexio sweep)"
)
_NEARLY = 1.05  # a target that much farther than any step held out still counts as tested
_TIE = 0.01  # skills that near are equal: the simpler recipe, which comes first, is taken


def caveat() -> str:
    """The caveat as a sentence."""
    return f"{CAVEAT[0].upper()}{CAVEAT[1:]}."


@dataclass(frozen=True)
class Pick:
    """A trial, a strength, and its score: the mean skill over horizons."""

    trial: Trial
    strength: float
    score: float

    @property
    def recipe(self) -> Recipe:
        """The trial's recipe at this strength."""
        return replace(self.trial.recipe, strength=self.strength)


@dataclass(frozen=True)
class PastAdvice:
    """Past advice: what was picked at ``step``, and its ``skill`` on the steps after it."""

    step: int
    pick: Pick
    skill: float


@dataclass(frozen=True)
class Verdict:
    """What to believe: the pick, its skill within each of HORIZONS (NaN: not tested), and where it has skill.

    ``reach``: from and to how many times the last known step skill is above 0 (None: nowhere); ``tested``: as far as
    anything was held out, in the same measure. ``farthest``: the last step that has skill both by its number of times and
    by how many steps it is ahead (an early cut-off sees many times its own step, but few steps). ``still``: the best of
    the averaging methods, where extrapolating does not beat it. ``sure`` is high, moderate, low or none.
    """

    pick: Pick
    skills: np.ndarray
    reach: tuple[float, float] | None
    tested: float
    farthest: int
    history: list[PastAdvice]
    still: Pick | None
    sure: str

    @property
    def right(self) -> int:
        """How much of the past advice was right."""
        return sum(advice.skill > 0 for advice in self.history)


def score(test: Backtest, trial: Trial, strength: float, among: np.ndarray | None = None) -> float:
    """The mean over horizons of the skill within each; NaN where the trial could not be made at all cut-offs."""
    if np.isnan(test.pooled(trial)[slice(None) if among is None else among]).any():
        return np.nan
    skills = test.by_horizon(trial, strength, among)
    return float(np.nanmean(skills)) if not np.isnan(skills).all() else np.nan


def rank_all(test: Backtest, among: np.ndarray | None = None, doubted: bool = False) -> list[Pick]:
    """Every trial at every strength, best first; those that could not be made at all cut-offs are left out.

    Where the base is doubted, so are those that need it.
    """
    picks = [
        Pick(trial, strength, score(test, trial, strength, among))
        for trial in test.trials
        if not (doubted and trial.recipe.way.needs_base)
        for strength in reversed(test.strengths)
    ]
    return sorted((pick for pick in picks if not np.isnan(pick.score)), key=lambda pick: -pick.score)


def best(test: Backtest, ranked: list[Pick]) -> Pick | None:
    """The first in the order of trials among those that are as good as the best."""
    near = [pick for pick in ranked if pick.score >= ranked[0].score - _TIE]
    return min(near, key=lambda pick: (test.order[pick.trial], -pick.strength), default=None)


def follow(test: Backtest, doubted: bool = False) -> list[PastAdvice]:
    """The advice that each cut-off would have given, from the steps known by then, and how it did afterwards."""
    history = []
    for step in np.unique(test.known).tolist():
        past, future = test.held_out <= step, test.known == step
        pick = best(test, rank_all(test, past, doubted)) if past.any() else None
        if pick is not None and not np.isnan(skill := score(test, pick.trial, pick.strength, future)):
            history.append(PastAdvice(step, pick, skill))
    return history


def advise(test: Backtest, doubted: bool = False) -> Verdict | None:
    """The verdict on the best of all trials; None if no trial could be made at every cut-off.

    Where the base is doubted, it is on the best that does not need one, and no better than low.
    """
    ranked = rank_all(test, doubted=doubted)
    pick = best(test, ranked)
    if pick is None:
        return None
    still = next((one for one in ranked if one.trial.recipe.way.stays), None)
    if still is None or still.score < pick.score - _TIE or still.score <= 0:
        still = None
    skills, history = test.by_horizon(pick.trial, pick.strength), follow(test, doubted)
    inside, last, tested = _with_skill(skills, test.horizons), int(test.steps[-1]), float(test.times.max())
    if not inside.any():
        return Verdict(pick, skills, None, tested, last, history, still, "none")
    reach = (float(test.times[inside].min()), float(test.times[inside].max()))
    farthest = min(last + int((test.held_out - test.known)[inside].max()), int(last * reach[1]))
    sure = "none" if still is not None else _sure(pick, history)
    return Verdict(pick, skills, reach, tested, farthest, history, still, "low" if doubted and sure != "none" else sure)


def _with_skill(skills: np.ndarray, horizons: np.ndarray) -> np.ndarray:
    """The columns of the first run of horizons with skill above 0: a mask."""
    run: list[int] = []
    for horizon in np.flatnonzero(~np.isnan(skills)):
        if skills[horizon] > 0:
            run.append(int(horizon))
        elif run:
            break
    return np.isin(horizons, run)


def _sure(pick: Pick, history: list[PastAdvice]) -> str:
    right = sum(advice.skill > 0 for advice in history)
    if not pick.score > 0 or (history and not right):
        return "none"
    if len(history) >= 3 and right == len(history):
        return "high"
    return "moderate" if history and right > len(history) / 2 else "low"


@dataclass(frozen=True)
class Outlook:
    """What the backtest of one recipe says about one target: ``times`` the last known step, and ``ahead`` of it in steps.

    ``skill`` is that within the target's horizon, above 0 at ``won`` of ``cut_offs``; None where nothing that far was held
    out. ``farthest`` is the last step that was tested both by its times and by its steps ahead.
    """

    target: int
    times: float
    ahead: int
    skill: float | None
    won: int
    cut_offs: int
    farthest: int

    def __str__(self) -> str:
        """One line for people."""
        target = f"step {self.target}, {self.times:.1f} times the last known step"
        if self.skill is None:
            return f"{target}, is farther ahead than any held-out step: no test covers it"
        outcome = "beat" if self.skill > 0 else "did not beat"
        untested = "; but none of them was this many steps ahead" if self.target > self.farthest else ""
        return (
            f"{target}: predictions that far ahead {outcome} keeping the last checkpoint (skill {self.skill:+.2f}, above 0 at "
            f"{self.won} of {self.cut_offs} cut-offs{untested})"
        )


def horizon_for(times: float, tested: float, tried: np.ndarray) -> int | None:
    """Which of the tried horizons (ascending) speaks for a target so many times the last known step.

    ``tested``: the most times that anything was held out at. None where the target is clearly farther.
    """
    if times > tested * _NEARLY:
        return None
    return int(tried[min(int(np.searchsorted(tried, within(times))), len(tried) - 1)])


def outlook(test: Backtest, target: int, last: int) -> Outlook:
    """What a backtest of a single trial says about a target beyond the last observed step."""
    trial, strength, times = test.trials[0], test.strengths[0], target / max(last, 1)
    tested = float(test.times.max())
    farthest = min(last + int((test.held_out - test.known).max()), int(last * tested))
    horizon = horizon_for(times, tested, np.unique(test.horizons))
    if horizon is None:
        return Outlook(target, times, target - last, None, 0, 0, farthest)
    among = test.horizons == horizon
    cut_offs = np.unique(test.known[among])
    skills = [test.errors(trial, strength, among & (test.known == step)).skill or 0.0 for step in cut_offs]
    skill, won = test.errors(trial, strength, among).skill or 0.0, sum(skill > 0 for skill in skills)
    return Outlook(target, times, target - last, skill, won, len(cut_offs), farthest)
