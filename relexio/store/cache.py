"""Results kept beside the data, in ``cache/`` of the store, so that they are computed once.

A result that exists is complete (it got its name or its mark last), and covers the committed steps that its name counts. It
says whose content it was computed from: one of other data, as a copy over a store may leave it, counts as missing. A store
that cannot be written keeps them in a temporary directory for the length of the run.
"""

import errno
import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from relexio.atomic import PARTIAL
from relexio.errors import BusyError, StoreError
from relexio.store.chunks import chunk_key, read_chunk, write_chunk
from relexio.store.schema import Layout, hashes_from_json
from relexio.store.seal import damage, read_bound, read_node, seal, unseal
from relexio.store.storage import METADATA, LocalStorage, Location, locate
from relexio.store.store import Store
from relexio.store.zarrs import create, has_array, open_group
from relexio.words import shown

#: Bytes up to which an array is kept as one chunk and held in memory.
SMALL = 16 << 20
_NUMBER = np.dtype("<f8")
#: ``cache/`` is a group, so that Zarr finds nothing in a store that it does not know.
_GROUP = b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}'
#: More than the squares of 2^63 of the largest float32 add up to.
_LARGE = 1e100
_REMOVE = "remove this directory; it will be computed again"
#: A store that cannot be written, or a disk that is full, is no reason to fail: the result is kept for this run only.
#: (ENOENT: somebody has removed ``cache/`` meanwhile, which may be done at any time.)
_NOT_WRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR, errno.ENOENT)
}
_NOT_PERMITTED = {errno.EACCES, errno.EPERM}
_NAME = re.compile(r"([a-z]+)-(\d{4,})(?:-rank(\d+)-([0-9a-f]{16}))?")


@dataclass(frozen=True)
class CacheName:
    """What a result is about; as text, the name of its directory. ``rank`` and ``window`` are those of ``blocks`` only."""

    solver: str
    steps: int
    rank: int = 0
    window: str = ""

    @classmethod
    def of(cls, store: Store, solver: str, window: tuple[int, ...], rank: int) -> "CacheName":
        """The name of a solver's result on the committed steps of a store."""
        if solver == "gram":
            return cls("gram", len(store.steps))
        return cls("blocks", len(store.steps), rank, hashlib.sha256(repr(window).encode()).hexdigest()[:16])

    @classmethod
    def parse(cls, name: str) -> "CacheName | None":
        """The result that a directory of that name is; None for a name that no result has."""
        match = _NAME.fullmatch(name)
        return cls(match[1], int(match[2]), int(match[3] or 0), match[4] or "") if match else None

    def __str__(self) -> str:
        name = f"{self.solver}-{self.steps:04d}"
        return f"{name}-rank{self.rank}-{self.window}" if self.window else name


class _Temporary:
    """A directory that goes with this object, or with the process (unlike tempfile's own, without a warning)."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="relexio-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class CachedResult:
    """A small Zarr group of float64 arrays, one entry along the first axis for each tensor."""

    address: str
    owner: object = None  # a temporary directory lives as long as this
    _opened: dict[str, Layout | np.ndarray] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __repr__(self) -> str:
        return f"<CachedResult {self.shown}>"

    @property
    def shown(self) -> str:
        """The address as it may be seen."""
        return shown(self.address)

    @contextmanager
    def create(self, name: str, shape: tuple[int, ...]) -> Iterator["np.ndarray | _Entries"]:
        """A new array to be filled: in memory and stored as one chunk if it is small, else a chunk for each tensor."""
        small = 8 * prod(shape) <= SMALL
        axes = ("tensor", *(f"{name}_axis{i}" for i in range(1, len(shape))))
        layout = Layout(shape, tuple(max(1, size) for size in (shape if small else (1, *shape[1:]))), _NUMBER, axes)
        group = open_group(self.address, "r+")
        if not has_array(group, name, layout):  # another build of the same in this place may have made it
            create(group, name, layout, overwrite=name in group)
        entries = _Entries(locate(self.address), name, layout)
        if not small:
            yield entries
            return
        filled = np.zeros(shape)
        yield filled
        if filled.size:
            write_chunk(entries.location, name, layout, filled, 0)

    def check(self, tensors: int, steps: int) -> None:
        """Read and check all of it, for this many tensors and steps. Raises StoreError where it is damaged."""
        with damage(self.shown, _REMOVE):
            names = sorted(name for name in self._hashes if "/" not in name)
        for name in names:
            with damage(f"{self.shown}: {name}", _REMOVE):
                layout = self._layout(name)
                shape = layout.shape
                if shape[0] != tensors or any(size > steps for size in shape[1:]):
                    raise ValueError(f"its shape {list(shape)[:4]} is not of {tensors} tensors and {steps} steps")
                for number in range(-(-tensors // layout.chunks[0])):
                    self._chunk(name, layout, number)

    def _chunk(self, name: str, layout: Layout, number: int) -> np.ndarray:
        known = self._hashes[chunk_key(name, layout, number)]
        return read_chunk(locate(self.address), name, layout, number, known=known)

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return hashes_from_json(unseal(locate(self.address).get(METADATA) or b"")["relexio"]["metadata"])

    def _layout(self, name: str) -> Layout:
        """All in one chunk, or one for each tensor. Raises ValueError for what this module does not write."""
        layout = Layout.from_json(read_node(locate(self.address), name, self._hashes[name]))
        if layout.dtype != _NUMBER or layout.chunks not in (layout.shape, (1, *layout.shape[1:])):
            raise ValueError(f"its chunks {list(layout.chunks)[:4]} are neither all of it nor those of a tensor")
        return layout

    def read(self, name: str, entry: int, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor's entry of an array of that shape. Raises StoreError where the kept file is damaged."""
        with damage(f"{self.shown}: {name}", _REMOVE):
            if name not in self._opened:
                layout = self._layout(name)
                if layout.shape != shape:
                    raise ValueError(f"its shape is {list(layout.shape)[:4]}, not {list(shape)}")
                whole = layout.chunks == shape
                self._opened[name] = self._chunk(name, layout, 0) if whole else layout
            held = self._opened[name]
            numbers = held[entry] if isinstance(held, np.ndarray) else self._chunk(name, held, entry)[0]
            if not (np.abs(numbers) < _LARGE).all():  # false for NaN too
                raise ValueError("it holds numbers that no weights make")
            return numbers


@dataclass(frozen=True)
class _Entries:
    """An array that is written an entry at a time: a chunk for each tensor."""

    location: Location
    name: str
    layout: Layout

    def __setitem__(self, entry: int, values: np.ndarray) -> None:
        write_chunk(self.location, self.name, self.layout, values, entry)


def has(store: Store, name: CacheName) -> bool:
    """Whether something is kept under a name, and may be read."""
    with _without_permission([], f"cache/{name}"):
        final = locate(store.address).below(f"cache/{name}")
        return _is_there(final) and _is_of(final, store)
    return False


def _is_there(final: Location) -> bool:
    """Whether a result is there. Raises OSError (EACCES) for one that may not be read: it is another user's own."""
    if not final.whole():
        return False
    if not final.readable():
        raise PermissionError(errno.EACCES, "may not be read", final.shown)
    return True


def _content(store: Store) -> str:
    """A hash of all that a result depends on: the content hashes of the base and of every step."""
    hashes = (store.base_content, *sorted(store.contents.items()))
    return hashlib.sha256(repr(hashes).encode()).hexdigest()


def _is_of(final: Location, store: Store) -> bool:
    """Whether a result was computed from what the store holds now. One that is damaged is: whoever reads it will tell."""
    try:
        return bool(unseal(final.get(METADATA) or b"")["relexio"].get("content") == _content(store))
    except (ValueError, KeyError):
        return True


def check(store: Store) -> tuple[list[str], list[str], list[str]]:
    """What is damaged among all kept results (a line each); the names of those that may not be read, and of other data."""
    cache = locate(store.address).below("cache")
    damaged: list[str] = []
    closed: list[str] = []
    others: list[str] = []
    with _without_permission(closed, "cache"):
        names = sorted(set(cache.names()) - {METADATA})
        with _without_permission([], METADATA):
            if any(map(CacheName.parse, names)) and cache.get(METADATA) != _GROUP:
                damaged.append(f"{cache.address}: {METADATA} is missing or damaged; {_REMOVE}")
        for name in names:
            with _without_permission(closed, f"cache/{name}"):
                try:
                    if name.endswith("partial") or not _is_there(cache.below(name)):
                        continue
                    if not _is_of(cache.below(name), store):
                        known = CacheName.parse(name)  # one of fewer steps is what the next fit clears away
                        if known is not None and known.steps >= len(store.steps):
                            others.append(f"cache/{name}")
                        continue
                    CachedResult(cache.below(name).address).check(len(store.fitted()), len(store.steps))
                except StoreError as error:
                    damaged.append(str(error))
    return damaged, closed, others


def left(store: Store) -> list[str]:
    """The names of unfinished results in ``cache/``, as far as it may be read."""
    with _without_permission([], "cache"):
        return [name for name in locate(store.address).below("cache").names() if name.endswith("partial")]
    return []


@contextmanager
def _without_permission(closed: list[str], name: str) -> Iterator[None]:
    """Add a name to those that are closed where the permission to read what it stands for is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_PERMITTED:
            raise
        closed.append(name)


def keep(store: Store, name: CacheName, build: Callable[[CachedResult], None]) -> CachedResult:
    """The result kept under a name, built if it does not exist yet. One that may not be read counts as missing."""
    cache = locate(store.address).below("cache")
    final = cache.below(str(name))
    try:
        if (there := _is_there(final)) and _is_of(final, store):
            return CachedResult(final.address)
        if isinstance(cache, LocalStorage) and cache.path.is_symlink():  # to write there is not what was asked for
            raise NotADirectoryError(errno.ENOTDIR, "a link", cache.address)
        _clear_away(cache, name, store)
        if there:
            final.remove()
        if cache.get(METADATA) != _GROUP:
            locate(store.address).put(f"cache/{METADATA}", _GROUP)  # before the result, which is then never without it
        _build(final, store, build)
        _is_there(final)  # another process may have been faster, and keep it to itself
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        owner = _Temporary()
        final = locate(Path(owner.path, str(name)))
        with final.storage_errors():
            _build(final, store, build)
        return CachedResult(final.address, owner)
    return CachedResult(final.address)


def _build(final: Location, store: Store, build: Callable[[CachedResult], None]) -> None:
    with final.building() as building:
        group = open_group(building.address, "a")
        build(CachedResult(building.address))
        names = sorted(group.array_keys())
        chunks = [f"{name}/c/{chunk}" for name in names for chunk in _chunks_of(group[name])]
        hashes = {path: hashed for path, hashed, _ in read_bound(building, [*names, *chunks])}
        building.put(METADATA, seal({"metadata": hashes, "content": _content(store)}, whole=True))


def _chunks_of(array: Any) -> Iterator[str]:
    """The places of an array's chunks: one, or one for each tensor."""
    behind = "/".join("0" for _ in array.shape[1:])
    return (f"{number}/{behind}" for number in range(-(-array.shape[0] // array.chunks[0])))


def _clear_away(cache: Location, wanted: CacheName, store: Store) -> None:
    """Remove what nobody will ask for again: results on other steps, and what a killed process left unfinished."""
    for name in cache.names():
        other = CacheName.parse(name)
        # another process may finish it, or clear it away, meanwhile; another user's may not be ours to remove
        with suppress(BusyError, FileNotFoundError, PermissionError):
            if name.endswith(PARTIAL):
                with cache.below(name).locked():
                    cache.below(name).remove()
            elif other is not None and other.solver == wanted.solver:
                fewer, more = other.steps < wanted.steps, other.steps > wanted.steps
                if fewer or (more and not _is_of(cache.below(name), store)):
                    cache.below(name).remove()
