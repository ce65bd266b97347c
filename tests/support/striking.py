"""Writes that fail: one of a store's, by its number. What a kill before any change of files would leave."""

import errno
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import zarr.storage._local as zarr_local

from relexio import atomic
from relexio.store.storage import LocalStorage


class Strike:
    """Fails the n-th write, commit or removal in a store from when it is ``begun``."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, failure: Callable[[str], BaseException]) -> None:
        self.calls: list[str] = []
        self.number, self.failure, self.begun = number, failure, False
        for name in ("put", "remove", "commit"):
            patch.setattr(LocalStorage, name, self._striking(name, getattr(LocalStorage, name)))
        patch.setattr(zarr_local, "_put", self._striking("put", zarr_local._put))

    @property
    def struck(self) -> bool:
        """Whether there were as many."""
        return len(self.calls) >= self.number

    def _striking(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def do(where: Any, *rest: Any, **more: Any) -> Any:
            if self.begun:
                self.calls.append(name)
                if len(self.calls) == self.number:
                    raise self.failure(str(where))
            return real(where, *rest, **more)

        return do


def full(path: str) -> OSError:
    """The disk has no room."""
    return OSError(errno.ENOSPC, "No space left on device", path)


class Killed(BaseException):
    """Nothing catches it; and unlike KeyboardInterrupt it does not stop the thread in which Zarr writes."""


def killed(_: str) -> Killed:
    """The process is killed."""
    return Killed()


def before_changes(patch: pytest.MonkeyPatch, look: Callable[[], object], *more: str) -> None:
    """Looks before each rename and removal, and before these ``more`` methods of ``Path``.

    Other threads make no such change meanwhile: what is looked at is there, and could be left by a kill.
    """
    lock = RLock()

    def watched(real: Callable[..., object]) -> Callable[..., object]:
        def change(*arguments: object, **options: object) -> object:
            with lock:
                look()
                return real(*arguments, **options)

        return change

    for name in ("rename", "replace", "unlink", *more):
        patch.setattr(Path, name, watched(getattr(Path, name)))
    patch.setattr(atomic, "remove_tree", watched(atomic.remove_tree))
