"""A mix: weights over the base and observed steps, as text such as ``0=-0.5,300=1.5``, where 0 is the base."""

import re

import numpy as np

from relexio.errors import RequestError

_BASE = 0
_NUMBER = r"[+-]?(?:\d{1,15}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][+-]?\d{1,2})?"
_NEARLY = 1e-9  # how near to 1 a sum of decimal numbers comes


def parse_mix(text: str) -> dict[int, float]:
    """The weights of a mix by step. Raises RequestError for what is no mix, or for one that does not add up to 1."""
    weights: dict[int, float] = {}
    for piece in text.split(","):
        match = re.fullmatch(rf"\s*(\d{{1,15}})\s*=\s*({_NUMBER})\s*", piece)
        if not match:
            raise RequestError(
                f"--weights {text}: {piece!r} is not STEP=WEIGHT; write 0=-0.5,300=1.5, where 0 is the base"
            )
        if int(match[1]) in weights:
            raise RequestError(f"--weights {text}: step {int(match[1])} is given twice")
        weights[int(match[1])] = float(match[2])
    if abs(sum(weights.values()) - 1) > _NEARLY:
        rest = {step: weight for step, weight in weights.items() if step != _BASE}
        fitting = {_BASE: 1 - sum(rest.values()), **rest}
        raise RequestError(
            f"--weights {text}: they add up to {sum(weights.values()):.12g}, and must to 1; "
            f"give the base what is missing: --weights {','.join(f'{s}={w:.12g}' for s, w in fitting.items())}"
        )
    return weights


def check_mix(text: str | None, steps: np.ndarray) -> None:
    """Raise RequestError unless a mix is given, and can be made of the base and steps [T]."""
    if text is None:
        raise RequestError("--method mix needs --weights, as in --weights 0=-0.5,300=1.5, where 0 is the base")
    delta_weights(text, steps)


def delta_weights(text: str, steps: np.ndarray) -> np.ndarray:
    """The weights [T] of the deltas at steps [T] that make up a mix; the base has the rest. Raises RequestError.

    They are those of the steps alone: theta_0 (1 - sum_s w_s) + sum_s w_s theta_s = theta_0 + sum_s w_s (theta_s - theta_0).
    """
    weights = parse_mix(text)
    weights.pop(_BASE, None)
    missing = [step for step in weights if step not in steps]
    if missing:
        raise RequestError(
            f"--weights {text}: step {missing[0]} is not among the {len(steps)} steps of the window, "
            f"{steps[0]} to {steps[-1]}"
        )
    return np.array([weights.get(int(step), 0.0) for step in steps])
