"""What a trajectory store says about itself: records, and their JSON in Zarr attributes."""

import re
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from relexio.checkpoints.record import is_count, is_text, require
from relexio.dtypes import BITS, KINDS, Kind, Table, kind_of, tensor_bytes
from relexio.errors import StoreError

FORMAT = 3
#: Elements of a block: of large models, and of small ones.
BLOCK, SMALLEST_BLOCK = 1 << 20, 1 << 16
#: A model has as many blocks of each kind, if they are not smaller than that: enough for many workers.
_BLOCKS = 16
#: Tensors that share a block at most: each has a Gram matrix of its own, held at once.
PIECES = 64
#: Elements of one chunk of the base: the padding of a block is never longer.
BASE_CHUNK = 1 << 17
#: Bytes of a block's digest.
DIGEST = 16
#: Entries of moves that one chunk holds at most: enough for a large read, little enough to be held by every worker.
MOVES_CHUNK = 1 << 18
#: Entries of one chunk of what a segment says about its blocks: 1 MiB.
SMALL_CHUNK = 1 << 20
#: Steps of a trajectory: its rows are numbered in 16 bits.
MOST_STEPS = (1 << 16) - 1
#: Segments that a trajectory ever had: their names are numbers of eight digits at most.
MOST_NAMES = 10**8
#: Blocks of one kind: 4 T elements. A store that says it has more is a lie that would only fill the memory.
MOST_BLOCKS = 1 << 22
#: Bytes of a stored file that are one chunk.
FILE_CHUNK = 16 << 20
_MOST_DIMENSIONS, _MOST_CHUNK = 64, (1 << 31) - 1  # as in safetensors; Blosc's limit
_NODE = re.compile(r"[0-9A-Za-z_]{1,64}(/[0-9A-Za-z_]{1,64}){0,7}")
_CODECS = ["bytes", "blosc", "crc32c"]
_TYPES = ("uint8", "uint16", "uint32", "uint64", "int64", "float64")

Json = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What a block holds of one tensor: ``size`` elements, from ``start`` in the tensor and ``first`` in the block."""

    tensor: "Tensor"
    start: int
    size: int
    first: int

    @property
    def span(self) -> slice:
        """Its elements in the block."""
        return slice(self.first, self.first + self.size)


@dataclass(frozen=True)
class Block:
    """A run of elements of one kind, of one tensor or of several: the unit of work. ``index`` counts blocks of the kind."""

    kind: Kind
    index: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Elements, up to the end of its last tensor."""
        return self.pieces[-1].span.stop

    @property
    def names(self) -> str:
        """Its tensors, for messages."""
        more = f" (or one of the {len(self.pieces) - 1} behind it)" if len(self.pieces) > 1 else ""
        return f"tensor {self.pieces[0].tensor.name}{more}"


@dataclass(frozen=True)
class Tensor:
    """One tensor of the base: dtype in safetensors' words, and its first element among those of its kind."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int

    @classmethod
    def from_json(cls, value: Json) -> "Tensor":
        """From Zarr attributes. Raises ValueError for anything that a writer would not write."""
        tensor = cls(value["name"], value["dtype"], tuple(value["shape"]), value["first"])
        require(is_text(tensor.name) and tensor.dtype in BITS, "a tensor has a name and a known dtype")
        require(len(tensor.shape) <= _MOST_DIMENSIONS, f"a shape has at most {_MOST_DIMENSIONS} dimensions")
        require(all(map(is_count, (*tensor.shape, tensor.first))), "a shape is a list of sizes")
        return tensor

    @property
    def kind(self) -> Kind:
        """How its elements are stored."""
        return kind_of(self.dtype)

    @property
    def size(self) -> int:
        """Stored elements d: numbers for floats that can be fitted, bytes for everything else."""
        return prod(self.shape) if self.kind.is_float else self.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in a checkpoint."""
        return tensor_bytes(self.dtype, self.shape)


def lay_out(table: Table, block: int) -> tuple[Tensor, ...]:
    """Put the elements of each kind one after the other, tensor by tensor; a block has parts of PIECES tensors at most."""
    ends, sharing = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    tensors = []
    for name, (dtype, shape) in table.items():
        kind = kind_of(dtype).name
        if sharing[kind] == PIECES:
            ends[kind], sharing[kind] = -(-ends[kind] // block) * block, 0
        tensor = Tensor(name, dtype, shape, ends[kind])
        if tensor.size:
            ends[kind] += tensor.size
            new_block = (tensor.first % block) + tensor.size > block
            sharing[kind] = (1 if new_block else sharing[kind] + 1) if ends[kind] % block else 0
        tensors.append(tensor)
    return tuple(tensors)


def blocks_of(tensors: tuple[Tensor, ...], block: int) -> tuple[Block, ...]:
    """The blocks of ``block`` elements that tensors lie in, kind by kind, by index."""
    pieces: dict[tuple[str, int], list[Piece]] = {}
    for tensor in tensors:
        start = 0
        while start < tensor.size:
            index, first = divmod(tensor.first + start, block)
            piece = Piece(tensor, start, min(block - first, tensor.size - start), first)
            pieces.setdefault((tensor.kind.name, index), []).append(piece)
            start += piece.size
    order = {name: place for place, name in enumerate(KINDS)}
    keys = sorted(pieces, key=lambda key: (order[key[0]], key[1]))
    return tuple(Block(KINDS[kind], index, tuple(pieces[kind, index])) for kind, index in keys)


def count_blocks(tensors: tuple[Tensor, ...], block: int) -> dict[str, int]:
    """The number of blocks of every kind that has any."""
    ends = {name: max((t.first + t.size for t in tensors if t.kind.name == name), default=0) for name in KINDS}
    return {name: -(-end // block) for name, end in ends.items() if end}


def block_elements(most: int) -> int:
    """Elements of a block, a power of two, for a model that has ``most`` elements of one kind."""
    return min(BLOCK, max(SMALLEST_BLOCK, 1 << max((most // _BLOCKS).bit_length() - 1, 0)))


def moves_room(block: int, columns: int) -> int:
    """Room for the moves of one block in a segment's arrays: one for every element and step, K rounded up to 2^k."""
    return block << (columns - 1).bit_length()


def moves_chunk(block: int, columns: int) -> int:
    """Moves in one chunk: a power of two, so that no chunk holds moves of two blocks."""
    return min(MOVES_CHUNK, moves_room(block, columns))


@dataclass(frozen=True)
class Segment:
    """Some steps of the chain of states, each stored as moves from the one before; the first from the last of the segment before.

    ``content`` holds a hash of each state, ``metadata`` one of the ``zarr.json`` of each group and array and of each chunk
    of what is small, by path.
    """

    name: str
    steps: tuple[int, ...]
    content: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Its Zarr path."""
        return f"segments/{self.name}"

    @property
    def columns(self) -> int:
        """How many steps it has: K."""
        return len(self.steps)

    @classmethod
    def from_json(cls, value: Json) -> "Segment":
        """From Zarr attributes. Raises ValueError for anything that a writer would not write."""
        name, steps, content = value["name"], tuple(value["steps"]), tuple(value["content"])
        require(isinstance(name, str) and re.fullmatch(r"\d{4,8}", name), "a segment's name is a number")
        require(steps and all(map(is_count, steps)), "a segment has steps, and they are numbers")
        require([type(text) for text in content] == [str] * len(steps), "every step has a content hash")
        return cls(name, steps, content, hashes_from_json(value["metadata"]))


def segments_from_json(values: list[Json]) -> tuple[Segment, ...]:
    """The segments of a store. Raises ValueError for anything that a writer would not write."""
    segments = tuple(map(Segment.from_json, values))
    steps = [step for segment in segments for step in segment.steps]
    names = [segment.name for segment in segments]
    require(len({*names}) == len(names), "segments have names of their own")
    require(len({*steps}) == len(steps), "no step is stored twice")
    require(len(steps) <= MOST_STEPS, f"there are at most {MOST_STEPS} steps")
    return segments


def tensors_from_json(values: list[Json], block: int) -> tuple[Tensor, ...]:
    """The tensor table of a store. Raises ValueError for anything that a writer would not write."""
    tensors = tuple(map(Tensor.from_json, values))
    table = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    require(len(table) == len(tensors), "no two tensors have one name")
    ends = [tensor.first + tensor.size for tensor in tensors]
    require(max(ends, default=0) <= MOST_BLOCKS * block, "no model has so many blocks")
    require(lay_out(table, block) == tensors, "tensors lie one after the other")
    return tensors


def block_from_json(value: Any) -> int:
    """The elements of a block. Raises ValueError for anything that a writer would not write."""
    require(
        is_count(value) and 0 < value <= BLOCK and not value & (value - 1), f"a power of two up to {BLOCK} is a block"
    )
    return int(value)


def hashes_from_json(value: Any) -> dict[str, str]:
    """A table of hashes. Raises ValueError for anything that a writer would not write."""
    require(isinstance(value, dict) and all(isinstance(text, str) for text in value.values()), "hashes are texts")
    require(all(map(_NODE.fullmatch, value)), "hashes are of groups and arrays of the store")
    return dict(value)


@dataclass(frozen=True)
class Layout:
    """How an array is stored: its shape, the shape of its chunks, its type, and what its dimensions are called."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_json(cls, value: Json) -> "Layout":
        """From an array's ``zarr.json``. Raises ValueError for anything that a writer would not write."""
        shape, chunks = tuple(value["shape"]), tuple(value["chunk_grid"]["configuration"]["chunk_shape"])
        require(value["node_type"] == "array", "it is an array")
        require(value["data_type"] in _TYPES, f"the data type is one of {', '.join(_TYPES)}")
        require([codec["name"] for codec in value["codecs"]] == _CODECS, f"codecs are {', '.join(_CODECS)}")
        require(all(map(is_count, (*shape, *chunks))) and len(shape) == len(chunks) > 0, "a shape is a list of sizes")
        dtype = np.dtype(value["data_type"]).newbyteorder("<")
        require(0 < prod(chunks) * dtype.itemsize <= _MOST_CHUNK, "a chunk has room for something")
        return cls(shape, chunks, dtype)


def check_format(attributes: Json, address: str) -> Json:
    """The store's own record. Raises StoreError if this is no trajectory, or one of a newer format."""
    record = attributes.get("relexio")
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise StoreError(f"{address}: a Zarr group, but not a relexio trajectory")
    if record["format"] < FORMAT:
        raise StoreError(
            f"{address}: has store format {record['format']} written by an early relexio; convert the run again"
        )
    if record["format"] > FORMAT:
        raise StoreError(
            f"{address}: has store format {record['format']}, but this relexio reads {FORMAT}; upgrade relexio"
        )
    return record
