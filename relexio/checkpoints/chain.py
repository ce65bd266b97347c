"""A chain of deltas over a base: the model at each of its versions, read in ranges.

A tensor's patches are zstd frames, of which no part can be read alone, and a checksum is that of a whole tensor. So the
first that asks for a tensor goes through all its versions once: unpacks each patch, makes the tensor, compares its
checksum, and writes the patch again, in small parts that are packed by themselves, to a file that has no name. A range
is then read part by part, version by version, and that of the version before is still there: a block that is read at
every step costs each patch once.
"""

import os
import tempfile
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numcodecs import zstd

from relexio.checkpoints.match import match
from relexio.checkpoints.patch import CHECKSUMS, HEAD, XOR, Changes, Hasher, Patch, unpacked_bytes
from relexio.checkpoints.protocol import Checkpoint, Read, Wrapped
from relexio.checkpoints.record import CheckpointRecord, NotStored
from relexio.dtypes import Table, tensor_bytes
from relexio.errors import CheckpointError, StorageError

#: Bytes of a tensor that are packed by themselves, and the most that one thread keeps of the version before.
_PART, _KEPT = 1 << 16, 4 << 20


class Link(Protocol):
    """A version of a chain: which tensors it changes, and how."""

    version: int
    label: str
    encoding: str
    algorithm: str
    patches: Mapping[str, Patch]
    wanted: Table

    def frame(self, name: str, nbytes: int | None = None) -> bytes:
        """The packed change of a tensor, or the first bytes of it."""


class _Kept(NamedTuple):
    """The bytes of a range at a version, as the thread that read them last left them."""

    key: tuple[str, int, int, int]
    version: int
    bits: bytearray


class Chain:
    """The versions in a directory, over a base: ``links`` are deltas, ``whole`` are models that deltas go on from."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.links: dict[int, Link] = {}
        self.whole: dict[int, Checkpoint] = {0: base}
        self._changed: dict[str, list[int]] = {}
        self._begin()

    def _begin(self) -> None:
        self._spool = _Spool()
        self._unpacked: dict[str, dict[int, int]] = {}
        self._guard, self._guards = threading.Lock(), dict[str, threading.Lock]()
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_spool", "_unpacked", "_guard", "_guards", "_local")  # another process unpacks for itself
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @staticmethod
    def of(base: Checkpoint, root: Path) -> "Chain":
        """The chain of a directory over this base: one for all its versions, so that each is unpacked once."""
        chains: dict[Path, Chain] = vars(base).setdefault("chains", {})
        return chains.setdefault(root, Chain(base))

    def fitting(self, model: Checkpoint) -> Checkpoint:
        """A model with the base's tensors. Raises CheckpointError if it has others."""
        return match(model, self.base.tensors, self.base.label)

    def add(self, link: Link) -> None:
        """Have a version. Raises CheckpointError if it is not one of the base."""
        if link.version in self.links:
            return
        for name in link.patches:
            if name not in self.base.tensors:
                raise CheckpointError(
                    f"{link.label}: changes {name}, which {self.base.label} lacks; give the --base that the chain began from"
                )
            found = self.base.tensors[name]
            if link.wanted.get(name, found) != found:
                raise CheckpointError(
                    f"{link.label}: tensor {name}: is {_shown(link.wanted[name])}, in {self.base.label} {_shown(found)}; "
                    f"give the --base that the chain began from"
                )
        self.links[link.version] = link
        for name in link.patches:
            versions = self._changed.setdefault(name, [])
            versions.insert(bisect_right(versions, link.version), link.version)

    def changed(self, name: str, after: int, until: int) -> list[int]:
        """The versions that change a tensor, of those after one and up to another."""
        versions = self._changed.get(name, [])
        return versions[bisect_right(versions, after) : bisect_right(versions, until)]

    def scratch(self) -> int:
        """Bytes that it takes to unpack a patch: the tensor, the patch, packed and unpacked, and what the base needs."""
        most = 0
        for name, versions in self._changed.items():
            nbytes = tensor_bytes(*self.base.tensors[name])
            for version in versions:
                link = self.links[version]
                packed, size = link.patches[name].nbytes, nbytes
                if link.encoding != XOR and 8 * nbytes + packed > most:
                    size = 5 * _unpacked_bytes(link, name, nbytes) // 4
                most = max(most, nbytes + packed + size)
        return most + _KEPT + 4 * _PART + max(model.scratch for model in self.whole.values())

    def read(self, version: int, start: int, name: str, first: int, out: memoryview) -> None:
        """Fill ``out`` with a tensor's bytes at a version, of which the versions up to ``start`` are whole."""
        places = self._places(name, start, version)
        key, kept = (name, first, len(out), start), getattr(self._local, "kept", None)
        at = start
        if kept is not None and kept.key == key and kept.version <= version:
            at, out[:] = kept.version, kept.bits
        else:
            self.whole[start].read(name, first, out)
        for one in self.changed(name, at, version):
            self._spool.apply(places[one], first, out)
        if len(out) <= _KEPT:
            self._local.kept = _Kept(key, version, bytearray(out))

    def _places(self, name: str, start: int, version: int) -> Mapping[int, int]:
        """Where the patches of a tensor are, unpacked: by version, for all up to this one."""
        with self._guard:
            guard = self._guards.setdefault(name, threading.Lock())
        with guard:
            places = self._unpacked.setdefault(name, {})
            if any(one not in places for one in self.changed(name, start, version)):
                later = [one for one in self.whole if one > start]
                self._unpack(name, start, min(later, default=max(self.links)), places)
        return places

    def _unpack(self, name: str, start: int, until: int, places: dict[int, int]) -> None:
        """Make a tensor at all versions after a whole one, compare it with its checksums, and keep the patches."""
        state = np.empty(tensor_bytes(*self.base.tensors[name]), np.uint8)
        self.whole[start].read(name, 0, state.data)
        for version in self.changed(name, start, until):
            if version in places:
                self._spool.apply(places[version], 0, state.data)
            else:
                places[version] = self._advance(state, self.links[version], name, self.whole[start].label)

    def _advance(self, state: np.ndarray, link: Link, name: str, label: str) -> int:
        """Bring a tensor to a version; say where its patch is kept. Raises CheckpointError for another checksum."""
        frame, hasher = link.frame(name), _hasher(link)
        with _named(link, name):
            changes = Changes(frame, link.encoding, len(state))
        place = self._spool.write(_parts(state, changes, hasher), len(state))
        if hasher.hexdigest() != link.patches[name].checksum:
            raise CheckpointError(
                f"{link.label}: tensor {name}: its {link.algorithm} is {hasher.hexdigest()}, and the trainer wrote "
                f"{link.patches[name].checksum[:40]}: the delta is damaged, or {label} is not what the chain goes on from; "
                f"copy it again, or give the --base that training began from"
            )
        return place


def _parts(state: np.ndarray, changes: Changes, hasher: Hasher) -> Iterator[np.ndarray]:
    """Bring a tensor to its next version, part by part: what changed in each, as XOR."""
    for first in range(0, len(state), _PART):
        part = state[first : first + _PART]
        differences = changes.differences(first, part)
        part ^= differences
        hasher.update(part.data)
        yield differences


def _hasher(link: Link) -> Hasher:
    try:
        return CHECKSUMS[link.algorithm]()
    except CheckpointError as error:
        raise CheckpointError(f"{link.label}: {error}") from error


@contextmanager
def _named(link: Link, name: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{link.label}: tensor {name}: its delta {error}; copy it again") from error


def _unpacked_bytes(link: Link, name: str, nbytes: int) -> int:
    """The bytes that a patch will unpack to. Raises CheckpointError for more than its tensor can take."""
    with _named(link, name):
        return unpacked_bytes(link.frame(name, HEAD), link.encoding, nbytes)


def _shown(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]} {list(tensor[1])}"


class _Spool:
    """Patches in parts of a tensor that can be read alone, in a file without a name that ends with the process."""

    def __init__(self) -> None:
        self._fd, self._end, self._lock = -1, 0, threading.Lock()

    def write(self, parts: Iterator[np.ndarray], nbytes: int) -> int:
        """Keep a patch of a tensor of ``nbytes``, given part by part; say where it is."""
        index = np.zeros(
            (-(-nbytes // _PART), 2), np.uint64
        )  # where each part is, and its bytes; none: nothing changed
        for row, part in zip(index, parts, strict=True):
            if part.any():
                packed = zstd.compress(part, 1)
                row[:] = self._append(packed), len(packed)
        return self._append(index.tobytes())

    def apply(self, place: int, first: int, out: memoryview) -> None:
        """Bring some bytes of a tensor, from ``first`` on, over a patch that was kept."""
        if not len(out):
            return
        bits, one = np.frombuffer(out, np.uint8), first // _PART
        count = (first + len(out) - 1) // _PART - one + 1
        index = np.frombuffer(os.pread(self._fd, 16 * count, place + 16 * one), np.uint64).reshape(-1, 2)
        for part, (at, packed) in enumerate(index.tolist(), one):
            if packed:
                differences = np.frombuffer(zstd.decompress(os.pread(self._fd, packed, at)), np.uint8)
                begin = part * _PART
                low, high = max(first, begin), min(first + len(out), begin + len(differences))
                bits[low - first : high - first] ^= differences[low - begin : high - begin]

    def _append(self, data: bytes) -> int:
        with self._lock:
            if self._fd < 0:
                self._open()
            at, self._end = self._end, self._end + len(data)
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], at + done)
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()}: {error.strerror}; delta chains are unpacked there, and take about as much as they "
                f"do: set TMPDIR to a directory with room"
            ) from error
        return at

    def _open(self) -> None:
        with tempfile.TemporaryFile() as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)


class Version(Wrapped):
    """The model at a version of a chain: its base, and all that changed since. Its side files are the base's."""

    def __init__(self, delta: Checkpoint, chain: Chain, version: int, start: int) -> None:
        super().__init__(delta, chain.base.tensors)
        self.side, self._chain, self._version, self._start = chain.base.side, chain, version, start

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """The chain keeps what it needs."""
        yield partial(self._chain.read, self._version, self._start, name)

    def record(self, name_of: Callable[[Path | bytes], str]) -> CheckpointRecord:
        """What the store keeps of it: no files to be written again, but how to see that they are the same."""
        side = {name: name_of(data) for name, data in self.side.items()}
        left = NotStored.of(self.not_stored())
        return CheckpointRecord(self.step, self.source, (), None, side, left, made_of=self.fingerprints)

    @property
    def nbytes(self) -> int:
        """Bytes of the model."""
        return sum(tensor_bytes(*tensor) for tensor in self.tensors.values())

    @property
    def moved(self) -> Collection[str]:
        """The tensors that a version up to this one changes."""
        if self._start:
            return self.tensors.keys()
        return [name for name in self.tensors if self._chain.changed(name, 0, self._version)]

    @property
    def scratch(self) -> int:
        """Bytes in which a patch is unpacked."""
        return self._chain.scratch()
