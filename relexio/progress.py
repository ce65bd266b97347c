"""How long work tells how far it is: a stage with a number of bytes, and an ``advance`` that is told of each part."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

#: Opens a stage of work: (what is being done, bytes in all) -> a context that gives ``advance(bytes)``.
Stages = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def silent(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A stage that tells nobody."""
    return nullcontext(lambda count: None)
