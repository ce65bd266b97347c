"""What a trajectory store says about itself: records, and their JSON in Zarr attributes."""

import os
import re
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from relexio.dtypes import BITS, KINDS, Kind, kind_of
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
_FILE = re.compile(r"groups/\d{4,8}/files/[0-9a-f]{32}")
_DEEPEST, _LONGEST = 32, 1024  # directories and bytes in the name of a file
_NAMES, _NAME = 20, 200  # names, and letters of one, of what was not stored
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
        """From Zarr attributes. Raises ValueError for what no writer writes."""
        tensor = cls(value["name"], value["dtype"], tuple(value["shape"]), value["first_block"])
        _require(_is_text(tensor.name) and tensor.dtype in BITS, "a tensor has a name and a known dtype")
        _require(len(tensor.shape) <= _MOST_DIMENSIONS, f"a shape has at most {_MOST_DIMENSIONS} dimensions")
        _require(all(map(_is_count, (*tensor.shape, tensor.first_block))), "a shape is a list of sizes")
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
        return prod(self.shape) * BITS[self.dtype] // 8

    def count(self, block: int) -> int:
        """How many blocks of ``block`` elements it has."""
        return -(-self.size // block)

    def blocks(self, block: int) -> list[Block]:
        """Its blocks of ``block`` elements, the last one shorter; none for an empty tensor."""
        return [
            Block(self, self.first_block + i, start, min(block, self.size - start))
            for i, start in enumerate(range(0, self.size, block))
        ]


def lay_out(entries: list[tuple[str, str, tuple[int, ...]]], block: int) -> tuple[Tensor, ...]:
    """Give every (name, dtype, shape) its blocks, one tensor after the other within each kind."""
    blocks = dict.fromkeys(KINDS, 0)
    tensors = []
    for name, dtype, shape in entries:
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
class StoredShard:
    """One safetensors file of a source checkpoint: enough to write it again, and to see that it is still the same."""

    name: str
    size: int
    mtime_ns: int
    header: str


@dataclass(frozen=True)
class NotStored:
    """What a checkpoint's directory held besides: bytes by path, of the largest only, how many more, and all bytes."""

    files: dict[str, int] = field(default_factory=dict)
    more: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, found: dict[str, int], most: int = _NAMES) -> "NotStored":
        """Of bytes by path."""
        largest = sorted(found, key=lambda name: (-found[name], name))[:most]
        files = {name[:_NAME]: found[name] for name in sorted(largest)}
        return cls(files, len(found) - len(files), sum(found.values()))

    @classmethod
    def from_json(cls, value: Json) -> "NotStored":
        """From Zarr attributes. Raises ValueError for what no writer writes."""
        found = cls(dict(value["files"]), value["more"], value["bytes"])
        _require(all(map(_is_text, found.files)), "files have names")
        _require(all(map(_is_count, (*found.files.values(), found.more, found.bytes))), "sizes are numbers")
        return found


@dataclass(frozen=True)
class StoredCheckpoint:
    """Where a checkpoint came from, and its files. ``header``, ``index`` and ``side`` name arrays of file bytes."""

    step: int | None
    source: str
    shards: tuple[StoredShard, ...]
    index: str | None
    side: dict[str, str]
    not_stored: NotStored = NotStored()

    @property
    def files(self) -> list[str]:
        """The paths of all arrays that it names."""
        return [name for name in (*self.side.values(), *(s.header for s in self.shards), self.index) if name]

    def to_json(self) -> Json:
        """As it stands in Zarr attributes; nothing is said of what was not stored where that is nothing."""
        value = {**asdict(self), "shards": [asdict(shard) for shard in self.shards]}
        return value if self.not_stored.files else {k: v for k, v in value.items() if k != "not_stored"}

    @classmethod
    def from_json(cls, value: Json) -> "StoredCheckpoint":
        """From Zarr attributes."""
        shards = tuple(StoredShard(s["name"], s["size"], s["mtime_ns"], s["header"]) for s in value["shards"])
        left = NotStored.from_json(value["not_stored"]) if "not_stored" in value else NotStored()
        found = cls(value["step"], value["source"], shards, value["index"], dict(value["side"]), left)
        _require(_is_text(found.source), "a source is a text")
        for name in (*(shard.name for shard in shards), *found.side):
            _require(_is_text(name) and _is_inside(name), f"a file stands inside its directory, and {name!r} does not")
        _require(
            all(shard.name == PurePosixPath(shard.name).name for shard in shards), "a shard is in no directory below"
        )
        _require(found.side.keys().isdisjoint(shard.name for shard in shards), "a side file has a name of its own")
        arrays = [
            *found.side.values(),
            *(shard.header for shard in shards),
            *([] if found.index is None else [found.index]),
        ]
        _require(all(isinstance(a, str) and _FILE.fullmatch(a) for a in arrays), "files are arrays of a group")
        _require(all(_is_count(s.size) and _is_time(s.mtime_ns) for s in shards), "sizes and times are numbers")
        _require(found.step is None or _is_count(found.step), "a step is a number")
        return found


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
        """From Zarr attributes. Raises ValueError for what no writer writes."""
        name, steps, content = value["name"], tuple(value["steps"]), tuple(value["content"])
        _require(isinstance(name, str) and re.fullmatch(r"\d{4,8}", name), "a group's name is a number")
        _require(steps and all(map(_is_count, steps)), "a group has steps, and they are numbers")
        _require(list(steps) == sorted({*steps}), "steps ascend")
        _require([type(text) for text in content] == [str] * len(steps), "every step has a content hash")
        return cls(name, steps, content, hashes_from_json(value["metadata"]))


def groups_from_json(values: list[Json]) -> tuple[Group, ...]:
    """The groups of a store. Raises ValueError for what no writer writes."""
    groups = tuple(map(Group.from_json, values))
    steps = [step for group in groups for step in group.steps]
    _require(
        [group.name for group in groups] == [f"{i:04d}" for i in range(len(groups))], "groups are numbered in order"
    )
    _require(len({*steps}) == len(steps), "no step is in two groups")
    return groups


def tensors_from_json(values: list[Json], block: int) -> tuple[Tensor, ...]:
    """The tensor table of a store. Raises ValueError for what no writer writes."""
    tensors = tuple(map(Tensor.from_json, values))
    _require(
        lay_out([(t.name, t.dtype, t.shape) for t in tensors], block) == tensors, "tensors lie one after the other"
    )
    _require(len({t.name for t in tensors}) == len(tensors), "no two tensors have one name")
    _require(max(count_blocks(tensors, block).values(), default=0) <= MOST_BLOCKS, "no model has so many blocks")
    return tensors


def block_from_json(value: Any) -> int:
    """The elements of a block. Raises ValueError for what no writer writes."""
    _require(
        _is_count(value) and 0 < value <= BLOCK and not value & (value - 1), f"a power of two up to {BLOCK} is a block"
    )
    return int(value)


def hashes_from_json(value: Any) -> dict[str, str]:
    """A table of hashes. Raises ValueError for what no writer writes."""
    _require(isinstance(value, dict) and all(isinstance(text, str) for text in value.values()), "hashes are texts")
    _require(all(map(_NODE.fullmatch, value)), "hashes are of groups and arrays of the store")
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
        """From an array's ``zarr.json``. Raises ValueError for what no writer writes."""
        shape, chunks = tuple(value["shape"]), tuple(value["chunk_grid"]["configuration"]["chunk_shape"])
        _require(value["node_type"] == "array", "it is an array")
        _require(value["data_type"] in _TYPES, f"the data type is one of {', '.join(_TYPES)}")
        _require([codec["name"] for codec in value["codecs"]] == _CODECS, f"codecs are {', '.join(_CODECS)}")
        _require(all(map(_is_count, (*shape, *chunks))) and len(shape) == len(chunks) > 0, "a shape is a list of sizes")
        dtype = np.dtype(value["data_type"]).newbyteorder("<")
        _require(0 < prod(chunks) * dtype.itemsize <= _MOST_CHUNK, "a chunk has room for something")
        return cls(shape, chunks, dtype)


def _is_text(value: Any) -> bool:
    """Whether it is text that a file system can have: JSON may hold halves of characters."""
    try:
        return isinstance(value, str) and os.fsencode(value) is not None
    except UnicodeEncodeError:
        return False


def _is_inside(name: str) -> bool:
    """Whether a path names a file in its directory, or in directories below."""
    parts = PurePosixPath(name).parts
    plain = all(part not in ("/", "..") and "\0" not in part and len(os.fsencode(part)) < 256 for part in parts)
    short = 1 <= len(parts) <= _DEEPEST and len(os.fsencode(name)) <= _LONGEST
    return plain and short and str(PurePosixPath(name)) == name


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_time(value: Any) -> bool:
    """Whether it is nanoseconds that a file system can give: 64 bits of seconds, before 1970 too."""
    return type(value) is int and abs(value) < 2**94


def _require(right: object, rule: str) -> None:
    if not right:
        raise ValueError(f"not as it was written: {rule}")


def check_format(attributes: Json, address: str) -> Json:
    """The store's own record. Raises StoreError if this is no trajectory, or one of a newer format."""
    record = attributes.get("relexio")
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise StoreError(f"{address}: a Zarr group, but no relexio trajectory")
    if record["format"] < FORMAT:
        raise StoreError(f"{address}: has store format {record['format']} of an early relexio; convert the run again")
    if record["format"] > FORMAT:
        raise StoreError(
            f"{address}: has store format {record['format']}, this relexio reads {FORMAT}; upgrade relexio"
        )
    return record
