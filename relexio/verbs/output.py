"""Checkpoints being written: staged, streamed into block by block, validated, and given their names."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relexio import atomic
from relexio.checkpoints import write
from relexio.checkpoints.record import CheckpointRecord
from relexio.checkpoints.write import Output, OutputFile
from relexio.errors import ExistsError, RequestError, StorageError
from relexio.store.schema import Block
from relexio.store.storage import METADATA
from relexio.store.store import Store
from relexio.words import show


@dataclass(frozen=True)
class Target:
    """One checkpoint to be written: the step, None for a mix, which has none, and the directory."""

    step: int | None
    out: Path

    @property
    def name(self) -> str:
        """What it is: the number of its step, or that it is a mix."""
        return "mix" if self.step is None else str(self.step)


@dataclass(frozen=True)
class Sink:
    """Puts a block's results into the checkpoints being written, one for each target."""

    outputs: tuple[Output, ...]

    def __call__(self, block: Block, target: int, bits: np.ndarray) -> None:
        """Write one block of one target at its place."""
        data, itemsize = np.ascontiguousarray(bits), block.kind.itemsize
        for piece in block.pieces:
            part = data[piece.span].data.cast("B")
            self.outputs[target].write(piece.tensor.name, piece.start * itemsize, part)


def check_targets(store: Store, targets: list[Target]) -> None:
    """Raise ExistsError, RequestError or StorageError where the outputs cannot be written: taken, twice, or no room."""
    if len({target.step for target in targets}) != len(targets):
        raise RequestError("a step is given twice")
    if len({target.out.resolve() for target in targets}) != len(targets):
        raise RequestError("two predictions would have one name; put {step} into -o, as in -o 'pred/step-{step}'")
    for target in targets:
        if target.out.exists():
            raise ExistsError(f"{target.out}: exists; give another -o")
        parent = atomic.existing_parent(target.out)
        if not os.access(parent, os.W_OK):
            raise StorageError(f"{parent}: no permission to write there; give another -o")
    needed = bytes_of(store) * len(targets)
    free = atomic.free_bytes(targets[0].out)
    if needed > free:
        raise StorageError(
            f"{targets[0].out.parent}: {show(needed)} needed, but only {show(free)} free; free space, or give another -o"
        )


def bytes_of(store: Store) -> int:
    """Bytes of the weights of one checkpoint."""
    return store.base().nbytes(store.table)


def needed_files(store: Store, outputs: list[Output], files: list[OutputFile]) -> list[Path]:
    """The files that whoever does the work must see: the store's marker, and the checkpoints begun."""
    return [*store.files(METADATA), *(Path(output.directory, file.name) for output in outputs for file in files)]


def output_files(store: Store, record: CheckpointRecord, loadable: bool = False) -> list[OutputFile]:
    """The weights' files of a stored checkpoint, to be written. Raises StoreError where one does not fit the tensor table."""
    return write.output_files(record, store.table, store.file, store.shown, loadable)


@contextmanager
def staged(targets: list[Target], files: list[OutputFile]) -> Iterator[list[Output]]:
    """Staging directories with all files at full size; validated and renamed at the end, removed after an error."""
    with ExitStack() as stack:
        outputs, staged = [], []
        for target in targets:
            directory = atomic.staging(target.out)
            stack.enter_context(atomic.storage_errors(target.out))
            directory.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic.locked(directory, make=True))
            stack.enter_context(_removed_after_error(directory))
            if target.out.exists():  # another process has ended since ours looked
                raise ExistsError(f"{target.out} was created by something else meanwhile; give another -o")
            atomic.empty_tree(directory)
            outputs.append(write.begin(directory, files))
            staged.append(directory)
        yield outputs
        for target, directory in zip(targets, staged, strict=True):
            write.validate(directory, files)
            atomic.publish(directory, target.out)


@contextmanager
def _removed_after_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # also Ctrl-C: a half-written prediction is of no use to the next run
        atomic.remove_tree(directory)
        raise


def side_files(store: Store, files: Mapping[str, str]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Stored files by name, with their bytes, given the arrays that hold them by name."""
    return ((name, store.pieces(array)) for name, array in files.items())
