"""The tables of the coefficients: which tensors are drawn, their points and lines, and those of the whole model. Pure."""

from dataclasses import dataclass

import numpy as np

from relexio.methods.spectrum import TensorFindings
from relexio.report.data import WHOLE, Row, Table, number, numbers, thin
from relexio.verbs.findings import Findings

_DRAWN, _DRAWN_OF_PART = 12, 6  # tensors whose coefficients are drawn at first, and when one part is picked
_LEAST_LAST = 0.2  # of the largest coefficient: a tensor that came back has no last value to be measured in


@dataclass(frozen=True)
class Curves:
    """Coefficients over steps, as multiples of each tensor's last one: points, lines to the target, and target points."""

    points: Table
    lines: Table
    targets: Table
    drawn: int


def coefficients(found: Findings, target: int) -> Curves:
    """Those of the most energetic tensors, some of each part, and of the whole model.

    The whole model's is along the direction that its tensors' directions make up, each as long as its last coefficient.
    """
    steps = np.array(found.window)
    drawn = _drawn(found.tensors)
    curves = Curves([], [], [], sum(top for _, top in drawn))
    for tensor, top in drawn:
        row = {"tensor": tensor.name, "part": tensor.part, "top": top}
        ends = tensor.line.slope * _ends(steps, target) + tensor.line.intercept
        _add(curves, row, steps, target, tensor.coefficients, ends)
    if (model := whole_model(found.tensors, steps, target)) is not None:
        values, ends = model
        _add(curves, {"tensor": WHOLE, "part": WHOLE, "top": True}, steps, target, values, ends)
    return curves


def whole_model(tensors: list[TensorFindings], steps: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The coefficients [T] of the whole model, and their line at _ends [3]; None where no tensor has a last coefficient."""
    lasts = np.array([tensor.coefficients[-1] for tensor in tensors])
    length = float(np.linalg.norm(lasts))
    if length == 0:
        return None
    at = _ends(steps, target)
    curves = np.array([tensor.coefficients for tensor in tensors])
    lines = np.array([tensor.line.slope * at + tensor.line.intercept for tensor in tensors])
    return lasts @ curves / length, lasts @ lines / length


def _ends(steps: np.ndarray, target: int) -> np.ndarray:
    """Where a line is drawn: from the first step over the last to the target."""
    return np.array([steps[0], steps[-1], target])


def _drawn(tensors: list[TensorFindings]) -> list[tuple[TensorFindings, bool]]:
    """The tensors that are drawn, by energy, and whether they are at first: the best of each part before the second."""
    fit = [t for t in tensors if t.coefficients[-1] > _LEAST_LAST * np.abs(t.coefficients).max()]
    by_part: dict[str, list[TensorFindings]] = {}
    for tensor in sorted(fit, key=lambda t: -t.sigma2):
        by_part.setdefault(tensor.part, []).append(tensor)
    leaders = [group[0] for group in by_part.values()]
    rest = sorted((t for group in by_part.values() for t in group[1:]), key=lambda t: -t.sigma2)
    top = {t.name for t in (*leaders, *rest)[:_DRAWN]}
    return [
        (t, t.name in top)
        for group in by_part.values()
        for place, t in enumerate(group)
        if place < _DRAWN_OF_PART or t.name in top
    ]


def _add(curves: Curves, row: Row, steps: np.ndarray, target: int, values: np.ndarray, ends: np.ndarray) -> None:
    some, last = thin(len(steps)), float(values[-1])
    there = {"step": steps[some].tolist(), "value": numbers(values[some] / last)}
    curves.points.append({**row, **there, "raw": numbers(values[some])})
    curves.lines.append({**row, "step": _ends(steps, target).tolist(), "value": numbers(ends / last)})
    curves.targets.append({**row, "step": target, "value": number(float(ends[-1]) / last)})
