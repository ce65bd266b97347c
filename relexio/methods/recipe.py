"""A recipe: a method, and the options that it uses.

One table of options: the command line, refusals, names, JSON and suggested commands all follow from it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relexio.errors import RequestError
from relexio.methods.curves import CURVES, check_refits, read_off, read_off_refitting
from relexio.methods.mix import check_mix
from relexio.methods.registry import METHODS, Matrix, Method, Vector, Window

_NAME = 120  # characters of a name among files
_MOST_STRENGTH = 1e100  # its square is still a float64


@dataclass(frozen=True)
class Option:
    """One option of a recipe: its name on the command line and in JSON, the field of Recipe, its type, and its help.

    ``choices``: the words that it may be. ``title``: its text in a recipe's name; an option without one is left out there.
    """

    flag: str
    field: str
    type: type
    help: str
    choices: tuple[str, ...] = ()
    title: str = ""

    def of(self, recipe: "Recipe") -> Any:
        """Its value in a recipe."""
        return getattr(recipe, self.field)

    @property
    def default(self) -> Any:
        """Its value where none is given."""
        return getattr(Recipe, self.field)

    @property
    def users(self) -> list[str]:
        """The methods that use it."""
        return [method.name for method in METHODS.values() if self.flag in method.uses]


OPTIONS = (
    Option("rank", "rank", int, "Directions to keep for each tensor.", title="rank {}"),
    Option("strength", "strength", float, "Factor on the update."),
    Option("fit", "curve", str, "Curve through the coefficients.", tuple(CURVES), "{}"),
    Option("refit", "refit", int, "Steps to predict before the window moves on and is fitted again.", title="refit {}"),
    Option("last", "last", int, "Checkpoints in a mean or ema.  [default: the window]", title="last {}"),
    Option("weights", "mix", str, "What a mix is made of, e.g. 0=-0.5,300=1.5, where 0 is the base.", title="{}"),
)


@dataclass(frozen=True)
class Recipe:
    """How to predict: a method, its rank, curve and refits, the k of a mean, and strength lambda (1 is as published).

    ``refit``: steps read off before the window moves on and is fitted again; None fits once. ``last``: the k of ``mean``
    and ``ema``; None is the whole window. ``mix``: the weights of a ``mix``, as text (mix.py).
    """

    method: str = "relex"
    rank: int = 1
    strength: float = 1.0
    curve: str = "line"
    refit: int | None = None
    last: int | None = None
    mix: str | None = None

    @property
    def way(self) -> Method:
        """The method's entry in the table."""
        return METHODS[self.method]

    def read_off(self, steps: Vector, values: Matrix, at: Vector) -> Matrix:
        """This recipe's curve through values [..., T, r] over steps [T], read off at [S]: [..., S, r]."""
        if self.refit is None:
            return read_off(self.curve, steps, values, at)
        return read_off_refitting(self.curve, steps, values, at, self.refit)

    def weights(self, window: Window, targets: Sequence[int | None]) -> Matrix:
        """The weights [T, S] of this recipe for one tensor; zeros for a tensor that never changed."""
        if not window.gram.any():
            return np.zeros((len(window.steps), len(targets)))
        weights = self.strength * self.way.weights(window, np.array(targets), self)
        if self.way.from_last:
            weights[-1] += 1.0
        return weights

    def __str__(self) -> str:
        """For people: ``pinned, rank 2, poly2``; what the method does not use, and strength, are left out."""
        heeded = [o for o in OPTIONS if o.title and o.flag in self.way.uses]
        named = [o.title.format(o.of(self)) for o in heeded if o.flag == "rank" or o.of(self) != o.default]
        return ", ".join([self.method, *named])

    @property
    def label(self) -> str:
        """For people: ``pinned, rank 2, poly2, strength 0.75``; the method, its strength, and what is not as by default."""
        others = [f", {o.title.format(o.of(self))}" for o in OPTIONS if o.title and o.of(self) != o.default]
        return f"{self.method}{''.join(others)}, strength {_digits(self.strength)}"

    def named(self, step: int | None) -> str:
        """The name of its prediction among files: ``pinned-step-105-strength-0.75-rank-2``; a mix has no step."""
        others = [f"-{o.flag}-{_digits(o.of(self))}" for o in OPTIONS if o.title and o.of(self) != o.default]
        at = f"-step-{step}" if step is not None else ""
        return re.sub(r"[^\w.+-]+", "_", f"{self.method}{at}-strength-{_digits(self.strength)}{''.join(others)}")[
            :_NAME
        ]

    def to_json(self) -> dict[str, Any]:
        """For scripts: the method and every option by its flag."""
        return {"method": self.method, **{option.flag: option.of(self) for option in OPTIONS}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Recipe":
        """What ``to_json`` wrote; more is passed over. Raises KeyError."""
        return cls(found["method"], **{option.field: found[option.flag] for option in OPTIONS})

    def arguments(self) -> list[str]:
        """The command line that asks for this recipe: ``["--method pinned", "--strength 0.5"]``."""
        changed = [f"--{o.flag} {_digits(o.of(self))}" for o in OPTIONS if o.of(self) != o.default]
        return [f"--method {self.method}", *changed]

    def check(self, steps: Vector, targets: Sequence[int | None]) -> None:
        """Raise RequestError, naming the limit, where this recipe cannot be used on a window for these targets.

        A target is a step; None is that of a method that does not aim at one.
        """
        if self.method not in METHODS:
            raise RequestError(f"unknown method {self.method!r}; known are {', '.join(METHODS)}")
        if len(steps) < self.way.least_steps:
            raise RequestError(
                f"a window of {len(steps)} step{'s' * (len(steps) > 1)} cannot be fitted: --method {self.method} needs at least "
                f"{self.way.least_steps} observed steps"
            )
        if self.way.from_zero and steps[0] <= 0:
            raise RequestError(f"--method {self.method} counts from step 0; the window begins at step {steps[0]}")
        if not self.way.aims and any(target is not None for target in targets):
            raise RequestError(
                f"--method {self.method} makes one checkpoint, of no step: give no step, and do not sweep it"
            )
        self._check_options(len(steps))
        if "weights" in self.way.uses:
            check_mix(self.mix, steps)
        for target in targets:
            self._check_target(steps, target)

    def _check_options(self, count: int) -> None:
        for option in OPTIONS:
            value = option.of(self)
            unset = value is None and option.default is None
            if option.type is int and not unset and (type(value) is not int or not 1 <= value <= count):
                raise RequestError(f"--{option.flag} {value} does not fit a window of {count} steps; give 1 to {count}")
            if option.type is float and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise RequestError(f"--{option.flag} {value!r} is not a number")
            if option.type is str and not option.choices and not unset and not isinstance(value, str):
                raise RequestError(f"--{option.flag} {value!r} is not text, such as '0=-0.5,300=1.5'")
            if option.choices and value not in option.choices:
                raise RequestError(f"unknown --{option.flag} {value!r}; known are {', '.join(option.choices)}")
            heeded = option.type is float or option.flag in self.way.uses
            if not heeded and value != option.default:  # nothing that was asked for is ignored silently
                do = "do" if len(option.users) > 1 else "does"
                raise RequestError(
                    f"--method {self.method} does not use --{option.flag}; only {', '.join(option.users)} {do}"
                )
        if not abs(self.strength) <= _MOST_STRENGTH:
            raise RequestError(
                f"--strength {self.strength} is out of range; give -{_MOST_STRENGTH:g} to {_MOST_STRENGTH:g}"
            )
        if self.curve != "line" and count < CURVES[self.curve]:
            raise RequestError(f"--fit {self.curve} needs at least {CURVES[self.curve]} steps; the window has {count}")

    def _check_target(self, steps: Vector, target: int | None) -> None:
        if target is None and not self.way.aims:
            return
        if type(target) is not int or target < 0 or target > 10**15:
            raise RequestError(f"--step {target} is not a training step")
        if self.way.extrapolates and target <= steps[-1]:
            raise RequestError(
                f"--step {target} is not beyond the window, which ends at step {steps[-1]}; give a later step, "
                f"a window that ends earlier, or --method reconstruct"
            )
        if self.refit is not None:
            check_refits(steps, target, self.refit)
        if not self.way.extrapolates and target not in steps:
            raise RequestError(
                f"--step {target}: --method {self.method} needs a step of the window {steps[0]}..{steps[-1]}"
            )


def _digits(value: Any) -> str:
    """All digits of a number, and no more: two strengths never have one name."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
