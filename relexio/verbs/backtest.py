"""``backtest``: every method, window, rank and strength, compared with steps that were really trained; and a verdict."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from shlex import quote
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from relexio.engine import plan
from relexio.engine.resources import Resources
from relexio.errors import BudgetError
from relexio.fit.fit import command, doubt_of_base, name_window
from relexio.fit.grams import find_grams
from relexio.methods import METHODS
from relexio.methods.advice_words import words
from relexio.methods.backtest import Backtest, backtest, bytes_of
from relexio.methods.line_tests import Straightness, straightness
from relexio.methods.roles import PARTS, globs_of, part_of
from relexio.methods.trials import HORIZONS, STRENGTHS, horizon_name, make_folds, make_trials
from relexio.methods.verdict import CAVEAT, Pick, Verdict, advise, caveat, rank_all
from relexio.progress import Stages
from relexio.store.store import Store
from relexio.words import describe_steps, html_table, show

#: What an evaluation looks like in a command to run next.
EVAL = "--eval 'python my_eval.py {checkpoint}'"


@dataclass(frozen=True, repr=False)
class Judgement:
    """The judgement on a trajectory: the backtest, its verdict (None where no recipe fits), and how straight the run is.

    ``doubt`` says why the base does not look like the model that training began from.
    """

    store: Store
    window: tuple[int, ...]
    test: Backtest
    verdict: Verdict | None
    straight: Straightness | None
    doubt: str | None = None

    def __repr__(self) -> str:
        advice = "nothing is recommended"
        if self.verdict and (pick := self.advised):
            advice = f"{pick.recipe}, strength {pick.strength:g}, confidence {self.verdict.sure}"
        return f"<Judgement of {self.store.shown}, {describe_steps(self.window)}: {advice}>"

    def _repr_html_(self) -> str:
        rows = [("verdict", " ".join(self.words())), *(("next", command) for command in self.commands())]
        return html_table([*self.rows(), *rows])

    def rows(self) -> list[tuple[str, str]]:
        """What was tried on what, and how straight the run is, for people."""
        test, straight = self.test, self.straight
        known = ", ".join(map(str, np.unique(test.known)))
        rows = [
            ("trajectory", self.store.shown),
            ("window", describe_steps(self.window)),
            ("cut-offs", f"steps {known}; {len(test.held_out)} predictions of later steps for each recipe"),
        ]
        if straight is not None:
            half = "-" if straight.split_half is None else f"{straight.split_half:.2f}"
            walk = f"a random walk over the same steps gives {straight.walk_energy:.2f}"
            rows += [
                ("energy", f"{straight.energy:.2f} at rank 1; {walk}"),
                ("r2", f"{straight.r_squared:.2f} of the line; a random walk gives {straight.walk_r_squared:.2f}"),
                (
                    "split-half",
                    f"{half}: cosine of the directions of odd and even increments; a random walk gives about 0",
                ),
            ]
        return rows

    @property
    def advised(self) -> Pick | None:
        """The recipe that the verdict recommends; None where it advises against."""
        return self.verdict.pick if self.verdict and self.verdict.sure != "none" else None

    def sentences(self) -> list[str]:
        """The verdict in sentences, without the caveat: what to use, how far, how sure."""
        doubt = []
        if self.doubt is not None:
            free = [m.name for m in METHODS.values() if not m.needs_base and not m.stays]
            doubt = [
                f"{self.doubt[0].upper()}{self.doubt[1:]}.",
                f"Until that is answered, only methods that do not use the base are considered ({', '.join(free)}), "
                f"with low confidence at best.",
            ]
        if self.verdict is None:
            return [
                *doubt,
                "No recipe could be tried at every cut-off: there are too few steps, or nothing moved between them.",
            ]
        return [*doubt, *words(self.test, self.verdict)]

    def words(self) -> list[str]:
        """The verdict in sentences: what to use, how far, how sure, and what it does not mean."""
        return [*self.sentences(), *([caveat()] if self.verdict else [])]

    def ranked(self) -> list[Pick]:
        """Every recipe at every strength, best first."""
        return rank_all(self.test)

    def best_of_each_method(self) -> list[Pick]:
        """The best recipe of each method, best first; of the recommended one's method that one, though another ties."""
        picks: dict[str, Pick] = {}
        for pick in (*([self.verdict.pick] if self.verdict else []), *self.ranked()):
            picks.setdefault(pick.recipe.method, pick)
        return sorted(picks.values(), key=lambda pick: -pick.score)

    def row(self, pick: Pick) -> dict[str, Any]:
        """All figures of one recipe, for scripts: by horizon the pooled skill, the median over tensors, and the cosine."""
        test, trial, strength = self.test, pick.trial, pick.strength
        return {
            **pick.recipe.to_json(),
            "share": trial.share,
            "window": name_window(self.store, self.window_of(pick)),
            "score": pick.score,
            "skill": by_horizon(test.by_horizon(trial, strength)),
            "median": by_horizon(self._means(test.medians(trial, strength))),
            "cosine": by_horizon(self._means(test.cosines(trial, strength))),
        }

    def _means(self, values: np.ndarray) -> np.ndarray:
        """The mean within each horizon of a figure of columns, NaN where nothing is."""
        groups = [values[(self.test.horizons == place) & ~np.isnan(values)] for place in range(len(HORIZONS))]
        return np.array([group.mean() if len(group) else np.nan for group in groups])

    def parts(self, pick: Pick) -> dict[str, np.ndarray]:
        """Skill by horizon of one recipe for each part of the model that moved."""
        moved = [part for part in PARTS if self.test.pooled(pick.trial, part)[:, -1].any()]
        return {part: self.test.by_horizon(pick.trial, pick.strength, part=part) for part in moved}

    def excluded(self) -> list[str]:
        """The options that leave out the parts which the advised recipe takes farther away, at every horizon."""
        if self.advised is None:
            return []
        skills = self.parts(self.advised)
        worse = [part for part, by in skills.items() if np.nanmax(by) < 0]
        globs = [g for part in worse for g in globs_of(name for name in self.test.names if part_of(name) == part)]
        return [f"--exclude {quote(glob)}" for glob in globs] if len(worse) < len(skills) else []

    def window_of(self, pick: Pick) -> tuple[int, ...]:
        """The steps that a recipe is fitted to: the last ones of the window, or all of it."""
        return self.window[-(pick.trial.window(len(self.window)) or len(self.window)) :]

    def commands(self) -> list[str]:
        """The commands to run next: what the verdict advises; where it advises against, an evaluation that judges by itself."""
        if self.advised is None:
            return [command("sweep", self.store, "--methods relex,pinned", EVAL, window=self.window)]
        return [command(name, self.store, *more, window=self.window) for name, *more in (("predict",), ("sweep", EVAL))]

    def to_json(self) -> dict[str, Any]:
        """For scripts: the verdict, every recipe, by horizon and part, and the cut-offs they were tried at."""
        steps, verdict = self.test.steps.tolist(), self.verdict
        folds = self.test.folds
        return {
            "path": self.store.shown,
            "window": list(self.window),
            "cut_offs": [{"step": steps[f.known - 1], "held_out": [steps[i] for i in f.held_out]} for f in folds],
            "horizons": [horizon_name(place) for place in range(len(HORIZONS))],
            "verdict": None if verdict is None else self._verdict(verdict),
            "caveat": CAVEAT,
            "doubt": self.doubt,
            "straightness": asdict(self.straight) if self.straight else None,
            "parts": {p: by_horizon(s) for p, s in self.parts(verdict.pick).items()} if verdict else {},
            "recipes": [self.row(pick) for pick in self.ranked()],
        }

    def _verdict(self, verdict: Verdict) -> dict[str, Any]:
        return {
            **self.row(verdict.pick),
            "sure": verdict.sure,
            "reach": verdict.reach,
            "tested": verdict.tested,
            "farthest": verdict.farthest,
            "followed": [{"step": a.step, "recipe": a.pick.recipe.method, "skill": a.skill} for a in verdict.history],
            "words": self.words(),
        }


def by_horizon(values: np.ndarray) -> dict[str, float]:
    """Figures by horizon, for scripts: those that are not NaN, by the names of their horizons."""
    return {horizon_name(place): float(value) for place, value in enumerate(values) if not np.isnan(value)}


def judge(store: Store, window: tuple[int, ...], resources: Resources, stages: Stages) -> Judgement:
    """Backtest a trajectory over a window of stored steps; Gram matrices are computed and kept if they are not yet.

    Raises RequestError for fewer than 3 steps, BudgetError where memory is too small.
    """
    steps = np.array(window)
    trials, folds = make_trials(len(steps)), make_folds(steps)
    grams = find_grams(store, store.steps, 1, "gram", resources, stages)
    fitted, nbytes = store.fitted(), 8 * len(steps) ** 2
    held = bytes_of(len(fitted), len(steps), len(trials), folds, len(STRENGTHS))
    needed = resources.held + plan.OVERHEAD + held
    if needed > resources.memory:
        raise BudgetError(
            f"--memory {show(resources.memory)} is too small: a backtest of {len(fitted)} tensors needs "
            f"{show(needed)}; give more, or a shorter --window"
        )
    with threadpool_limits(1), stages("backtest", 2 * len(fitted) * nbytes) as advance:

        def pairs() -> Iterator[tuple[str, np.ndarray]]:
            for tensor in fitted:
                yield tensor.name, grams.of(tensor, window)
                advance(nbytes)

        test = backtest(pairs(), len(fitted), steps, trials, folds, STRENGTHS)
        straight = straightness((gram for _, gram in pairs()), steps)
    doubt = doubt_of_base(store, grams)
    return Judgement(store, window, test, advise(test, doubt is not None), straight, doubt)
