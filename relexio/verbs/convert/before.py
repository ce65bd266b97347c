"""Checks before a conversion begins, on a small part of the data: a step that is the base, a base that looks like another
model, and stored steps that have been written again."""

import os
from collections.abc import Iterable, Mapping
from itertools import accumulate, product
from pathlib import Path
from shlex import quote

import numpy as np

from relexio.checkpoints.layout import Source, open_checkpoint
from relexio.checkpoints.protocol import Checkpoint
from relexio.checkpoints.record import CheckpointRecord
from relexio.checkpoints.whole import weight_stamps
from relexio.dtypes import Kind, kind_of, nonfinite, tensor_bytes, to_float64
from relexio.errors import BaseItselfError, CheckpointError
from relexio.methods.line_tests import base_doubt
from relexio.store.schema import Block
from relexio.store.state import digest_of
from relexio.store.store import Store
from relexio.verbs.convert.base import StoredBase, as_stored
from relexio.verbs.convert.encode import read_bits, read_block

_PIECES = 128  # of each checkpoint, evenly spread over the elements of its float tensors
_PIECE = 1 << 14  # elements at most
_COMPARED = 1 << 20  # bytes at a time of a step that may be the base
_STEPS = 3  # the first one is held against the next that differs
_BLOCKS = 64  # of a step whose files have other times: one of each of the tensors that had changed most


def refuse_base_among(checkpoints: Iterable[Checkpoint], base: Checkpoint) -> None:
    """Raise CheckpointError if a step is the base: the same files, or the same bytes."""
    files = [os.path.realpath(file.path) for file in base.files]
    for checkpoint in checkpoints:
        same = bool(files) and files == [os.path.realpath(file.path) for file in checkpoint.files]
        if same or _same_bytes(checkpoint, base):
            raise BaseItselfError(
                f"{checkpoint.label}: is the base itself{'' if same else ' (bit for bit)'}; "
                f"leave step {checkpoint.step} out, as with --steps {(checkpoint.step or 0) + 1}:, or give another --base",
                checkpoint.step,
            )


def _same_bytes(checkpoint: Checkpoint, base: Checkpoint) -> bool:
    """Compare the beginning of each tensor, then the rest, up to the first difference: for any real step within some MB."""
    sizes = {name: tensor_bytes(*base.tensors[name]) for name in checkpoint.moved}
    for part in (slice(1), slice(1, None)):
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            for first in range(0, sizes[name], _COMPARED)[part]:
                count = min(_COMPARED, sizes[name] - first)
                one, other = bytearray(count), bytearray(count)
                checkpoint.read(name, first, memoryview(one))
                base.read(name, first, memoryview(other))
                if one != other:
                    return False
    return True


def doubt_of_base(base: Checkpoint, checkpoints: tuple[Checkpoint, ...]) -> str | None:
    """Why the base does not look like the model that training began from, by a sample of a few MB; None without a reason.

    Raises CheckpointError for a file that ends early.
    """
    sample = sorted(checkpoints, key=lambda checkpoint: checkpoint.step or 0)[:_STEPS]
    if len(sample) < 2:
        return None
    gram, read, pieces = np.zeros((len(sample), len(sample))), (base, *sample), _spread(base)
    for (name, kind, first, count), checkpoint in product(pieces, read):
        with checkpoint.held(name, first * kind.itemsize, count * kind.itemsize):
            pass  # all are read ahead: a disk that answers late would answer five hundred times
    for name, kind, first, count in pieces:
        bits = np.stack([read_bits(checkpoint, name, kind, first, count) for checkpoint in read])
        values = to_float64(bits[:, ~nonfinite(bits, kind).any(axis=0)], kind)
        deltas = values[1:] - values[0]
        gram += np.einsum("in,jn->ij", deltas, deltas)  # without BLAS, whose threads take memory that nobody planned
    return base_doubt(gram, np.array([checkpoint.step for checkpoint in sample]))


def _spread(base: Checkpoint) -> list[tuple[str, Kind, int, int]]:
    """Pieces of float tensors: name, kind, first element, count."""
    bits = {name: (kind_of(dtype), tensor_bytes(dtype, shape)) for name, (dtype, shape) in base.tensors.items()}
    floats = [(name, kind, size // kind.itemsize) for name, (kind, size) in bits.items() if kind.is_float and size]
    ends = list(accumulate(size for _, _, size in floats))
    pieces = {}
    for number in range(_PIECES if floats else 0):
        middle = (2 * number + 1) * ends[-1] // (2 * _PIECES)
        at = int(np.searchsorted(ends, middle, side="right"))
        name, kind, size = floats[at]
        count = min(_PIECE, size)
        pieces[name, min(middle - (ends[at] - size), size - count)] = kind, count
    return [(name, kind, first, count) for (name, first), (kind, count) in pieces.items()]


def written_again(
    store: Store, sources: Mapping[int, Source], root: Path | None, single: Mapping[int, Source]
) -> str | None:
    """A note on stored steps whose files have changed since they were stored; None if there are none.

    Names, sizes and times of files are compared. Where only times differ, as in a copy of a run, so are hashes of some
    blocks. A checkpoint that is no longer complete, or cannot be read, is not compared.
    """
    again, base = [], StoredBase(store)
    for segment in store.segments:
        records = store.checkpoints(segment) if any(step in sources for step in segment.steps) else {}
        again += [s for s, record in records.items() if s in sources and _is_other(store, base, record, sources[s])]
    if not again:
        return None
    named = ", ".join(map(str, sorted(again)[:6])) + (f" and {len(again) - 6} more" if len(again) > 6 else "")
    steps, have, they, one = (
        ("steps", "have", "they were", "ones") if len(again) > 1 else ("step", "has", "it was", "one")
    )
    later = [step for step in store.steps if step >= min(again)]
    which = f"{min(again)}:" if later == sorted(again) and len(later) > 1 else ",".join(map(str, sorted(again)))
    others = [f"--checkpoint {step}={quote(str(single[step]))}" for step in sorted(again) if step in single]
    where = " ".join([*([quote(str(root))] if root else []), *others])
    return (
        f"{steps} {named} {have} been written again since {they} stored: the store has the old {one}; to have the new {one}: "
        f"relexio convert {where} -o {quote(store.shown)} --replace {which}"
    )


def _is_other(store: Store, base: StoredBase, record: CheckpointRecord, source: Source) -> bool:
    """Whether a source is another checkpoint than the one that was stored for its step."""
    try:
        if isinstance(source, Path) and not record.changed_in(weight_stamps(source)):
            return False
        checkpoint = open_checkpoint(source, record.step)
    except (CheckpointError, OSError):
        return False
    now, then = checkpoint.fingerprints, record.fingerprints
    if now and then and (now == then or {stamp[:2] for stamp in now} != {stamp[:2] for stamp in then}):
        return now != then
    try:
        checkpoint = as_stored(checkpoint, base)
        return any(_differs(store, checkpoint, block) for block in _telling(store, record.step or 0))
    except CheckpointError:
        return True


def require_same(store: Store, checkpoint: Checkpoint, advice: str) -> None:
    """Raise CheckpointError, with the advice, unless a checkpoint has the very bits that are stored for its step."""
    for block in store.blocks:
        if _differs(store, checkpoint, block):
            raise CheckpointError(
                f"{checkpoint.label}: {block.names}: other bits than {store.shown} holds for this step; {advice}"
            )


def _telling(store: Store, step: int) -> list[Block]:
    """Blocks in which a step that was trained again would differ: the first of each tensor that had changed most."""
    changed = store.changed_counts((step,))[:, 0]
    most = [place for place in np.argsort(-changed, kind="stable") if changed[place]][:_BLOCKS]
    return list(dict.fromkeys(store.parts[store.tensors[place].name][0][0] for place in most))


def _differs(store: Store, checkpoint: Checkpoint, block: Block) -> bool:
    segment, column = store.find(checkpoint.step or 0)
    return digest_of(read_block(checkpoint, block)) != store.digests(segment.path, block)[column].tobytes()
