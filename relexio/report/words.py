"""What the report says in words and single numbers: the verdict, and the key figures with what each means."""

from dataclasses import dataclass

import numpy as np

from relexio.methods.line_tests import random_walk
from relexio.methods.verdict import CAVEAT
from relexio.report.data import Facts
from relexio.words import describe_steps, show


@dataclass(frozen=True)
class Told:
    """The verdict: ``sure`` (high, moderate, low, none or untested), sentences, what speaks against one line, a command."""

    sure: str
    sentences: list[str]
    signs: list[str]
    command: str | None


def verdict(facts: Facts) -> Told:
    """The verdict on a run in words."""
    judged = facts.found.judged
    if judged is None:
        said = f"There is no verdict: a backtest takes at least three observed steps, and the window has {len(facts.found.window)}."
        return Told("untested", [said], [], None)
    signs = judged.straight.signs if judged.straight else []
    sentences = [text for text in judged.words() if text != caveat()]
    return Told(judged.verdict.sure if judged.verdict else "untested", sentences, signs, judged.command())


def caveat() -> str:
    """What no figure here says."""
    return f"{CAVEAT[0].upper()}{CAVEAT[1:]}."


@dataclass(frozen=True)
class Key:
    """One key figure and what it means; ``run`` beside ``walk``, both from 0 to 1, where a random walk is the measure."""

    name: str
    value: str
    why: str
    run: float | None = None
    walk: float | None = None


def keys(facts: Facts) -> list[Key]:
    """The key figures, in the order of the page."""
    found, tensors, size = facts.found, facts.found.store.tensors, facts.sizes
    parameters = sum(tensor.size for tensor in tensors if tensor.kind.is_float)
    elements = max(sum(tensor.size for tensor in tensors), 1)
    straight = found.judged.straight if found.judged else None
    walk_energy, walk_r2 = random_walk(np.array(found.window)) if found.window[-1] > 0 else (1.0, 1.0)
    r2 = straight.r_squared if straight else float(np.median([t.line.r_squared for t in found.tensors]))
    half = straight.split_half if straight else None
    return [
        Key("steps", f"{len(found.window)}", f"observed: {describe_steps(found.window)}"),
        Key("parameters", _count(parameters), f"in {len(tensors):,} tensors, of which {len(found.tensors):,} moved"),
        Key("changed", f"{facts.changed[:, -1].sum() / elements:.1%}", f"of all elements at step {found.window[-1]}"),
        Key(
            "energy",
            f"{found.spectrum[0]:.2f}",
            f"of the movement lies along one direction; a random walk has {walk_energy:.2f}",
            float(found.spectrum[0]),
            walk_energy,
        ),
        Key("r²", f"{r2:.2f}", f"of a line through the coefficients; a random walk has {walk_r2:.2f}", r2, walk_r2),
        Key(
            "split-half",
            "–" if half is None else f"{half:.2f}",
            "takes four steps"
            if half is None
            else "cosine of the directions of two halves of the run; a random walk has about 0",
            half,
            None if half is None else 0.0,
        ),
        Key(
            "on disk",
            show(size.steps + size.base),
            f"with the base, for {show(size.checkpoints)} of checkpoints ({size.compression:.0f} times smaller, the base apart)",
        ),
    ]


def _count(number: int) -> str:
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
