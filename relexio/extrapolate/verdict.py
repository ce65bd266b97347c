"""From a backtest to what to believe: which recipe, how far, and how sure that is. In plain words.

Advice is judged as it would have been used: at each cut-off, take what was best on the steps known by then, and see how
it did on those after it. Weight skill alone is judged; whether a checkpoint is any good only an evaluation tells.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np

from relexio.extrapolate.backtest import Backtest
from relexio.extrapolate.trials import HORIZONS, Trial, within

#: What skill in weights says nothing of; told with every piece of advice.
CAVEAT = (
    "skill is a distance between weights, not task accuracy: it chooses between methods; how far to go, only your own "
    "evaluation can choose (relexio sweep)"
)
_TIE = 0.01  # skills that near are equal: the simpler recipe, which comes first, is taken


@dataclass(frozen=True)
class Pick:
    """A trial (its place among those of the backtest), a strength, and its score: the mean skill over horizons."""

    trial: int
    strength: float
    score: float


@dataclass(frozen=True)
class Followed:
    """What became of the advice of its time: given at ``step``, ``skill`` on the steps after it."""

    step: int
    pick: Pick
    skill: float


@dataclass(frozen=True)
class Verdict:
    """What to believe: the pick, its skill within each of HORIZONS (NaN: not tested), and where it has skill.

    ``reach``: from and to how many times the last known step skill is above 0 (None: nowhere); ``tested``: as far as
    anything was held out, in the same measure. ``sure`` is high, moderate, low or none.
    """

    pick: Pick
    skills: np.ndarray
    reach: tuple[float, float] | None
    tested: float
    followed: list[Followed]
    sure: str


def score(test: Backtest, trial: int, strength: float, among: np.ndarray | None = None) -> float:
    """The mean over horizons of the skill within each; NaN where the trial could not be made at all cut-offs."""
    chosen = slice(None) if among is None else among
    if np.isnan(test.pooled(trial)[chosen]).any():
        return np.nan
    skills = test.by_horizon(trial, strength, among)
    return float(np.nanmean(skills)) if not np.isnan(skills).all() else np.nan


def rank_all(test: Backtest, among: np.ndarray | None = None) -> list[Pick]:
    """Every trial at every strength, best first; those that could not be made at all cut-offs are left out."""
    found = [
        Pick(trial, strength, score(test, trial, strength, among))
        for trial in range(len(test.trials))
        for strength in reversed(test.strengths)
    ]
    return sorted((pick for pick in found if not np.isnan(pick.score)), key=lambda pick: -pick.score)


def best(ranked: list[Pick]) -> Pick | None:
    """The first in the order of trials among those that are as good as the best."""
    near = [pick for pick in ranked if pick.score >= ranked[0].score - _TIE]
    return min(near, key=lambda pick: (pick.trial, -pick.strength), default=None)


def follow(test: Backtest) -> list[Followed]:
    """The advice that each cut-off would have given, from the steps known by then, and how it did afterwards."""
    known, held_out = test.known, test.held_out
    found = []
    for step in sorted(set(known.tolist())):
        past, future = held_out <= step, known == step
        pick = best(rank_all(test, past)) if past.any() else None
        if pick is not None:
            after = score(test, pick.trial, pick.strength, future)
            if not np.isnan(after):
                found.append(Followed(step, pick, after))
    return found


def advise(test: Backtest) -> Verdict | None:
    """The verdict on the best of all trials; None where not one could be made at every cut-off."""
    pick = best(rank_all(test))
    if pick is None:
        return None
    skills = test.by_horizon(pick.trial, pick.strength)
    times = test.held_out / np.maximum(test.known, 1)
    reach, followed = _reach(skills, times, test.horizons), follow(test)
    return Verdict(pick, skills, reach, float(times.max()), followed, _sure(pick, reach, followed))


def _reach(skills: np.ndarray, times: np.ndarray, horizons: np.ndarray) -> tuple[float, float] | None:
    """The first run of horizons with skill above 0: from where to where, in times the last known step."""
    run: list[int] = []
    for place in np.flatnonzero(~np.isnan(skills)):
        if skills[place] > 0:
            run.append(int(place))
        elif run:
            break
    if not run:
        return None
    return float(times[horizons == run[0]].min()), float(times[horizons == run[-1]].max())


def _sure(pick: Pick, reach: tuple[float, float] | None, followed: list[Followed]) -> str:
    if reach is None or not pick.score > 0:
        return "none"
    won = sum(one.skill > 0 for one in followed)
    if len(followed) >= 3 and won == len(followed):
        return "high"
    return "moderate" if followed and won > len(followed) / 2 else "low"


@dataclass(frozen=True)
class Outlook:
    """What the backtest of one recipe says of one target, ``times`` the last known step away.

    ``skill`` is that within the target's horizon, above 0 at ``won`` of ``cut_offs``; None where nothing so far was held out.
    """

    target: int
    times: float
    skill: float | None
    won: int
    cut_offs: int
    tested: float

    def __str__(self) -> str:
        """One line for people."""
        where = f"step {self.target}, {self.times:.1f} times the last one known"
        if self.skill is None:
            return f"{where}, is farther than any step held out ({self.tested:.1f} times): nothing vouches for it"
        said = "beat" if self.skill > 0 else "did not beat"
        return (
            f"{where}: predictions that far {said} keeping the last checkpoint (skill {self.skill:+.2f}, above 0 at "
            f"{self.won} of {self.cut_offs} cut-offs)"
        )


def outlook(test: Backtest, target: int, last: int) -> Outlook:
    """What a backtest of a single trial says of a target beyond the last observed step."""
    strength, times = test.strengths[0], target / max(last, 1)
    reached = test.held_out / np.maximum(test.known, 1)
    among = test.horizons == within(times)
    if (
        not among.any()
        or times > max(reached[among].max(), HORIZONS[within(times) - 1] if within(times) else 1.0) * 1.05
    ):
        return Outlook(target, times, None, 0, 0, float(reached.max()))
    cut_offs = sorted(set(test.known[among].tolist()))
    skills = [test.errors(0, strength, among=among & (test.known == step)).skill or 0.0 for step in cut_offs]
    skill = test.errors(0, strength, among=among).skill
    return Outlook(target, times, skill or 0.0, sum(s > 0 for s in skills), len(cut_offs), float(reached.max()))


def window_words(trial: Trial, steps: np.ndarray) -> tuple[str, str]:
    """A trial's window at the end of ascending steps: in words, and as a ``--window`` expression."""
    count = max(ceil(trial.share * len(steps) - 1e-9), 1)
    if count == len(steps):
        return f"all {count} steps", f"{steps[0]}:{steps[-1]}"
    return f"the last {count} of {len(steps)} steps", f"{steps[-count]}:{steps[-1]}"


def words(test: Backtest, verdict: Verdict) -> list[str]:
    """The verdict in sentences: what to use, how far, how sure, and what it does not mean."""
    trial, last = test.trials[verdict.pick.trial], int(test.steps[-1])
    window, _ = window_words(trial, test.steps)
    if verdict.reach is None or verdict.sure == "none":
        first = f"Nothing tried here beats keeping the last checkpoint; the best is {trial.recipe} with {verdict.pick.score:+.2f}."
        return [f"{first} Train on, or do not extrapolate this run.", _told(CAVEAT)]
    start, end = verdict.reach
    so_far = "as far as was tested" if end >= verdict.tested * 0.999 else "not beyond"
    won = sum(one.skill > 0 for one in verdict.followed)
    return [
        f"Use {trial.recipe}, strength {verdict.pick.strength:g}, fitted to {window}.",
        f"It beats keeping the last checkpoint (mean skill {verdict.pick.score:+.2f}) from {start:.2f} to {end:.1f} times "
        f"the last known step, {so_far}: from step {last} that is up to step {int(last * end)}.",
        f"How sure: {verdict.sure}. Such advice, taken at {len(verdict.followed)} earlier cut-offs, was right at {won}."
        if verdict.followed
        else f"How sure: {verdict.sure}. There are too few steps to try such advice on earlier ones.",
        _told(CAVEAT),
    ]


def _told(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
