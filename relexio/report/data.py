"""What the report shows, as small tables: pure functions of findings, nothing is read or drawn here.

A table is a list of rows (dicts) that can go to JSON as they are. Lists inside a row run over steps, and are drawn as one
point each. Numbers are rounded to 5 digits: nobody sees more in a figure, and a page has many.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from relexio.methods import Window
from relexio.methods.line_tests import walk_gram
from relexio.methods.roles import part_of
from relexio.methods.spectrum import TensorFindings, find, left_over, thrown_away
from relexio.methods.trials import horizon_name
from relexio.methods.verdict import horizon_for
from relexio.report.theme import PART_COLOURS
from relexio.verbs.findings import Findings
from relexio.verbs.inspect import Sizes

Row = dict[str, Any]
Table = list[Row]

OUTSIDE = "none"  # the layer of embedding, head and final norm
WHOLE = "whole model"
RUN, WALK = "this run", "random walk"
_POINTS = 200  # of one curve: a phone has fewer pixels
_SAME = 0.002  # skills that near are one line in a figure


@dataclass(frozen=True)
class Score:
    """What an evaluation of one checkpoint gave: which curve it is a point of, its step, and the standard error, if known."""

    series: str
    step: int
    score: float
    error: float | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows. ``changed`` [tensors of the store, T] counts elements that differ from the base.

    ``scores`` are those of a sweep; its references are the series ``base`` and ``observed``.
    """

    findings: Findings
    sizes: Sizes
    changed: np.ndarray
    target: int
    scores: tuple[Score, ...] = ()

    @property
    def parts(self) -> list[str]:
        """The parts of the model that moved, from below to above."""
        return [part for part in PART_COLOURS if any(tensor.part == part for tensor in self.findings.tensors)]

    @cached_property
    def walk_window(self) -> Window:
        """A random walk over the same steps."""
        steps = np.array(self.findings.window)
        return Window(walk_gram(steps), steps)

    @cached_property
    def walk(self) -> TensorFindings:
        """That walk, measured at the same rank."""
        return find(self.walk_window, self.findings.rank)


def number(value: float) -> float | None:
    """A number as it goes into the page; None where it is not finite."""
    return float(f"{value:.5g}") if np.isfinite(value) else None


def numbers(values: np.ndarray) -> list[float | None]:
    """As ``number``, of an array."""
    return [number(float(value)) for value in values]


def signed(value: float) -> str:
    """A number with its sign for people: ``+0.15``, ``−0.30``."""
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def _short(value: float) -> str:
    """The same in four characters: ``+.15``, ``−.04``, ``< −1``."""
    return "< −1" if value < -0.995 else signed(value).replace("0.", ".", 1)[:4]


def over_steps(window: tuple[int, ...], name: str, values: np.ndarray) -> Row:
    """A row's lists: ``step``, and values [T] under a name; of many, _POINTS evenly spread, with the first and the last."""
    shown = np.unique(np.linspace(0, len(window) - 1, min(len(window), _POINTS)).round().astype(int))
    return {"step": np.array(window)[shown].tolist(), name: numbers(values[shown])}


def default_target(findings: Findings) -> int:
    """The farthest step at which the verdict sees skill, else twice the window's last step."""
    last, judged = findings.window[-1], findings.judged
    verdict = judged.verdict if judged else None
    return max(verdict.farthest if verdict and verdict.sure != "none" else 2 * last, last + 1)


@dataclass(frozen=True)
class SkillLines:
    """Skill by horizon of the best recipe of each method.

    ``methods`` are those that are drawn, from ``floor`` to ``top``, the recommended one (if any) ``first``; ``below`` are
    never above the floor.
    """

    rows: Table
    methods: list[str]
    first: str | None
    floor: float
    top: float
    below: list[str]


def skill_lines(findings: Findings) -> SkillLines | None:
    """None without a backtest, or where no recipe could be tried at every cut-off."""
    judged = findings.judged
    if judged is None or judged.verdict is None:
        return None
    lines: dict[str, tuple[str, np.ndarray]] = {}
    for pick in (judged.verdict.pick, *judged.best_of_each_method()):
        recipe = pick.trial.recipe
        if recipe.method not in lines:
            lines[recipe.method] = str(recipe), judged.test.by_horizon(pick.trial, pick.strength)
    merged = _merge(list(lines.values()))
    best = max(float(np.nanmax(values)) for _, values in merged)
    floor, top = max(-1.0, -2 * max(best, 0.1)), max(best, 0.0)
    drawn = dict([line for line in merged if np.nanmax(line[1]) > floor] or merged[:1])
    rows = [{"method": name, **row} for name, values in drawn.items() for row in _by_horizon(values)]
    advised = merged[0][0] if judged.verdict.sure != "none" else None
    below = [name for name, _ in merged if name not in drawn]
    return SkillLines(rows, list(drawn), advised, floor, top + 0.08 * (top - floor), below)


def _by_horizon(skills: np.ndarray) -> Table:
    """The horizons that were tested (``1.5×``), with the skill in each."""
    return [
        {"horizon": horizon_name(index).replace("x", "×"), "skill": number(skill)}
        for index, skill in enumerate(skills)
        if not np.isnan(skill)
    ]


def _merge(lines: list[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Lines that would lie on each other become one, with both names."""
    merged: list[tuple[str, np.ndarray]] = []
    for name, values in lines:
        for index, (other, known) in enumerate(merged):
            if np.allclose(values, known, rtol=0, atol=_SAME, equal_nan=True):
                merged[index] = f"{other} = {name}", known
                break
        else:
            merged.append((name, values))
    return merged


def energy_cells(findings: Findings) -> Table:
    """The share of energy that the rank keeps, by layer and part: the mean over tensors, weighted by their energy."""
    cells: dict[tuple[int | None, str], list[TensorFindings]] = {}
    for tensor in findings.tensors:
        cells.setdefault((tensor.layer, tensor.part), []).append(tensor)
    whole, rows = sum(tensor.sigma2 for tensor in findings.tensors), []
    for (layer, part), tensors in cells.items():
        total = sum(tensor.sigma2 for tensor in tensors)
        rows.append(
            {
                "layer": OUTSIDE if layer is None else str(layer),
                "part": part,
                "kept": number(sum(tensor.energy * tensor.sigma2 for tensor in tensors) / total),
                "share": number(total / whole),
                "tensors": len(tensors),
                "r2": number(float(np.median([tensor.line.r_squared for tensor in tensors]))),
            }
        )
    return rows


def layers(findings: Findings) -> list[str]:
    """The layers of the heat map from left to right, all between the first and the last."""
    numbered = [tensor.layer for tensor in findings.tensors if tensor.layer is not None]
    outside = [OUTSIDE] if len(numbered) < len(findings.tensors) else []
    return [*outside, *(map(str, range(min(numbered), max(numbered) + 1)) if numbered else ())]


def score_rows(scores: tuple[Score, ...]) -> Table:
    """Scores in the order of curves and steps, with one standard error to either side; the base is where observed steps begin."""
    return [
        {
            "series": "observed" if one.series == "base" else one.series,
            "step": one.step,
            "score": number(one.score),
            "error": None if one.error is None else number(one.error),
            "low": number(one.score - (one.error or 0.0)),
            "high": number(one.score + (one.error or 0.0)),
        }
        for one in sorted(scores, key=lambda one: (one.series not in ("base", "observed"), one.series, one.step))
    ]


def last_observed(scores: tuple[Score, ...], step: int) -> float | None:
    """The score of the last step of the window, which predictions go on from."""
    return next((one.score for one in scores if (one.series, one.step) == ("observed", step)), None)


def changed_shares(facts: Facts) -> Table:
    """The share of elements that differ from the base at each step, of the whole model and of each part that moved."""
    tensors = facts.findings.store.tensors
    parts, sizes = np.array([part_of(t.name) for t in tensors]), np.array([t.size for t in tensors])
    rows = []
    for part in (WHOLE, *facts.parts):
        chosen = np.full(len(parts), True) if part == WHOLE else parts == part
        shares = facts.changed[chosen].sum(axis=0) / max(int(sizes[chosen].sum()), 1)
        rows.append({"part": part, **over_steps(facts.findings.window, "share", shares)})
    return rows


def energy_by_direction(facts: Facts) -> Table:
    """Shares of the energy by direction, of the run and of a random walk; none below a millionth."""
    return [
        {"of": name, "direction": index, "share": number(float(share))}
        for name, shares in ((RUN, facts.findings.spectrum), (WALK, facts.walk.spectrum))
        for index, share in enumerate(shares, 1)
        if share > 1e-6
    ]


def left_out(facts: Facts) -> Table:
    """The share of each delta that the rank throws away, step by step, of the run and of a random walk."""
    walk = facts.walk_window
    shares = {
        RUN: facts.findings.thrown,
        WALK: thrown_away(left_over(walk, facts.findings.rank), np.diag(walk.gram)),
    }
    return [{"of": name, **over_steps(facts.findings.window, "share", values)} for name, values in shares.items()]


def skill_by_part(findings: Findings) -> Table:
    """Skill of the best recipe by part of the model and horizon; empty without a backtest."""
    judged = findings.judged
    if judged is None or judged.verdict is None:
        return []
    return [
        {"part": part, **row, "said": _short(row["skill"])}
        for part, values in judged.parts(judged.verdict.pick).items()
        for row in _by_horizon(values)
    ]


def skill_at(findings: Findings, target: int) -> float | None:
    """Skill of the best recipe within the target's horizon; None where nothing so far ahead was held out."""
    verdict = findings.judged.verdict if findings.judged else None
    if verdict is None:
        return None
    tried = np.flatnonzero(~np.isnan(verdict.skills))
    horizon = horizon_for(target / max(findings.window[-1], 1), verdict.tested, tried)
    return None if horizon is None else number(float(verdict.skills[horizon]))


def tensor_rows(findings: Findings, most: int = 1000) -> list[tuple[Any, ...]]:
    """The most energetic tensors: name, part, layer, changed share, share of the energy, energy kept, r_squared."""
    whole = sum(tensor.sigma2 for tensor in findings.tensors)
    return [
        (t.name, t.part, t.layer, t.changed, t.sigma2 / whole, t.energy, t.line.r_squared)
        for t in sorted(findings.tensors, key=lambda t: -t.sigma2)[:most]
    ]
