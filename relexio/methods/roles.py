"""Tensors by their names: which part of the model each is, its layer, and which of them a prediction is about."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from relexio.errors import RequestError

#: Parts of a model by the names that the common architectures give them; the first that fits counts.
_PARTS = {
    part: re.compile(pattern)
    for part, pattern in {
        "norm": r"norm|(^|[._])ln_?\d*([._]|$)",
        "embedding": r"embed|(^|\.)wte\.|(^|\.)wpe\.",
        "head": r"lm_head|(^|\.)output\.weight|score\.weight|(^|\.)v_head",
        "qkv": r"qkv|query_key_value|c_attn",
        "q": r"(^|[._])(q|query)_|(^|\.)query\.",
        "k": r"(^|[._])(k|key|kv)_|(^|\.)key\.",
        "v": r"(^|[._])(v|value)_|(^|\.)value\.",
        "o": r"(^|[._])(o|out)_proj|attn\.c_proj|attention\.dense",
        "gate": r"gate_up|gate|(^|[._])w1([._]|$)",
        "up": r"(^|[._])up_|(^|[._])w3([._]|$)|c_fc|fc1|dense_h_to_4h",
        "down": r"(^|[._])down_|(^|[._])w2([._]|$)|mlp\.c_proj|fc2|dense_4h_to_h",
    }.items()
}
PARTS = (*_PARTS, "other")
#: Where the values of tensors that are not predicted may come from.
OTHERS = ("last", "base")


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, one of PARTS."""
    return next((part for part, pattern in _PARTS.items() if pattern.search(name)), "other")


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to, None for those outside."""
    match = re.search(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d{1,6})\.", name)
    return int(match[1]) if match else None


def globs_of(names: Iterable[str]) -> list[str]:
    """Patterns of tensors, one for all layers: ``model.layers.*.mlp.up_proj.weight``."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


@dataclass(frozen=True)
class Choice:
    """Which tensors are predicted, by glob patterns, and what the ``others`` keep: ``base`` or ``last``.

    Without ``include`` all are; ``exclude`` is applied after it.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    others: str = "last"

    def of(self, names: Iterable[str]) -> frozenset[str]:
        """The chosen tensor names. Raises RequestError for a pattern that matches none, or if none is left."""
        names = tuple(names)
        if self.others not in OTHERS:
            raise RequestError(f"--others {self.others}: give base or last")
        if self.others != "last" and not (self.include or self.exclude):
            raise RequestError(f"--others {self.others} has no effect without --include or --exclude")
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise RequestError(
                        f"--{option} {pattern!r} matches none of the {len(names)} tensors; their names look like "
                        f"{names[0]!r} and {names[-1]!r}"
                    )
        chosen = frozenset(name for name in names if self._takes(name))
        if not chosen:
            raise RequestError("--include and --exclude leave no tensor to predict")
        return chosen

    def _takes(self, name: str) -> bool:
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
