"""What a trajectory store says about itself: records, and their JSON in Zarr attributes."""

import re
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from relexio.checkpoints.record import is_count, is_text, require
from relexio.dtypes import BITS, KINDS, Kind, Table, kind_of, tensor_bytes
from relexio.errors import StoreError

FORMAT = 2
#: Elements of one block, for models whose largest tensor is at least that large.
BLOCK = 1 << 20
#: Elements of one chunk of the base: the padding of a tensor's last chunk is never longer.
BASE_CHUNK = 1 << 17
#: Bytes of a block's digest.
DIGEST = 16
#: Moves that one chunk holds at most: enough for a large read, little enough to be held by every worker.
MOVES_CHUNK = 1 << 18
#: Blocks of one kind: 4 T elements. A store that says it has more is a lie that would only fill the memory.
MOST_BLOCKS = 1 << 22
#: Bytes of a stored file that are one chunk.
FILE_CHUNK = 16 << 20
_MOST_DIMENSIONS, _MOST_CHUNK = 64, (1 << 31) - 1  # as in safetensors; Blosc's limit
_NODE = re.compile(r"[0-9A-Za-z_]{1,64}(/[0-9A-Za-z_]{1,64}){0,4}")
_CODECS = ["bytes", "blosc", "crc32c"]
_TYPES = ("uint8", "uint16", "uint32", "int64", "float64")

Json = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A run of elements of one tensor: the unit of work. ``index`` counts blocks of the tensor's kind."""

    tensor: "Tensor"
    index: int
    start: int
    size: int

    @property
    def kind(self) -> Kind:
        """How its elements are stored."""
        return self.tensor.kind


@dataclass(frozen=True)
class Tensor:
    """One tensor of the base: dtype in safetensors' words, and its first block among those of its kind."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first_block: int

    @classmethod
    def from_json(cls, value: Json) -> "Tensor":
        """From Zarr attributes. Raises ValueError for anything that a writer would not write."""
        tensor = cls(value["name"], value["dtype"], tuple(value["shape"]), value["first_block"])
        require(is_text(tensor.name) and tensor.dtype in BITS, "a tensor has a name and a known dtype")
        require(len(tensor.shape) <= _MOST_DIMENSIONS, f"a shape has at most {_MOST_DIMENSIONS} dimensions")
        require(all(map(is_count, (*tensor.shape, tensor.first_block))), "a shape is a list of sizes")
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

    def count(self, block: int) -> int:
        """How many blocks of ``block`` elements it has."""
        return -(-self.size // block)

    def blocks(self, block: int) -> list[Block]:
        """Its blocks of ``block`` elements, the last one shorter; none for an empty tensor."""
        return [
            Block(self, self.first_block + i, start, min(block, self.size - start))
            for i, start in enumerate(range(0, self.size, block))
        ]


def lay_out(table: Table, block: int) -> tuple[Tensor, ...]:
    """Give every tensor its blocks, one tensor after the other within each kind."""
    blocks = dict.fromkeys(KINDS, 0)
    tensors = []
    for name, (dtype, shape) in table.items():
        tensor = Tensor(name, dtype, shape, blocks[kind_of(dtype).name])
        blocks[tensor.kind.name] += tensor.count(block)
        tensors.append(tensor)
    return tuple(tensors)


def count_blocks(tensors: tuple[Tensor, ...], block: int) -> dict[str, int]:
    """The number of blocks of every kind that has any."""
    counts = {name: sum(t.count(block) for t in tensors if t.kind.name == name) for name in KINDS}
    return {name: count for name, count in counts.items() if count}


def block_elements(largest: int) -> int:
    """Elements of a block for a model whose largest tensor has ``largest``: a power of two, at most BLOCK."""
    return min(BLOCK, max(1024, 1 << max(largest - 1, 0).bit_length()))


def moves_room(block: int, steps: int) -> int:
    """Room for the moves of one block in a group's arrays: one for every element and step, K rounded up to 2^k."""
    return block << (max(steps, 1) - 1).bit_length()


def moves_chunk(block: int, steps: int) -> int:
    """Moves in one chunk: a power of two, so that no chunk holds moves of two blocks."""
    return min(MOVES_CHUNK, moves_room(block, steps))


def count_type(steps: int) -> str:
    """The smallest unsigned type (of Zarr's) that holds numbers up to K: of moves, and of columns."""
    return np.min_scalar_type(max(steps, 1)).str


@dataclass(frozen=True)
class Group:
    """The steps that one ``convert`` added, side by side in its arrays.

    ``content`` holds a hash for each step, ``metadata`` one for the ``zarr.json`` of each group and array, by path.
    """

    name: str
    steps: tuple[int, ...]
    content: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Its Zarr path."""
        return f"groups/{self.name}"

    @classmethod
    def from_json(cls, value: Json) -> "Group":
        """From Zarr attributes. Raises ValueError for anything that a writer would not write."""
        name, steps, content = value["name"], tuple(value["steps"]), tuple(value["content"])
        require(isinstance(name, str) and re.fullmatch(r"\d{4,8}", name), "a group's name is a number")
        require(steps and all(map(is_count, steps)), "a group has steps, and they are numbers")
        require(list(steps) == sorted({*steps}), "steps ascend")
        require([type(text) for text in content] == [str] * len(steps), "every step has a content hash")
        return cls(name, steps, content, hashes_from_json(value["metadata"]))


def groups_from_json(values: list[Json]) -> tuple[Group, ...]:
    """The groups of a store. Raises ValueError for anything that a writer would not write."""
    groups = tuple(map(Group.from_json, values))
    steps = [step for group in groups for step in group.steps]
    require(
        [group.name for group in groups] == [f"{i:04d}" for i in range(len(groups))], "groups are numbered in order"
    )
    require(len({*steps}) == len(steps), "no step is in two groups")
    return groups


def tensors_from_json(values: list[Json], block: int) -> tuple[Tensor, ...]:
    """The tensor table of a store. Raises ValueError for anything that a writer would not write."""
    tensors = tuple(map(Tensor.from_json, values))
    table = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    require(len(table) == len(tensors), "no two tensors have one name")
    require(lay_out(table, block) == tensors, "tensors lie one after the other")
    require(max(count_blocks(tensors, block).values(), default=0) <= MOST_BLOCKS, "no model has so many blocks")
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
