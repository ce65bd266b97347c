"""How long work reports progress: a stage has a number of bytes, and its ``advance`` is called with those done."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

#: Opens a stage of work: (what is being done, bytes in all) -> a context that gives ``advance(bytes)``.
Stages = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def silent(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A stage that reports nothing."""
    return nullcontext(lambda count: None)
