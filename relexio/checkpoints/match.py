"""Whether a checkpoint belongs to a base: the same tensors, shapes and dtypes, but for a head tied to its embedding.

Some trainers write such a head beside the embedding, others leave it out. Everything else sees the base's tensors.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from relexio.checkpoints.protocol import Checkpoint, Read
from relexio.checkpoints.record import CheckpointRecord
from relexio.dtypes import Table
from relexio.errors import CheckpointError

HEAD = "lm_head.weight"
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
)


def embedding_of(names: Collection[str]) -> str | None:
    """The embedding among a checkpoint's tensors, which a head may be tied to."""
    return next((name for name in EMBEDDINGS if name in names), None)


def written_from(name: str, table: Table) -> str:
    """The tensor of the table that a tensor of a file is written from: a head that the table lacks, from its embedding."""
    return embedding_of(table) or name if name == HEAD and HEAD not in table else name


def match(checkpoint: Checkpoint, base: Table, label: str) -> Checkpoint:
    """The checkpoint with exactly the tensors of the base's table; ``label`` is how errors name the base.

    A head that it lacks is read from its embedding. An extra head must equal the embedding bit for bit; this is checked
    whenever the embedding is read. Raises CheckpointError naming step, tensor, and what differs.
    """
    tensors = checkpoint.tensors
    extra = [name for name in tensors if name not in base]
    missing = [name for name in base if name not in tensors]
    embedding = embedding_of(base.keys() & tensors.keys())
    second = embedding is not None and extra == [HEAD] and tensors[HEAD] == tensors[embedding]
    absent = embedding is not None and missing == [HEAD] and base[HEAD] == base[embedding]
    extra, missing = [] if second else extra, [] if absent else missing
    if missing or extra:
        what, names = ("lacks tensors of", missing) if missing else ("has tensors that are not in", extra)
        raise CheckpointError(
            f"{checkpoint.label}: {what} {label}: {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; all checkpoints of a trajectory hold the same tensors"
        )
    for name, (dtype, shape) in base.items():
        own_dtype, own_shape = tensors[embedding if absent and embedding and name == HEAD else name]
        if own_shape != shape:
            raise CheckpointError(
                f"{checkpoint.label}: tensor {name}: shape {list(own_shape)}, in {label} {list(shape)}; "
                f"is this the base that training began from?"
            )
        if own_dtype != dtype:
            raise CheckpointError(
                f"{checkpoint.label}: tensor {name}: dtype {own_dtype}, in {label} {dtype}; "
                f"save the base and all steps in one dtype"
            )
    return _Tied(checkpoint, base, embedding, second) if embedding and (second or absent) else checkpoint


class _Tied(Checkpoint):
    """A checkpoint whose head is its embedding: absent from its files, or there a ``second`` time."""

    def __init__(self, checkpoint: Checkpoint, tensors: Table, embedding: str, second: bool) -> None:
        self.step, self.label, self.source = checkpoint.step, checkpoint.label, checkpoint.source
        self.files, self.side, self.directory = checkpoint.files, checkpoint.side, checkpoint.directory
        self.tensors = tensors
        self._checkpoint, self._embedding, self._second = checkpoint, embedding, second

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """As the checkpoint does; both copies of an embedding that it holds twice."""
        with ExitStack() as stack:
            own = self._embedding if name == HEAD else name
            read = stack.enter_context(self._checkpoint.held(own, first_byte, nbytes))
            if self._second and name == self._embedding:
                head = stack.enter_context(self._checkpoint.held(HEAD, first_byte, nbytes))
                yield self._both(read, head)
            else:
                yield read

    def _both(self, read: Read, head: Read) -> Read:
        def read_both(first_byte: int, out: memoryview) -> None:
            copy = bytearray(len(out))
            read(first_byte, out)
            head(first_byte, memoryview(copy))
            if copy != out:
                raise CheckpointError(
                    f"{self.label}: its {HEAD} differs from {self._embedding}, and the base has no head of its own; "
                    f"save the base with its {HEAD}"
                )

        return read_both

    def kept_open(self) -> AbstractContextManager[None]:
        """As the checkpoint does."""
        return self._checkpoint.kept_open()

    def assert_unchanged(self) -> None:
        """As the checkpoint does."""
        self._checkpoint.assert_unchanged()

    def not_stored(self) -> dict[str, int]:
        """What the checkpoint says."""
        return self._checkpoint.not_stored()

    def record(self, name_of: Callable[[Path | bytes], str]) -> CheckpointRecord:
        """The checkpoint's own: it comes back as it was."""
        return self._checkpoint.record(name_of)
