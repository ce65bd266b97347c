"""From a backtest to what to believe: which recipe, how far, and how sure that is. In plain words.

Advice is judged as it would have been used: at each cut-off, take what was best on the steps known by then, and see how
it did on those after it. Weight skill alone is judged; whether a checkpoint is any good only an evaluation tells.
"""

from dataclasses import dataclass

import numpy as np

from relexio.methods.backtest import Backtest
from relexio.methods.trials import Trial, within

#: What skill in weights says nothing of; told with every piece of advice.
CAVEAT = (
    "skill is a distance between weights, not task accuracy: it chooses between methods; how far to go, only your own "
    "evaluation can choose (relexio sweep)"
)
_NEARLY = 1.05  # a target that much farther than any step held out still counts as tested
_TIE = 0.01  # skills that near are equal: the simpler recipe, which comes first, is taken


def caveat() -> str:
    """The caveat as a sentence."""
    return f"{CAVEAT[0].upper()}{CAVEAT[1:]}."


def horizon_for(times: float, tested: float, tried: np.ndarray) -> int | None:
    """Which of the tried horizons (ascending) speaks for a target so many times the last known step.

    ``tested``: the most times that anything was held out at. None where the target is clearly farther.
    """
    if times > tested * _NEARLY:
        return None
    return int(tried[min(int(np.searchsorted(tried, within(times))), len(tried) - 1)])


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
    anything was held out, in the same measure. ``farthest``: the last step that has skill both by its number of times and
    by how many steps it is ahead (an early cut-off sees many times its own step, but few steps). ``still``: the best of
    the methods that go nowhere, where extrapolating does not beat it. ``sure`` is high, moderate, low or none.
    """

    pick: Pick
    skills: np.ndarray
    reach: tuple[float, float] | None
    tested: float
    farthest: int
    followed: list[Followed]
    still: Pick | None
    sure: str


def score(test: Backtest, trial: int, strength: float, among: np.ndarray | None = None) -> float:
    """The mean over horizons of the skill within each; NaN where the trial could not be made at all cut-offs."""
    chosen = slice(None) if among is None else among
    if np.isnan(test.pooled(trial)[chosen]).any():
        return np.nan
    skills = test.by_horizon(trial, strength, among)
    return float(np.nanmean(skills)) if not np.isnan(skills).all() else np.nan


def rank_all(test: Backtest, among: np.ndarray | None = None, doubted: bool = False) -> list[Pick]:
    """Every trial at every strength, best first; those that could not be made at all cut-offs are left out.

    Where the base is doubted, so are those that need it.
    """
    found = [
        Pick(trial, strength, score(test, trial, strength, among))
        for trial in range(len(test.trials))
        if not (doubted and test.trials[trial].recipe.way.needs_base)
        for strength in reversed(test.strengths)
    ]
    return sorted((pick for pick in found if not np.isnan(pick.score)), key=lambda pick: -pick.score)


def best(ranked: list[Pick]) -> Pick | None:
    """The first in the order of trials among those that are as good as the best."""
    near = [pick for pick in ranked if pick.score >= ranked[0].score - _TIE]
    return min(near, key=lambda pick: (pick.trial, -pick.strength), default=None)


def follow(test: Backtest, doubted: bool = False) -> list[Followed]:
    """The advice that each cut-off would have given, from the steps known by then, and how it did afterwards."""
    known, held_out = test.known, test.held_out
    found = []
    for step in sorted(set(known.tolist())):
        past, future = held_out <= step, known == step
        pick = best(rank_all(test, past, doubted)) if past.any() else None
        if pick is not None:
            after = score(test, pick.trial, pick.strength, future)
            if not np.isnan(after):
                found.append(Followed(step, pick, after))
    return found


def advise(test: Backtest, doubted: bool = False) -> Verdict | None:
    """The verdict on the best of all trials; None where not one could be made at every cut-off.

    Where the base is doubted, it is on the best that does not need one, and no better than low.
    """
    ranked = rank_all(test, doubted=doubted)
    pick = best(ranked)
    if pick is None:
        return None
    still = next((one for one in ranked if test.trials[one.trial].recipe.way.stays), None)
    if still is None or still.score < pick.score - _TIE or still.score <= 0:
        still = None
    skills, followed = test.by_horizon(pick.trial, pick.strength), follow(test, doubted)
    inside, last = _with_skill(skills, test.horizons), int(test.steps[-1])
    if not inside.any():
        return Verdict(pick, skills, None, float(test.times.max()), last, followed, still, "none")
    reach = (float(test.times[inside].min()), float(test.times[inside].max()))
    farthest = min(last + int((test.held_out - test.known)[inside].max()), int(last * reach[1]))
    sure = _sure(pick, followed, still)
    sure = "low" if doubted and sure != "none" else sure
    return Verdict(pick, skills, reach, float(test.times.max()), farthest, followed, still, sure)


def _with_skill(skills: np.ndarray, horizons: np.ndarray) -> np.ndarray:
    """The columns of the first run of horizons with skill above 0: a mask."""
    run: list[int] = []
    for place in np.flatnonzero(~np.isnan(skills)):
        if skills[place] > 0:
            run.append(int(place))
        elif run:
            break
    return np.isin(horizons, run)


def _sure(pick: Pick, followed: list[Followed], still: Pick | None) -> str:
    won = sum(one.skill > 0 for one in followed)
    if not pick.score > 0 or still is not None or (followed and not won):
        return "none"
    if len(followed) >= 3 and won == len(followed):
        return "high"
    return "moderate" if followed and won > len(followed) / 2 else "low"


@dataclass(frozen=True)
class Outlook:
    """What the backtest of one recipe says of one target, ``times`` the last known step and so many steps ``ahead``.

    ``skill`` is that within the target's horizon, above 0 at ``won`` of ``cut_offs``; None where nothing so many times the
    last known step was held out. ``farthest`` is the last step that was tested both by its times and by its steps ahead.
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
        where = f"step {self.target}, {self.times:.1f} times the last one known"
        if self.skill is None:
            return f"{where}, is farther than any step held out: nothing vouches for it"
        said = "beat" if self.skill > 0 else "did not beat"
        return (
            f"{where}: predictions that far {said} keeping the last checkpoint (skill {self.skill:+.2f}, above 0 at "
            f"{self.won} of {self.cut_offs} cut-offs{self._untested()})"
        )

    def _untested(self) -> str:
        return "; but none was so many steps ahead" if self.target > self.farthest else ""


def outlook(test: Backtest, target: int, last: int) -> Outlook:
    """What a backtest of a single trial says of a target beyond the last observed step."""
    strength, times = test.strengths[0], target / max(last, 1)
    tested = float(test.times.max())
    farthest = min(last + int((test.held_out - test.known).max()), int(last * tested))
    horizon = horizon_for(times, tested, np.unique(test.horizons))
    if horizon is None:
        return Outlook(target, times, target - last, None, 0, 0, farthest)
    among = test.horizons == horizon
    cut_offs = sorted(set(test.known[among].tolist()))
    skills = [test.errors(0, strength, among=among & (test.known == step)).skill or 0.0 for step in cut_offs]
    skill = test.errors(0, strength, among=among).skill
    won = sum(s > 0 for s in skills)
    return Outlook(target, times, target - last, skill or 0.0, won, len(cut_offs), farthest)


def window_words(trial: Trial, steps: np.ndarray) -> tuple[str, str]:
    """A trial's window at the end of ascending steps: in words, and as a ``--window`` expression."""
    count = trial.window(len(steps)) or len(steps)
    if count == len(steps):
        return f"all {count} steps", f"{steps[0]}:{steps[-1]}"
    return f"the last {count} of {len(steps)} steps", f"{steps[-count]}:{steps[-1]}"


def words(test: Backtest, verdict: Verdict) -> list[str]:
    """The verdict in sentences: what to use, how far, how sure. The caveat is not among them."""
    trial, pick = test.trials[verdict.pick.trial], verdict.pick
    tries, won = len(verdict.followed), sum(one.skill > 0 for one in verdict.followed)
    followed = f"Such advice, taken at {tries} earlier cut-offs, was right at {won}."
    if not tries:
        followed = "There are too few steps to try such advice on earlier ones."
    if verdict.sure == "none":
        return [_why_not(test, verdict, followed), "Train on: do not extrapolate this run from here."]
    sentences = [
        f"Use {trial.recipe}, strength {pick.strength:g}, fitted to {window_words(trial, test.steps)[0]}.",
        _how_far(test, verdict),
        f"How sure: {verdict.sure}, of weights. {followed}",
    ]
    medians = test.medians(pick.trial, pick.strength)
    if np.nanmean(medians) < 0:
        sentences.insert(2, f"But most tensors end farther off: their median skill is {np.nanmean(medians):+.2f}.")
    return sentences


def _why_not(test: Backtest, verdict: Verdict, followed: str) -> str:
    recipe, pick = test.trials[verdict.pick.trial].recipe, verdict.pick
    if verdict.still is not None:
        still = test.trials[verdict.still.trial].recipe
        return (
            f"Nothing is to be extrapolated here: averaging what was seen ({still}, strength {verdict.still.strength:g}: mean "
            f"skill {verdict.still.score:+.2f}) does as well as any direction ({pick.score:+.2f}). What moves is noise."
        )
    if pick.score > 0 and verdict.reach is not None:
        return f"The best is {recipe}, strength {pick.strength:g}, with a mean skill of {pick.score:+.2f}. {followed}"
    return f"Nothing tried here beats keeping the last checkpoint; the best is {recipe} with {pick.score:+.2f}."


def _how_far(test: Backtest, verdict: Verdict) -> str:
    start, end = verdict.reach or (1.0, 1.0)
    last = int(test.steps[-1])
    span = f"{start:.2f} to {end:.2f}" if end - start >= 0.01 else f"{end:.2f}"
    so_far = "as far as was tested" if end >= verdict.tested * 0.999 else "and not beyond"
    return (
        f"In weights it comes nearer than the last checkpoint (mean skill {verdict.pick.score:+.2f}) at {span} times the last "
        f"known step and up to {verdict.farthest - last} steps ahead, {so_far}: from step {last} that is step "
        f"{verdict.farthest}."
    )
