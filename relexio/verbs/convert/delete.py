"""``convert --delete-verified``: remove the weight files of a step once the store has given back every byte of them."""

import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from relexio.atomic import sync
from relexio.checkpoints.files import INDEX
from relexio.checkpoints.record import CheckpointRecord
from relexio.checkpoints.safetensors import read_exactly
from relexio.checkpoints.write import OutputFile
from relexio.engine import graph
from relexio.engine.resources import Resources
from relexio.errors import CheckpointError, RequestError
from relexio.progress import Stages
from relexio.store.opening import open_store
from relexio.store.read import observed
from relexio.store.schema import Block
from relexio.store.store import Store
from relexio.verbs.output import output_files


@dataclass(frozen=True)
class Keep:
    """Which steps keep their files: every so many steps (0: none), and so many at the end of those stored."""

    every: int = 0
    last: int = 0

    def spares(self, step: int, steps: tuple[int, ...]) -> bool:
        """Whether a step of all stored ``steps`` (ascending) keeps its files."""
        return (self.every > 0 and step % self.every == 0) or step in steps[max(len(steps) - self.last, 0) :]


def parse_keep(text: str) -> Keep:
    """Parse ``every:50,last:2``. Raises RequestError with the accepted forms."""
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name not in ("every", "last") or name in given or not number.isascii() or not number.isdigit():
            raise RequestError(f"{text!r} does not say which steps to keep; write every:50, last:2 or every:50,last:2")
        given[name] = int(number[:15])
    return Keep(**given)


class _Refused(Exception):  # noqa: N818  told as the problem of a step
    """Why the files of a step stay."""


@dataclass(frozen=True)
class _Originals:
    """Files of a step, by path, and where each tensor is in them: path and first byte."""

    places: dict[str, list[tuple[str, int]]]

    @classmethod
    def of(cls, files: dict[Path, OutputFile]) -> "_Originals":
        places: dict[str, list[tuple[str, int]]] = {}
        for path, file in files.items():
            for tensor, start in file.places:
                places.setdefault(tensor, []).append((str(path), start))
        return cls(places)

    def unlike(self, block: Block, bits: np.ndarray) -> list[str]:
        """The files that do not hold these element bits of a block."""
        names, itemsize = [], block.kind.itemsize
        for piece in block.pieces:
            wanted = np.ascontiguousarray(bits[piece.span]).data.cast("B")
            for path, start in self.places.get(piece.tensor.name, ()):
                found = bytearray(len(wanted))
                with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                    read_exactly(file.fileno(), start + piece.start * itemsize, memoryview(found), Path(path))
                names += [path] if found != wanted else []
        return names


@dataclass(frozen=True)
class Deleted:
    """What became of a step's files: bytes that were freed, and why they were left, if they were."""

    step: int
    bytes: int
    problem: str | None = None


def delete_verified(
    store: Store,
    directories: Mapping[int, Path],
    tops: Mapping[int, Path],
    keep: Keep,
    resources: Resources,
    stages: Stages,
) -> Iterator[Deleted]:
    """Restore each step from its last commit, compare it with its files, and remove these if all bytes are equal.

    They are the shards that were stored and their index, or what an interrupted run has left of them, in the model's directory,
    which is in the step's (``tops``); nothing else is touched, and no link between the two is followed. Raises StoreError for a
    damaged store.
    """
    store = open_store(store.address)  # what is on the disk, not what this process believes
    for step, directory in directories.items():
        if step not in store.steps or keep.spares(step, store.steps):
            continue
        record = store.record(step)
        if not any(os.path.lexists(directory / name) for name, _, _ in record.fingerprints):
            continue  # nothing is left
        try:
            _refuse_links(directory, tops[step])
            yield Deleted(step, _delete(store, record, directory, resources, stages))
        except (_Refused, CheckpointError, OSError) as refused:
            why = refused.strerror if isinstance(refused, OSError) and refused.strerror else refused
            yield Deleted(step, 0, f"step {step} ({directory}) is not deleted: {why}")


def _refuse_links(directory: Path, top: Path) -> None:
    inside = [folder for folder in (directory, *directory.parents) if folder == top or top in folder.parents]
    for folder in inside:
        if folder.is_symlink():
            raise _Refused(f"{folder} is a link")


def _delete(store: Store, record: CheckpointRecord, directory: Path, resources: Resources, stages: Stages) -> int:
    step = record.step or 0
    if record.made_of:
        raise _Refused("the trajectory has the model that these files make, not the files")
    if not record.from_safetensors:
        raise _Refused("the trajectory has its weights, but could not give these files back")
    files = {directory / file.name: file for file in output_files(store, record)}
    index = {directory / INDEX: store.file(record.index)} if record.index else {}
    states = {path: _state(path) for path in (*index, *files) if os.path.lexists(path)}
    files = {path: file for path, file in files.items() if path in states}
    heads = {path: struct.pack("<Q", len(file.header)) + file.header for path, file in files.items()}
    for path, data in {**index, **heads}.items():
        if path in states and not _begins_with(path, data, len(data) if path in index else files[path].size):
            raise _Refused(f"{path} is not what {store.shown} holds")
    _compare(store, step, files, resources, stages)
    return _remove(states)


def _compare(store: Store, step: int, files: dict[Path, OutputFile], resources: Resources, stages: Stages) -> None:
    """Every block, restored, with the files."""
    kernel, executor = partial(_unlike, store, step, _Originals.of(files)), resources.for_combine(store, 1, 1)
    with stages("compare before deleting", sum(file.size for file in files.values())) as advance:
        for _, names in graph.each(store, 1, kernel, executor, advance):
            if names:
                raise _Refused(f"{names[0]} is not what {store.shown} holds")


def _unlike(store: Store, step: int, originals: _Originals, block: Block) -> list[str]:
    return originals.unlike(block, observed(store, block, step))


def _state(path: Path) -> tuple[int, ...]:
    """What tells whether a file is another, or was written to. Raises _Refused for what is no plain file."""
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):
        raise _Refused(f"{path} is {'a link' if stat.S_ISLNK(state.st_mode) else 'no plain file'}")
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _begins_with(path: Path, data: bytes, size: int) -> bool:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return path.lstat().st_size == size and file.read(len(data)) == data


def _remove(states: dict[Path, tuple[int, ...]]) -> int:
    """Remove files that are still as they were: first the index, since a step without shards must not seem whole."""
    freed = 0
    for path, state in states.items():
        if _state(path) != state:
            raise _Refused(f"{path} changed while it was compared")
        path.unlink()
        freed += state[2]
    for directory in {path.parent for path in states}:
        sync(directory)
    return freed
