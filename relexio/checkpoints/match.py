"""Whether a checkpoint belongs to a base: the same tensors, shapes and dtypes, but for a head tied to its embedding.

Some trainers write such a head beside the embedding, others leave it out. Everything else sees the base's tensors.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from relexio.checkpoints.cast import Cast
from relexio.checkpoints.protocol import Checkpoint, Read, Wrapped
from relexio.dtypes import Table, can_cast
from relexio.errors import CheckpointError

HEAD = "lm_head.weight"
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
)
#: How names of tensors end where weights are packed: by bitsandbytes, GPTQ and AWQ, block-wise FP8, compressed-tensors, MXFP4.
_PACKED = (".absmax", ".qweight", "_scale_inv", ".weight_scale", ".weight_packed", "_blocks")
UNQUANTIZED = "the base is quantized: give the model that was quantized, with --base"


def is_quantized(names: Collection[str]) -> bool:
    """Whether a model of these tensors has packed weights."""
    return any(name.endswith(_PACKED) for name in names)


def embedding_of(names: Collection[str]) -> str | None:
    """The embedding among a checkpoint's tensors, which a head may be tied to."""
    return next((name for name in EMBEDDINGS if name in names), None)


def written_from(name: str, table: Table) -> str:
    """The tensor of the table that a tensor of a file is written from: a head that the table lacks, from its embedding."""
    return embedding_of(table) or name if name == HEAD and HEAD not in table else name


def match(checkpoint: Checkpoint, base: Table, label: str) -> Checkpoint:
    """The checkpoint with exactly the tensors of the base's table; ``label`` is how errors name the base.

    Floats of other types are rounded to the table's, to nearest even.

    A head that it lacks is read from its embedding. An extra head must equal the embedding bit for bit; this is checked
    whenever the embedding is read. Raises CheckpointError naming step, tensor, and what differs.
    """
    checkpoint = _cast(checkpoint, base)
    tensors = checkpoint.tensors
    extra = [name for name in tensors if name not in base]
    missing = [name for name in base if name not in tensors]
    embedding = embedding_of(base.keys() & tensors.keys())
    second = embedding is not None and extra == [HEAD] and tensors[HEAD] == tensors[embedding]
    absent = embedding is not None and missing == [HEAD] and base[HEAD] == base[embedding]
    extra, missing = [] if second else extra, [] if absent else missing
    if missing or extra:
        what, names = ("lacks tensors of", missing) if missing else ("has tensors that are not in", extra)
        advice = UNQUANTIZED if is_quantized(missing) else "all checkpoints of a trajectory hold the same tensors"
        raise CheckpointError(
            f"{checkpoint.label}: {what} {label}: {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; {advice}"
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


def _cast(checkpoint: Checkpoint, base: Table) -> Checkpoint:
    """The checkpoint with the float types of the table, where its own are others."""
    types = {}
    for name, (dtype, _) in checkpoint.tensors.items():
        wanted = base.get(written_from(name, base), (dtype,))[0]
        types[name] = wanted if can_cast(dtype, wanted) else dtype
    tensors = {name: (types[name], shape) for name, (_, shape) in checkpoint.tensors.items()}
    return checkpoint if tensors == checkpoint.tensors else Cast(checkpoint, tensors)


class _Tied(Wrapped):
    """A checkpoint whose head is its embedding: absent from its files, or there a ``second`` time."""

    def __init__(self, checkpoint: Checkpoint, tensors: Table, embedding: str, second: bool) -> None:
        super().__init__(checkpoint, tensors)
        self._embedding, self._second = embedding, second

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """As the checkpoint does; both copies of an embedding that it holds twice."""
        with ExitStack() as stack:
            own = self._embedding if name == HEAD else name
            read = stack.enter_context(self.inner.held(own, first_byte, nbytes))
            if self._second and name == self._embedding:
                head = stack.enter_context(self.inner.held(HEAD, first_byte, nbytes))
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
