"""Checkpoints being written: staged, streamed into block by block, validated, and given their names."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relexio import atomic
from relexio.checkpoints.header import parse_header
from relexio.checkpoints.read import EMBEDDINGS, HEAD, INDEX
from relexio.checkpoints.write import Output, OutputShard, begin, validate
from relexio.errors import ExistsError, RequestError, StorageError, StoreError
from relexio.store.schema import Block, StoredCheckpoint
from relexio.store.storage import METADATA
from relexio.store.store import Store
from relexio.words import show


@dataclass(frozen=True)
class Target:
    """One checkpoint to be written: the step and the directory."""

    step: int
    out: Path


@dataclass(frozen=True)
class Sink:
    """Puts a block's results into the checkpoints being written, one for each target."""

    outputs: tuple[Output, ...]

    def __call__(self, block: Block, target: int, bits: np.ndarray) -> None:
        """Write one block of one target at its place."""
        data = memoryview(np.ascontiguousarray(bits)).cast("B")
        self.outputs[target].write(block.tensor.name, block.start * block.kind.itemsize, data)


def check_targets(store: Store, targets: list[Target]) -> None:
    """Raise ExistsError, RequestError or StorageError where the outputs cannot be written: taken, twice, or no room."""
    if len({target.step for target in targets}) != len(targets):
        raise RequestError("a step is given twice")
    if len({target.out.resolve() for target in targets}) != len(targets):
        raise RequestError("two predictions with one name; put {step} into -o, as in -o 'pred/step-{step}'")
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
            f"{targets[0].out.parent}: {show(needed)} are needed and {show(free)} free; free space, or give another -o"
        )


def bytes_of(store: Store) -> int:
    """Bytes of the shards of one checkpoint."""
    return sum(shard.size for shard in store.base().shards)


def needed_files(store: Store, outputs: list[Output], shards: list[OutputShard]) -> list[Path]:
    """The files that whoever does the work must see: the store's marker, and the checkpoints begun."""
    begun = [Path(output.directory, shard.name) for output in outputs for shard in shards]
    return [*store.files(METADATA), *begun]


def output_shards(store: Store, record: StoredCheckpoint, change: Callable[[bytes], bytes]) -> Iterator[OutputShard]:
    """The shards of a checkpoint, their headers changed. Raises StoreError where one does not fit the tensor table."""
    table = {tensor.name: (tensor.dtype, tensor.shape) for tensor in store.tensors}
    tied = {HEAD: next((name for name in EMBEDDINGS if name in table), "")}
    for shard in record.shards:
        if shard.name != Path(shard.name).name or shard.name in ("", ".", ".."):
            raise StoreError(f"{store.shown}: names a shard outside its directory: {shard.name!r}")
        header = store.file(shard.header)
        for entry in parse_header(header, shard.size, f"{store.shown}: {shard.header}"):
            # a tensor longer in the table than in its file would be written over the next one
            if (entry.dtype, entry.shape) != table.get(entry.name if entry.name in table else tied.get(entry.name, "")):
                raise StoreError(f"{store.shown}: {shard.header}: tensor {entry.name} is not as in the table; damaged")
        yield OutputShard(shard.name, change(header), shard.size - 8 - len(header))


@contextmanager
def staged(targets: list[Target], shards: list[OutputShard]) -> Iterator[list[Output]]:
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
                raise ExistsError(f"{target.out} has appeared meanwhile; give another -o")
            atomic.empty_tree(directory)
            outputs.append(begin(directory, shards))
            staged.append(directory)
        yield outputs
        for target, directory in zip(targets, staged, strict=True):
            validate(directory, shards)
            atomic.publish(directory, target.out)


@contextmanager
def _removed_after_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # also Ctrl-C: a half-written prediction is of no use to the next run
        atomic.remove_tree(directory)
        raise


def side_files(store: Store, record: StoredCheckpoint) -> Iterator[tuple[str, bytes | Iterator[bytes]]]:
    """The index and the side files of a checkpoint by name, with their bytes."""
    for name, array in record.side.items():
        yield name, store.pieces(array)
    if record.index is not None:
        yield INDEX, store.file(record.index)
