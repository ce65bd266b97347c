"""What the report shows, as small tables: pure functions of findings, nothing is read or drawn here.

A table is a list of rows (dicts) that can go to JSON as they are. Lists inside a row run over steps, and are drawn as one
point each. Numbers are rounded to 5 digits: nobody sees more in a figure, and a page has many.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from relexio.methods import Window
from relexio.methods.roles import part_of
from relexio.methods.spectrum import TensorFindings, find, left_over, thrown_away
from relexio.methods.trials import horizon_name, within
from relexio.verbs.findings import Findings
from relexio.verbs.inspect import Sizes

Row = dict[str, Any]
Table = list[Row]

#: The parts of a model in the order in which a figure has them.
ORDER = ("embedding", "qkv", "q", "k", "v", "o", "gate", "up", "down", "norm", "head", "other")
OUTSIDE = "none"  # the layer of embedding, head and final norm
WHOLE = "whole model"
RUN, WALK = "this run", "random walk"
_POINTS = 200  # of one curve: a phone has fewer pixels
_SAME = 0.002  # skills that near are one line in a figure


@dataclass(frozen=True)
class Facts:
    """All that a report is made of. ``changed`` [tensors of the store, T] counts elements that differ from the base."""

    found: Findings
    sizes: Sizes
    changed: np.ndarray
    target: int

    @property
    def parts(self) -> list[str]:
        """The parts of the model that moved, from below to above."""
        there = {tensor.part for tensor in self.found.tensors}
        return [part for part in ORDER if part in there]

    @property
    def walk_energy(self) -> float:
        """The share of energy that the rank keeps of a random walk over the same steps."""
        walk = _walk(self.found.window)
        return find(Window(walk, np.array(self.found.window)), self.found.rank).energy if walk.any() else 1.0

    @property
    def drift(self) -> float | None:
        """The mean cosine of neighbouring increments of what the rank throws away; None where there are none."""
        there = self.found.alike[~np.isnan(self.found.alike)]
        return float(there.mean()) if len(there) else None


def number(value: float) -> float | None:
    """A number as it goes into the page; None for NaN."""
    return None if np.isnan(value) else float(f"{value:.5g}")


def numbers(values: np.ndarray) -> list[float | None]:
    """As ``number``, of an array."""
    return [number(float(value)) for value in values]


def signed(value: float) -> str:
    """A number with its sign for people: ``+0.15``, ``−0.30``."""
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def times(place: int) -> str:
    """A horizon for people: ``1.5×``."""
    return horizon_name(place).replace("x", "×")


def thin(count: int, most: int = _POINTS) -> np.ndarray:
    """Indices of at most ``most`` of ``count`` points, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def default_target(found: Findings) -> int:
    """The farthest step at which the verdict sees skill, else twice the window's last step."""
    last, judged = found.window[-1], found.judged
    verdict = judged.verdict if judged else None
    return max(verdict.farthest if verdict and verdict.sure != "none" else 2 * last, last + 1)


@dataclass(frozen=True)
class Skills:
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


def skills(found: Findings) -> Skills | None:
    """None without a backtest, or where no recipe could be tried at every cut-off."""
    judged = found.judged
    if judged is None or judged.verdict is None:
        return None
    picks = [judged.verdict.pick, *judged.best_of_each_method()]
    lines: dict[str, tuple[str, np.ndarray]] = {}
    for pick in picks:
        recipe = pick.trial.recipe
        if recipe.method not in lines:
            lines[recipe.method] = str(recipe), judged.test.by_horizon(pick.trial, pick.strength)
    merged = _merge(list(lines.values()))
    best = max(float(np.nanmax(values)) for _, values in merged)
    floor = max(-1.0, -2 * max(best, 0.1))
    drawn = [(name, values) for name, values in merged if np.nanmax(values) > floor]
    drawn = drawn or merged[:1]
    rows = [
        {"method": name, "horizon": times(place), "skill": number(value)}
        for name, values in drawn
        for place, value in enumerate(values)
        if not np.isnan(value)
    ]
    advised = merged[0][0] if judged.verdict.sure != "none" else None
    names = [name for name, _ in drawn]
    top, below = max(best, 0.0), [name for name, _ in merged if name not in names]
    return Skills(rows, names, advised, floor, top + 0.08 * (top - floor), below)


def _merge(lines: list[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Lines that would lie on each other become one, with both names."""
    merged: list[tuple[str, np.ndarray]] = []
    for name, values in lines:
        for place, (other, known) in enumerate(merged):
            if np.allclose(values, known, rtol=0, atol=_SAME, equal_nan=True):
                merged[place] = f"{other} = {name}", known
                break
        else:
            merged.append((name, values))
    return merged


def energy(found: Findings) -> Table:
    """The share of energy that the rank keeps, by layer and part: the mean over tensors, weighted by their energy."""
    cells: dict[tuple[int | None, str], list[TensorFindings]] = {}
    for tensor in found.tensors:
        cells.setdefault((tensor.layer, tensor.part), []).append(tensor)
    whole = sum(tensor.sigma2 for tensor in found.tensors)
    rows = []
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


def layers(found: Findings) -> list[str]:
    """The layers of the heat map from left to right, all between the first and the last."""
    numbered = [tensor.layer for tensor in found.tensors if tensor.layer is not None]
    outside = [OUTSIDE] if any(tensor.layer is None for tensor in found.tensors) else []
    return [*outside, *(map(str, range(min(numbered), max(numbered) + 1)) if numbered else ())]


def changed(facts: Facts) -> Table:
    """The share of elements that differ from the base at each step, of the whole model and of each part that moved."""
    tensors = facts.found.store.tensors
    parts = np.array([part_of(tensor.name) for tensor in tensors])
    sizes = np.array([tensor.size for tensor in tensors])
    some, steps = thin(facts.changed.shape[1]), np.array(facts.found.window)
    rows = []
    for part in (WHOLE, *facts.parts):
        chosen = np.full(len(parts), True) if part == WHOLE else parts == part
        share = facts.changed[chosen].sum(axis=0) / max(int(sizes[chosen].sum()), 1)
        rows.append({"part": part, "step": steps[some].tolist(), "share": numbers(share[some])})
    return rows


def _walk(window: tuple[int, ...]) -> np.ndarray:
    """The Gram matrix of a random walk of many dimensions over the same steps, but for a factor."""
    steps = np.array(window)
    return np.minimum.outer(steps, steps).astype(np.float64)


def spectrum(found: Findings) -> Table:
    """Shares of the energy by direction, of the run and of a random walk; none below a millionth."""
    walk = _walk(found.window)
    values = np.linalg.eigvalsh(walk)[::-1] / max(float(np.trace(walk)), 1.0)
    return [
        {"of": name, "direction": place + 1, "share": number(float(share))}
        for name, shares in ((RUN, found.spectrum), (WALK, values[: len(found.spectrum)]))
        for place, share in enumerate(shares)
        if share > 1e-6
    ]


def thrown(found: Findings) -> Table:
    """The share of each delta that the rank throws away, step by step, of the run and of a random walk."""
    steps, walk = np.array(found.window), _walk(found.window)
    some, shares = thin(len(steps)), {RUN: found.thrown}
    if walk.any():
        shares[WALK] = thrown_away(left_over(Window(walk, steps), found.rank), np.diag(walk))
    return [{"of": name, "step": steps[some].tolist(), "share": numbers(all_[some])} for name, all_ in shares.items()]


def parts(found: Findings) -> Table:
    """Skill of the best recipe by part of the model and horizon; empty without a backtest."""
    judged = found.judged
    if judged is None or judged.verdict is None:
        return []
    return [
        {"part": part, "horizon": times(place), "skill": number(value), "said": _short(value)}
        for part, values in judged.parts(judged.verdict.pick).items()
        for place, value in enumerate(values)
        if not np.isnan(value)
    ]


def _short(value: float) -> str:
    """A skill in four characters: ``+.15``, ``−.04``, ``< −1``."""
    if value < -0.995:
        return "< −1"
    text = f"{abs(value):.2f}"
    text = text[1:] if text.startswith("0") else text[:3]
    return text if text == ".00" else ("+" if value > 0 else "−") + text


def skill_at(found: Findings, target: int) -> float | None:
    """Skill of the best recipe within the target's horizon; None where nothing so far ahead was held out."""
    verdict = found.judged.verdict if found.judged else None
    ahead = target / max(found.window[-1], 1)
    if verdict is None or ahead > verdict.tested * 1.05:
        return None
    return number(float(verdict.skills[within(ahead)]))


def tensors(found: Findings, most: int = 1000) -> Table:
    """The most energetic tensors, for the table below the figures."""
    whole = sum(tensor.sigma2 for tensor in found.tensors)
    return [
        {
            "tensor": t.name,
            "part": t.part,
            "layer": t.layer,
            "changed": t.changed,
            "share": t.sigma2 / whole,
            "kept": t.energy,
            "r2": t.line.r_squared,
        }
        for t in sorted(found.tensors, key=lambda t: -t.sigma2)[:most]
    ]
