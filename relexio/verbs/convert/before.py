"""What is worth knowing before a conversion begins, and is seen in a small part of the data: a base that looks like another
model, and stored steps that have been written again."""

from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import numpy as np

from relexio.checkpoints.read import open_checkpoint, read_exactly
from relexio.dtypes import kind_of, nonfinite, to_float64
from relexio.errors import CheckpointError
from relexio.methods.line_tests import base_doubt
from relexio.store.schema import Block, StoredCheckpoint
from relexio.store.state import digest_of
from relexio.store.store import Store
from relexio.verbs.convert.check import Source, Table, fit_to_base
from relexio.verbs.convert.encode import Reader

_PIECES = 128  # of each checkpoint, evenly spread over the elements of its float tensors
_PIECE = 1 << 14  # elements at most
_STEPS = 3  # the first one is held against the next that differs
_BLOCKS = 64  # of a step whose files have other times: one of each of the tensors that had changed most


def doubt_of_base(base: Source, sources: tuple[Source, ...]) -> str | None:
    """Why the base does not look like the model that training began from, by a sample of a few MB; None without a reason.

    Raises CheckpointError for a file that ends early.
    """
    first = sources[:_STEPS]
    if len(first) < 2:
        return None
    gram = np.zeros((len(first), len(first)))
    for name, start, count in _spread(base):
        kind = kind_of(base.checkpoint.entries[name].dtype)
        bits = np.empty((1 + len(first), count), kind.bits)
        for row, source in zip(bits, (base, *first), strict=True):
            _read(source, name, start, row)
        values = to_float64(bits[:, ~nonfinite(bits, kind).any(axis=0)], kind)
        deltas = values[1:] - values[0]
        gram += np.einsum("in,jn->ij", deltas, deltas)  # without BLAS, whose threads take memory that nobody planned
    return base_doubt(gram, np.array([source.checkpoint.step for source in first]))


def _spread(base: Source) -> list[tuple[str, int, int]]:
    """Pieces of float tensors: name, first element, count."""
    floats = [entry for entry in base.checkpoint.entries.values() if kind_of(entry.dtype).is_float and entry.nbytes]
    sizes = [entry.nbytes // kind_of(entry.dtype).itemsize for entry in floats]
    ends = list(accumulate(sizes))
    found = {}
    for place in range(_PIECES if floats else 0):
        at = (2 * place + 1) * ends[-1] // (2 * _PIECES)
        which = int(np.searchsorted(ends, at, side="right"))
        count = min(_PIECE, sizes[which])
        start = min(at - (ends[which] - sizes[which]), sizes[which] - count)
        found[floats[which].name, start] = count
    return [(name, start, count) for (name, start), count in found.items()]


def _read(source: Source, name: str, start: int, row: np.ndarray) -> None:
    where = source.places(name)[0]
    with open(where.path, "rb") as file:
        read_exactly(file.fileno(), where.start + start * row.itemsize, memoryview(row).cast("B"), where.path)


def written_again(store: Store, found: dict[int, Path], table: Table) -> str | None:
    """A note on the stored steps whose files are others now than when they were stored; None if there are none.

    Names, sizes and times of files are compared. Where only times differ, as in a copy of a run, so are hashes of some
    blocks. A checkpoint that is not whole any more, or cannot be read, says nothing.
    """
    again = []
    for group in store.groups:
        records = store.checkpoints(group) if any(step in found for step in group.steps) else {}
        again += [s for s, record in records.items() if s in found and _other(store, record, found[s], table)]
    if not again:
        return None
    named = ", ".join(map(str, sorted(again)[:6])) + (f" and {len(again) - 6} more" if len(again) > 6 else "")
    steps, have, they, one = (
        ("steps", "have", "they were", "ones") if len(again) > 1 else ("step", "has", "it was", "one")
    )
    return (
        f"{steps} {named} {have} been written again since {they} stored: the store has the old {one}; to have the new {one}, "
        f"convert into another trajectory, with another -o and --base"
    )


def _other(store: Store, record: StoredCheckpoint, path: Path, table: Table) -> bool:
    """Whether a directory holds another checkpoint than the one that was stored for its step."""
    try:
        if _stamps(record, path) == [(shard.size, shard.mtime_ns) for shard in record.shards]:
            return False
        checkpoint = open_checkpoint(path, record.step)
    except (CheckpointError, OSError):
        return False
    if {(s.path.name, s.size) for s in checkpoint.shards} != {(s.name, s.size) for s in record.shards}:
        return True
    try:
        source = fit_to_base(checkpoint, table, store.address)
        return any(_differs(store, source, block) for block in _telling(store, record.step or 0))
    except CheckpointError:
        return True


def _stamps(record: StoredCheckpoint, path: Path) -> list[tuple[int, int]]:
    try:
        stats = [(path / shard.name).stat() for shard in record.shards]
    except FileNotFoundError:
        return []
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _telling(store: Store, step: int) -> list[Block]:
    """Blocks in which a step that was trained again would differ: the first of each tensor that had changed most."""
    group, column = store.find(step)
    changed = store.changed(group)[:, column]
    most = [place for place in np.argsort(-changed, kind="stable") if changed[place]][:_BLOCKS]
    return [store.blocks(store.tensors[place])[0] for place in most]


def _differs(store: Store, source: Source, block: Block) -> bool:
    group, column = store.find(source.checkpoint.step or 0)
    bits = np.empty(block.size, block.kind.bits)
    with ExitStack() as stack:
        Reader(source, block, stack).read(0, bits)
    return digest_of(bits) != store.digests(group.path, block)[column].tobytes()
