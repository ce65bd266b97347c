"""What the report says in words and single numbers: the verdict, and the key figures with what each means."""

from dataclasses import dataclass

import numpy as np

from relexio.report.data import Facts
from relexio.words import describe_steps, show


@dataclass(frozen=True)
class VerdictText:
    """The verdict: ``sure`` (high, moderate, low, none or untested), sentences, evidence that it is not one line, a command."""

    sure: str
    sentences: list[str]
    signs: list[str]
    command: str | None


def verdict(facts: Facts) -> VerdictText:
    """The verdict on a run in words."""
    judged, count = facts.findings.judged, len(facts.findings.window)
    if judged is None:
        reason = f"There is no verdict: a backtest needs at least 3 observed steps, and the window has {count}."
        return VerdictText("untested", [reason], [], None)
    signs = judged.straight.signs if judged.straight else []
    sure = judged.verdict.sure if judged.verdict else "untested"
    return VerdictText(sure, judged.sentences(), signs, judged.commands()[0] if judged.advised else None)


@dataclass(frozen=True)
class KeyFigure:
    """One key figure and what it means; ``run`` beside ``walk``, both from 0 to 1, where a random walk is the measure."""

    name: str
    value: str
    why: str
    run: float | None = None
    walk: float | None = None


def key_figures(facts: Facts) -> list[KeyFigure]:
    """The key figures, in the order of the page."""
    findings, tensors, size = facts.findings, facts.findings.store.tensors, facts.sizes
    parameters = sum(tensor.size for tensor in tensors if tensor.kind.is_float)
    elements = max(sum(tensor.size for tensor in tensors), 1)
    straight = findings.judged.straight if findings.judged else None
    r2 = straight.r_squared if straight else float(np.median([t.line.r_squared for t in findings.tensors]))
    energy, walk_energy, walk_r2 = float(findings.spectrum[0]), float(facts.walk.spectrum[0]), facts.walk.line.r_squared
    direction = f"of the movement lies along one direction; a random walk has {walk_energy:.2f}"
    on_disk = f"with the base, for {show(size.checkpoints)} of checkpoints ({size.compression:.0f} times smaller, without the base)"
    return [
        KeyFigure("steps", f"{len(findings.window)}", f"observed: {describe_steps(findings.window)}"),
        KeyFigure(
            "parameters", _count(parameters), f"in {len(tensors):,} tensors, of which {len(findings.tensors):,} moved"
        ),
        KeyFigure(
            "changed", f"{facts.changed[:, -1].sum() / elements:.1%}", f"of all elements at step {findings.window[-1]}"
        ),
        KeyFigure("energy", f"{energy:.2f}", direction, energy, walk_energy),
        KeyFigure(
            "r²", f"{r2:.2f}", f"of a line through the coefficients; a random walk has {walk_r2:.2f}", r2, walk_r2
        ),
        _split_half(straight.split_half if straight else None),
        KeyFigure("on disk", show(size.steps + size.base), on_disk),
    ]


def _split_half(cosine: float | None) -> KeyFigure:
    if cosine is None:
        return KeyFigure("split-half", "–", "needs four steps")
    why = "cosine of the directions of two halves of the run; a random walk has about 0"
    return KeyFigure("split-half", f"{cosine:.2f}", why, cosine, 0.0)


def _count(number: int) -> str:
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
