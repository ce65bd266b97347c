"""What a checkpoint is to the code that stores, compares and writes it.

A new input format is a class that inherits from ``Checkpoint``, in a module of its own in this room, and an entry in
``layout.FORMATS`` that finds the files by which it is recognized. It provides the data below, and ``held`` or ``read``,
and overrides the defaults that it can improve on. Nothing outside this room knows what its files look like.

What comes back: every tensor bit for bit, and the side files. A checkpoint that was read from safetensors files comes
back as the same files. Any other is written as one ``model.safetensors``: its tensors in the order of the base's table
under a plain header, and ``restore`` says so. A prediction has the form of its base.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

from relexio.checkpoints.files import INDEX, SINGLE, File
from relexio.checkpoints.header import header_of, parse_header
from relexio.checkpoints.record import CheckpointRecord, NotStored
from relexio.dtypes import Table, tensor_bytes
from relexio.errors import CheckpointError

#: Fills a buffer with a tensor's bytes from a certain one on: ``read(first_byte, out)``.
Read = Callable[[int, memoryview], None]


class Checkpoint(Protocol):
    """One model at one training step, or the base. It can be pickled, as blocks may be read in other processes.

    ``step`` is None for the base; ``label`` names it in errors, ``source`` says in the record where it was.
    ``tensors`` are in the order in which they are to be written. Their bytes are little-endian, as in safetensors files.
    ``files`` hold the weights: every worker must see them, and they must not change while they are read. Without files
    only its bytes show whether a checkpoint is still the same: they are compared, and an interrupted conversion starts anew.
    ``side`` has the model's other files by their path inside the checkpoint, or their bytes. ``directory`` holds all that
    the trainer wrote, if there is one. ``cast`` names the types on disk that are read as others.
    """

    cast: str = ""
    step: int | None
    label: str
    source: str
    tensors: Table
    files: tuple[File, ...]
    side: Mapping[str, Path | bytes]
    directory: Path | None

    def read(self, name: str, first_byte: int, out: memoryview) -> None:
        """Fill ``out`` (bytes) with a tensor's bytes from ``first_byte`` on. Raises CheckpointError if they end early."""
        with self.held(name, first_byte, len(out)) as read:
            read(first_byte, out)

    def held(self, name: str, first_byte: int, nbytes: int) -> AbstractContextManager[Read]:
        """Keep the files of these bytes of a tensor open, and read ahead: they will be read piece by piece.

        A block is read at many steps in turn, so many are held at once: open no more than one or two files each.
        """
        return _as_it_is(partial(self.read, name))

    def over(self, base: "Checkpoint") -> "Checkpoint":
        """The model itself, where this is what a trainer keeps beside its base, such as an adapter. Raises CheckpointError."""
        return self

    def at(self, step: int, made_of: tuple[tuple[str, int, int], ...]) -> "Checkpoint | None":
        """Where this is a base: the model at a step that was made of such files and is at hand, so that deltas go on from it."""
        return None

    def kept_open(self) -> AbstractContextManager[None]:
        """Let it be read to its end, though a trainer removes its files meanwhile: in this process only."""
        return nullcontext()

    def assert_unchanged(self) -> None:
        """Raise CheckpointError if a file has changed since it was opened."""
        for file in self.files:
            stat = self._stat(file.path)
            if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(
                    f"{file.path}: changed while it was read; wait until training has written it, and run again"
                )

    def _stat(self, file: Path) -> os.stat_result:
        return file.stat()

    def not_stored(self) -> dict[str, int]:
        """Bytes, by path, of everything that does not belong to the model; a directory of such files is one entry."""
        return {}

    def record(self, name_of: Callable[[Path | bytes], str]) -> CheckpointRecord:
        """What the store keeps of it; ``name_of`` gives the name of the array that will hold a file's bytes.

        Raises CheckpointError for tensors, or names of side files, with which it could not be written again.
        """
        header = header_of(self.tensors)
        parse_header(header, 8 + len(header) + sum(tensor_bytes(*t) for t in self.tensors.values()), self.label)
        for name in (SINGLE, INDEX):
            if name in self.side:
                raise CheckpointError(f"{self.label}: a side file is named {name}, as its weights will be")
        side = {name: name_of(data) for name, data in self.side.items()}
        left = NotStored.of(self.not_stored())
        return CheckpointRecord(self.step, self.source, (), None, side, left, made_of=self.fingerprints)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(file.size for file in self.files) or sum(tensor_bytes(*tensor) for tensor in self.tensors.values())

    @property
    def moved(self) -> Collection[str]:
        """The tensors that may differ from the base's: all, where it does not know better."""
        return self.tensors.keys()

    @property
    def scratch(self) -> int:
        """Bytes of memory that a read takes besides what it fills."""
        return 0

    @property
    def fingerprints(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of its files."""
        return tuple((file.path.name, file.size, file.mtime_ns) for file in self.files)

    @property
    def side_sizes(self) -> list[int]:
        """Bytes of each side file."""
        return [data.stat().st_size if isinstance(data, Path) else len(data) for data in self.side.values()]


@contextmanager
def _as_it_is(read: Read) -> Iterator[Read]:
    yield read


class Wrapped(Checkpoint):
    """Another checkpoint, read in another way: what its files are, and whether they change, it knows itself."""

    def __init__(self, checkpoint: Checkpoint, tensors: Table) -> None:
        self.step, self.label, self.source = checkpoint.step, checkpoint.label, checkpoint.source
        self.files, self.side, self.directory = checkpoint.files, checkpoint.side, checkpoint.directory
        self.cast, self.tensors, self.inner = checkpoint.cast, tensors, checkpoint

    def kept_open(self) -> AbstractContextManager[None]:
        """As the checkpoint does."""
        return self.inner.kept_open()

    def assert_unchanged(self) -> None:
        """As the checkpoint does."""
        self.inner.assert_unchanged()

    def not_stored(self) -> dict[str, int]:
        """What the checkpoint says."""
        return self.inner.not_stored()

    def record(self, name_of: Callable[[Path | bytes], str]) -> CheckpointRecord:
        """The checkpoint's own."""
        return self.inner.record(name_of)

    @property
    def nbytes(self) -> int:
        """The checkpoint's."""
        return self.inner.nbytes

    @property
    def fingerprints(self) -> tuple[tuple[str, int, int], ...]:
        """The checkpoint's."""
        return self.inner.fingerprints

    @property
    def scratch(self) -> int:
        """The checkpoint's."""
        return self.inner.scratch
