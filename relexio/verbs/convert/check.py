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
    """One checkpoint as the base's tensors see it.

    ``stand_ins`` names the tensor that is read for one that the checkpoint lacks, ``copies`` one that it has besides and
    that must equal another: a head tied to its embedding, in both.
    """

    checkpoint: Checkpoint
    stand_ins: dict[str, str]
    copies: dict[str, str]

    def places(self, name: str) -> list[Location]:
        """Where a tensor of the base stands in this checkpoint: first where it is read, then where copies are."""
        names = [self.stand_ins.get(name, name), *([self.copies[name]] if name in self.copies else [])]
        return [self.checkpoint.location(held) for held in names]


def fit_to_base(checkpoint: Checkpoint, base: Table, label: str) -> Source:
    """Check one checkpoint's headers against the base's {name: (dtype, shape)}.

    Raises CheckpointError naming step, tensor, and what differs.
    """
    stand_ins: dict[str, str] = {}
    copies: dict[str, str] = {}
    extra = [name for name in checkpoint.entries if name not in base]
    missing = [name for name in base if name not in checkpoint.entries]
    embedding = next((name for name in EMBEDDINGS if name in checkpoint.entries and name in base), None)
    if embedding and extra == [HEAD] and _alike(checkpoint, HEAD, embedding):
        copies[embedding] = HEAD  # tied, and written twice: the bytes must be the same
        extra = []
    if embedding and missing == [HEAD] and base[HEAD] == base[embedding]:
        stand_ins[HEAD] = embedding  # tied, and written once
        missing = []
    if missing or extra:
        what, names = ("lacks", missing) if missing else ("has more tensors:", extra)
        raise CheckpointError(
            f"{checkpoint.label}: {what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} "
            f"than {label}; all checkpoints of a trajectory hold the same tensors"
        )
    for name, (dtype, shape) in base.items():
        entry = checkpoint.entries[stand_ins.get(name, name)]
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
    return Source(checkpoint, stand_ins, copies)


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
                f"leave step {step} out, as with --steps {(step or 0) + 1}:, or give another --base"
            )


def _same_bytes(source: Source, base: Source) -> bool:
    """Compare tensor by tensor, stopping at the first difference: for any real step that is within a few MB."""
    for entry in sorted(base.checkpoint.entries.values(), key=lambda e: -e.nbytes):
        ours, theirs = base.places(entry.name)[0], source.places(entry.name)[0]
        with open(ours.path, "rb") as a, open(theirs.path, "rb") as b:
            for at in range(0, entry.nbytes, _PIECE):
                count = min(_PIECE, entry.nbytes - at)
                one, other = bytearray(count), bytearray(count)
                read_exactly(a.fileno(), ours.start + at, memoryview(one), ours.path)
                read_exactly(b.fileno(), theirs.start + at, memoryview(other), theirs.path)
                if one != other:
                    return False
    return True
