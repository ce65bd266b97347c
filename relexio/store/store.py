"""A trajectory store that was opened, and what it holds: blocks, moves, records, files."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from relexio.checkpoints.record import CheckpointRecord
from relexio.dtypes import Table
from relexio.errors import RequestError, StoreError
from relexio.loops import Reader, Stream
from relexio.store.arrays import MOVES, check_layout
from relexio.store.chunks import chunk_key, read_chunk, require_chunk, write_chunk
from relexio.store.schema import (
    Block,
    Layout,
    Segment,
    Tensor,
    blocks_of,
    count_blocks,
    moves_room,
)
from relexio.store.seal import damage, read_node
from relexio.store.storage import METADATA, LocalStorage, attributes, locate
from relexio.words import describe_steps, shown

T = TypeVar("T")
#: Of the SHA-256 in the name of a stored file's array.
FILE_DIGITS = 32


@dataclass(frozen=True)
class Store:
    """A trajectory store at an address. Cheap to copy and pickle: layouts are read where they are first needed.

    ``metadata`` has a hash of the ``zarr.json`` of the base's groups and arrays and of the files', and of the chunks of what
    is small, by path. ``next`` numbers the next segment; ``seal`` is that of the commit marker.
    """

    address: str
    block: int
    tensors: tuple[Tensor, ...]
    segments: tuple[Segment, ...]
    base_content: str
    metadata: dict[str, str] = field(default_factory=dict)
    next: int = 0
    seal: str = ""
    _held: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __repr__(self) -> str:  # it stands in what Dask logs of a task that failed
        return f"<Store {self.shown}>"

    def __getstate__(self) -> dict[str, Any]:
        fields = ("block", "tensors", "segments", "base_content", "metadata", "next", "seal")
        return {name: getattr(self, name) for name in fields} | {"address": self.absolute, "_held": {}}

    @property
    def shown(self) -> str:
        """The address as it may be seen: without what is secret in it."""
        return shown(self.address)

    @property
    def absolute(self) -> str:
        """The address, independent of the working directory."""
        root = self.files("")
        return str(root[0]) if root else self.address

    def moved_to(self, address: str) -> "Store":
        """The same store at the address where it is now."""
        return replace(self, address=address)

    def files(self, *names: str) -> list[Path]:
        """Files of the store by their names in it, as absolute paths; none of a store on object storage."""
        location = locate(self.address)
        return [(location.path / name).absolute() for name in names] if isinstance(location, LocalStorage) else []

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """All committed steps, ascending."""
        return tuple(sorted(step for segment in self.segments for step in segment.steps))

    @cached_property
    def contents(self) -> dict[int, str]:
        """The content hash of every committed step."""
        return {
            step: content
            for segment in self.segments
            for step, content in zip(segment.steps, segment.content, strict=True)
        }

    @cached_property
    def chain(self) -> dict[int, int]:
        """The place of every committed step in the chain: the row of F that leads to it."""
        return {step: row for row, step in enumerate(self.contents)}

    @cached_property
    def table(self) -> Table:
        """The dtype and shape of every tensor."""
        return {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors}

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name. Raises RequestError if there is none."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise RequestError(f"{self.shown}: no tensor named {name!r}")

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, kind by kind."""
        return blocks_of(self.tensors, self.block)

    @cached_property
    def block_counts(self) -> dict[str, int]:
        """The number of blocks of every kind that has any."""
        return count_blocks(self.tensors, self.block)

    @cached_property
    def parts(self) -> dict[str, list[tuple[Block, int]]]:
        """Where each tensor lies: blocks, and its place among the pieces of each."""
        parts: dict[str, list[tuple[Block, int]]] = {tensor.name: [] for tensor in self.tensors}
        for block in self.blocks:
            for place, piece in enumerate(block.pieces):
                parts[piece.tensor.name].append((block, place))
        return parts

    def fitted(self) -> list[Tensor]:
        """The tensors that a fit is about: floats with at least one element."""
        return [tensor for tensor in self.tensors if tensor.kind.is_float and tensor.size]

    def find(self, step: int) -> tuple[Segment, int]:
        """The segment and column that hold a step. Raises RequestError if it is not stored."""
        for segment in self.segments:
            if step in segment.steps:
                return segment, segment.steps.index(step)
        raise RequestError(f"{self.shown}: step {step} is not stored; it holds {describe_steps(self.steps)}")

    def array(self, path: str) -> Layout:
        """How an array is laid out. Raises StoreError if it is missing, or not as large as its tensors and steps ask."""
        if path not in self._held:
            node = self.node(path)
            with self._damage(path):
                layout = Layout.from_json(node)
                check_layout(layout, path, self.tensors, self.block, self.segments)
            self._held[path] = layout
        return self._held[path]

    def node(self, path: str) -> Any:
        """The ``zarr.json`` of a group or array. Raises StoreError if it is not the one that was committed."""
        with self._damage(f"{path}/{METADATA}"):
            return read_node(locate(self.address), path, self.sealed.get(path))

    @cached_property
    def sealed(self) -> dict[str, str]:
        """The hash of all that was committed but bits, moves, and the contents of files, by its path."""
        hashes = dict(self.metadata)
        for segment in self.segments:
            hashes |= segment.metadata
        return hashes

    def chunk(self, path: str, *index: int) -> np.ndarray:
        """One whole chunk of an array. Raises StoreError, naming it, where it is missing, damaged, or another one."""
        layout, known = self.array(path), self._known(path, *index)
        with self._damage(f"chunk {chunk_key(path, layout, *index)}"):
            return read_chunk(locate(self.address), path, layout, *index, known=known)

    def _known(self, path: str, *index: int) -> str | int | None:
        """The hash of a chunk that was committed."""
        top, _, name = path.rpartition("/")
        if name in ("bits", *MOVES) and top in self.sealed:
            return self._bound(top, name, self.array(path), *index)
        return self.sealed.get(chunk_key(path, self.array(path), *index))

    def _bound(self, top: str, name: str, layout: Layout, number: int) -> int:
        """The hash of a chunk of bits or moves: arrays side by side, block by block, have one for each chunk that may be."""
        names = MOVES if name in MOVES else (name,)
        blocks = self.block_counts[top.rpartition("/")[2]]
        each = layout.shape[0] // (blocks * layout.chunks[0])
        if self.array(f"{top}/hashes").shape != (blocks * len(names) * each,):
            raise StoreError(f"{self.shown}: {top}/hashes: has not one for each chunk of {name}; the store is damaged")
        place = (number // each * len(names) + names.index(name)) * each + number % each
        return int(self.small(f"{top}/hashes", place))

    def small(self, path: str, place: int) -> np.ndarray:
        """One entry, along the first axis, of an array of something small, of which a chunk is held."""
        number, entry = divmod(place, self.array(path).chunks[0])
        key = f"{path}/c"
        held = self._held.get(key)
        if held is None or held[0] != number:
            held = self._held[key] = number, self.chunk(path, number)
        return held[1][entry]

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """Tell what is wrong with a file of the store, or that it is not damage but a newer commit."""
        try:
            with damage(f"{self.shown}: {what}"):
                yield
        except StoreError:
            self.require_current()
            raise

    def require_current(self) -> None:
        """Raise StoreError if another commit has come since this store was opened."""
        marker = attributes(locate(self.address)).get("relexio") if self.seal else None
        if isinstance(marker, dict) and marker.get("seal") != self.seal:
            raise StoreError(f"{self.shown}: was written to while it was read; run the command again")

    def write_chunk(self, path: str, values: np.ndarray, *index: int) -> int:
        """Write one whole chunk of an array, and give its hash."""
        return write_chunk(locate(self.address), path, self.array(path), values, *index)

    def base_bits(self, block: Block) -> np.ndarray:
        """The base's element bits in a block [size]."""
        path, numbers = self._base_chunks(block)
        parts = [self.chunk(path, number) for number in numbers]
        return (np.concatenate(parts) if len(parts) > 1 else parts[0])[: block.size]

    def check_base_bits(self, block: Block) -> None:
        """Raise StoreError as ``base_bits`` does, in a fraction of the time: files are compared with their hashes."""
        path, numbers = self._base_chunks(block)
        for number in numbers:
            with self._damage(f"chunk {chunk_key(path, self.array(path), number)}"):
                require_chunk(locate(self.address), path, self.array(path), number, known=self._known(path, number))

    def _base_chunks(self, block: Block) -> tuple[str, range]:
        path = f"base/{block.kind.name}/bits"
        chunk = self.array(path).chunks[0]
        first = block.index * self.block // chunk
        return path, range(first, first - (-block.size // chunk))

    def stream(self, segment: Segment, block: Block) -> Stream:
        """The moves of a segment in a block, a chunk at a time."""
        top = f"{segment.path}/{block.kind.name}"
        counts = [int(count) for count in self.small(f"{top}/index", block.index)]
        room = moves_room(self.block, segment.columns)
        if not all(0 <= count <= room for count in counts):
            raise StoreError(f"{self.shown}: {top}/index: more moves than elements and steps; the store is damaged")
        return Stream(
            segment.columns, *(self._chunks(f"{top}/{n}", block, c) for n, c in zip(MOVES, counts, strict=True))
        )

    def _chunks(self, path: str, block: Block, count: int) -> Iterator[np.ndarray]:
        layout = self.array(path)
        chunk, room = layout.chunks[0], layout.shape[0] // self.block_counts[block.kind.name]
        for done in range(0, count, chunk):
            yield self.chunk(path, (block.index * room + done) // chunk)[: count - done]

    def moves(self) -> int:
        """How many moves are stored of elements that can be fitted."""
        blocks = [block for block in self.blocks if block.kind.is_float]
        pairs = ((segment, block) for segment in self.segments for block in blocks)
        return sum(int(self.small(f"{segment.path}/{b.kind.name}/index", b.index)[1]) for segment, b in pairs)

    def reader(self, block: Block, segments: Iterable[Segment] | None = None) -> Reader:
        """The moves of a block in a chain of segments, of all by default."""
        chain = self.segments if segments is None else segments
        return Reader([self.stream(segment, block) for segment in chain], block.kind)

    def digests(self, path: str, block: Block) -> np.ndarray:
        """The digests of a block in the base [16] or in a segment [K, 16], by its Zarr path."""
        return self.small(f"{path}/{block.kind.name}/digest", block.index)

    def changed(self, segment: Segment) -> np.ndarray:
        """How many elements of each tensor differ from the base in each state of a segment: int64 [tensors, K]."""
        return self.chunk(f"{segment.path}/changed")

    def changed_counts(self, steps: tuple[int, ...]) -> np.ndarray:
        """How many elements of each tensor differ from the base at each of ``steps``: int64 [tensors, T]."""
        counts = np.zeros((len(self.tensors), len(steps)), np.int64)
        for segment in self.segments:
            places = [place for place, step in enumerate(steps) if step in segment.steps]
            if places:
                counts[:, places] = self.changed(segment)[:, [segment.steps.index(steps[place]) for place in places]]
        return counts

    def checkpoints(self, segment: Segment) -> dict[int, CheckpointRecord]:
        """The source checkpoints of a segment, by step."""
        records = self._source(segment.path, "sources", lambda value: list(map(CheckpointRecord.from_json, value)))
        if tuple(record.step for record in records) != segment.steps:
            raise StoreError(f"{self.shown}: sources of {segment.path} do not fit its steps; the store is damaged")
        return {record.step: record for record in records if record.step is not None}

    def base(self) -> CheckpointRecord:
        """The base's source checkpoint."""
        return self._source("base", "source", CheckpointRecord.from_json)

    def file(self, path: str) -> bytes:
        """The bytes of a stored file (a header, an index, or a side file). Raises StoreError if their hash is wrong."""
        return b"".join(self.pieces(path))

    def pieces(self, path: str) -> Iterator[bytes]:
        """The bytes of a stored file, a chunk at a time. Raises StoreError, at their end, if their hash is wrong."""
        layout, hashed = self.array(path), hashlib.sha256()
        size, chunk = layout.shape[0], layout.chunks[0]
        for number, first in enumerate(range(0, size, chunk)):
            piece = self.chunk(path, number)[: size - first].tobytes()
            hashed.update(piece)
            yield piece
        if hashed.hexdigest()[:FILE_DIGITS] != path.rsplit("/", 1)[-1]:
            raise StoreError(f"{self.shown}: {path}: not the bytes that were hashed; the store is damaged")

    def record(self, step: int | None) -> CheckpointRecord:
        """The source checkpoint of a step, or of the base (None). Raises RequestError for a step that is not stored."""
        return self.base() if step is None else self.checkpoints(self.find(step)[0])[step]

    def _source(self, path: str, name: str, parse: Callable[[Any], T]) -> T:
        node = self.node(path)
        with damage(f"{self.shown}: attributes of {path}"):
            return parse(node["attributes"][name])


def file_digest(data: bytes | Path) -> str:
    """The name of the array of a stored file: the first 32 hexadecimal digits of the SHA-256 of its bytes."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()[:FILE_DIGITS]
    with open(data, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:FILE_DIGITS]
