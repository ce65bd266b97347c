"""Writes that fail: one of a store's, by its number."""

import errno
from collections.abc import Callable
from typing import Any

import pytest
import zarr.storage._local as zarr_local

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
