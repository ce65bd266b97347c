"""Whether checkpoints belong to one trajectory: the same tensors, shapes and dtypes as the base. Headers only, but for
the question whether a step is the base itself."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from relexio.checkpoints.read import EMBEDDINGS, HEAD, Checkpoint, Location, read_exactly
from relexio.errors import CheckpointError

_PIECE = 1 << 20

#: {tensor name: (dtype, shape)} in file order.
Table = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Source:
    """One checkpoint as the base's tensors see it: where each stands, and copies that must equal another tensor."""

    checkpoint: Checkpoint
    locations: dict[str, Location]
    copies: dict[str, Location]


def fit_to_base(checkpoint: Checkpoint, base: Table, label: str) -> Source:
    """Check one checkpoint's headers against the base's {name: (dtype, shape)}.

    Raises CheckpointError naming step, tensor, and what differs.
    """
    locations, copies = dict(checkpoint.locations), {}
    extra = [name for name in checkpoint.entries if name not in base]
    missing = [name for name in base if name not in checkpoint.entries]
    embedding = next((name for name in EMBEDDINGS if name in checkpoint.entries and name in base), None)
    if embedding and extra == [HEAD] and _alike(checkpoint, HEAD, embedding):
        copies[embedding] = locations.pop(HEAD)  # tied, and written twice: the bytes must be the same
        extra = []
    if embedding and missing == [HEAD] and base[HEAD] == base[embedding]:
        locations[HEAD] = locations[embedding]  # tied, and written once
        missing = []
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has besides", extra)
        raise CheckpointError(
            f"{checkpoint.label}: {what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} "
            f"compared with {label}; all checkpoints of a trajectory hold the same tensors"
        )
    for name, (dtype, shape) in base.items():
        entry = checkpoint.entries.get(name) or checkpoint.entries[embedding or name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{checkpoint.label}: tensor {name}: shape {list(entry.shape)}, in {label} {list(shape)}; "
                f"is this the base that training began from?"
            )
        if entry.dtype != dtype:
            raise CheckpointError(
                f"{checkpoint.label}: tensor {name}: dtype {entry.dtype}, in {label} {dtype}; "
                f"save the base and all steps in one dtype"
            )
    return Source(checkpoint, locations, copies)


def _alike(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.entries[one], checkpoint.entries[other]
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def refuse_base_among(sources: Iterable[Source], base: Source) -> None:
    """Raise CheckpointError if a step is the base: the same directory, the same files, or the same bytes."""
    for source in sources:
        step = source.checkpoint.step
        same = os.path.realpath(source.checkpoint.path) == os.path.realpath(base.checkpoint.path)
        if same or _same_bytes(source, base):
            raise CheckpointError(
                f"{source.checkpoint.label}: is the base itself{'' if same else ' (bit for bit)'}; "
                f"leave step {step} out with --steps, or give another --base"
            )


def _same_bytes(source: Source, base: Source) -> bool:
    """Compare tensor by tensor, stopping at the first difference: for any real step that is within a few MB."""
    for entry in sorted(base.checkpoint.entries.values(), key=lambda e: -e.nbytes):
        ours, theirs = base.locations[entry.name], source.locations[entry.name]
        with open(ours.path, "rb") as a, open(theirs.path, "rb") as b:
            for at in range(0, entry.nbytes, _PIECE):
                count = min(_PIECE, entry.nbytes - at)
                one, other = bytearray(count), bytearray(count)
                read_exactly(a.fileno(), ours.start + at, memoryview(one), ours.path)
                read_exactly(b.fileno(), theirs.start + at, memoryview(other), theirs.path)
                if one != other:
                    return False
    return True
