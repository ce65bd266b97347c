"""What a store keeps of a checkpoint besides its tensors: its source, its files, and a list of what was not stored."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from relexio.checkpoints.files import DEEPEST, INDEX, LONGEST, SINGLE
from relexio.checkpoints.header import header_of
from relexio.dtypes import BITS, Table, kind_of, tensor_bytes

Json = dict[str, Any]
_ARRAY = re.compile(r"files/[0-9a-f]{32}")
_NAMES, _NAME = 20, 200  # names, and letters of one, of what was not stored


@dataclass(frozen=True)
class ShardRecord:
    """One safetensors file of a source checkpoint: enough to write it again, and to see that it is still the same."""

    name: str
    size: int
    mtime_ns: int
    header: str


@dataclass(frozen=True)
class NotStored:
    """What a checkpoint's directory held besides: bytes by path of the largest, the number of the others, and all bytes."""

    files: dict[str, int] = field(default_factory=dict)
    more: int = 0
    bytes: int = 0

    @classmethod
    def of(cls, sizes: dict[str, int], most: int = _NAMES) -> "NotStored":
        """Of bytes by path."""
        largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:most]
        files = {name[:_NAME]: sizes[name] for name in sorted(largest)}
        return cls(files, len(sizes) - len(files), sum(sizes.values()))

    @classmethod
    def from_json(cls, value: Json) -> "NotStored":
        """From Zarr attributes. Raises ValueError for anything that a writer would not write."""
        rest = cls(dict(value["files"]), value["more"], value["bytes"])
        require(all(map(is_text, rest.files)), "files have names")
        require(all(map(is_count, (*rest.files.values(), rest.more, rest.bytes))), "sizes are numbers")
        return rest


@dataclass(frozen=True)
class CheckpointRecord:
    """Where a checkpoint came from, and its files. ``header``, ``index`` and ``side`` name arrays of file bytes.

    Without shards it was not read from safetensors files; ``made_of`` has then name, size and time of the files that it was
    made from, if there were any. These are not stored. ``cast`` names the types that its files had, where the tensors are
    stored in others.
    """

    step: int | None
    source: str
    shards: tuple[ShardRecord, ...]
    index: str | None
    side: dict[str, str]
    not_stored: NotStored = NotStored()
    cast: str = ""
    made_of: tuple[tuple[str, int, int], ...] = ()

    @property
    def from_safetensors(self) -> bool:
        """Whether it comes back as the files that it was."""
        return bool(self.shards) and not self.cast

    @property
    def recorded(self) -> bool:
        """Whether it was never a file, but arrays in memory."""
        return not self.fingerprints

    def comes_back(self, table: Table) -> str | None:
        """How it is written again where that is not as the files that it was, in words; None where it is.

        ``table`` is that of the store. Types of which all values have a place in the only other float type are not rounded.
        """
        if self.from_safetensors:
            return None
        if not self.cast:
            return "as safetensors"
        floats = {dtype for dtype, _ in table.values() if kind_of(dtype).is_float}
        if all(dtype in ("BF16", "F16") and floats - {dtype} == {"F32"} for dtype in self.cast.split(", ")):
            return f"as safetensors, in wider types than its own ({self.cast})"
        return f"as safetensors, rounded from {self.cast} to the trajectory's types"

    @property
    def files(self) -> list[str]:
        """The paths of all arrays that it names."""
        return [name for name in (*self.side.values(), *(s.header for s in self.shards), self.index) if name]

    @property
    def beside(self) -> dict[str, str]:
        """The arrays of the files that lie beside the weights, by name: the side files, and the index of the shards."""
        return {**self.side, INDEX: self.index} if self.index is not None and self.from_safetensors else self.side

    @property
    def fingerprints(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of the files that it was read from."""
        return tuple((shard.name, shard.size, shard.mtime_ns) for shard in self.shards) or self.made_of

    def nbytes(self, table: Table) -> int:
        """Bytes of its weights' files: as they were, or as they will be written."""
        if self.from_safetensors:
            return sum(shard.size for shard in self.shards)
        return 8 + len(header_of(table)) + sum(tensor_bytes(*tensor) for tensor in table.values())

    def is_still_in(self, directory: Path) -> bool:
        """Whether a directory has the files that it was read from, by their sizes and times."""
        try:
            stats = [(directory / name).stat() for name, _, _ in self.fingerprints]
        except FileNotFoundError:
            return False
        stamps = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        return bool(stamps) and stamps == [(size, time) for _, size, time in self.fingerprints]

    def changed_in(self, stamps: Iterable[tuple[str, int, int]]) -> bool:
        """Whether a directory with weights of these names, sizes and times has others than those that it was read from.

        What lay beside them then does not count, nor do files that have gone. Without files of its own, it cannot tell: True.
        """
        own = {name for name, _, _ in self.fingerprints}
        beside = (self.side.keys() | self.not_stored.files.keys()) - own
        return not self.fingerprints or any(s not in self.fingerprints for s in stamps if s[0] not in beside)

    def unlike(self, other: "CheckpointRecord") -> Iterator[tuple[str, bool]]:
        """The names of files that differ between the two, by the hashes that name their arrays, and whether this one has them.

        Headers and index are compared where both were read from safetensors files.
        """
        ours, theirs = (
            {**c.beside, **{shard.name: shard.header for shard in c.shards}} if self.shards and other.shards else c.side
            for c in (self, other)
        )
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name, "").rsplit("/", 1)[-1] != theirs.get(name, "").rsplit("/", 1)[-1]:
                yield name, name in ours

    def to_json(self) -> Json:
        """The record for Zarr attributes, without what is empty."""
        value = {**asdict(self), "shards": [asdict(shard) for shard in self.shards]}
        value["made_of"] = [list(stamp) for stamp in self.made_of]
        empty = {"not_stored": not self.not_stored.files, "cast": not self.cast, "made_of": not self.made_of}
        return {k: v for k, v in value.items() if not empty.get(k)}

    @classmethod
    def from_json(cls, value: Json) -> "CheckpointRecord":
        """From Zarr attributes. Raises ValueError for anything that a writer would not write."""
        shards = tuple(ShardRecord(s["name"], s["size"], s["mtime_ns"], s["header"]) for s in value["shards"])
        rest = NotStored.from_json(value["not_stored"]) if "not_stored" in value else NotStored()
        side, cast = dict(value["side"]), value.get("cast", "")
        made_of = tuple((name, size, time) for name, size, time in value.get("made_of", ()))
        record = cls(value["step"], value["source"], shards, value["index"], side, rest, cast, made_of)
        names = [shard.name for shard in shards] or [SINGLE]
        require(is_text(record.source), "a source is text")
        for name in (*names, *record.side):
            require(is_text(name) and _is_inside(name), f"a file is inside its directory, and {name!r} is not")
        require(all(name == PurePosixPath(name).name for name in names), "a shard is in no directory below")
        require(record.side.keys().isdisjoint(names), "a side file has a name of its own")
        arrays = [*record.side.values(), *(s.header for s in shards), *([] if record.index is None else [record.index])]
        require(all(isinstance(a, str) and _ARRAY.fullmatch(a) for a in arrays), "files are arrays of the store")
        require(all(is_text(n) and _is_plain(n) for n, _, _ in made_of), "what a step was made of is in its directory")
        require(all(is_count(n) and _is_time(t) for _, n, t in record.fingerprints), "sizes and times are numbers")
        require(isinstance(cast, str) and set(cast.split(", ")) <= {"", *BITS}, "types that were cast are types")
        require(record.step is None or is_count(record.step), "a step is a number")
        return record


def require(right: object, rule: str) -> None:
    """Raise ValueError, which says the rule, for what no writer of a store writes."""
    if not right:
        raise ValueError(f"not as it was written: {rule}")


def is_text(value: Any) -> bool:
    """Whether it is text that a file system can hold: JSON may contain half characters."""
    try:
        return isinstance(value, str) and os.fsencode(value) is not None
    except UnicodeEncodeError:
        return False


def is_count(value: Any) -> bool:
    """Whether it is a number from 0 on, of 63 bits."""
    return type(value) is int and 0 <= value < 2**63


def _is_inside(name: str) -> bool:
    """Whether a path names a file in its directory, or in directories below."""
    parts = PurePosixPath(name).parts
    plain = all(part not in ("/", "..") and "\0" not in part and len(os.fsencode(part)) < 256 for part in parts)
    short = 1 <= len(parts) <= DEEPEST and len(os.fsencode(name)) <= LONGEST
    return plain and short and str(PurePosixPath(name)) == name


def _is_plain(name: str) -> bool:
    return _is_inside(name) and name == PurePosixPath(name).name


def _is_time(value: Any) -> bool:
    """Whether it is nanoseconds that a file system can give: 64 bits of seconds, before 1970 too."""
    return type(value) is int and abs(value) < 2**94
