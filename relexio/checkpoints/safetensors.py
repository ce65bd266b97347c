"""Checkpoints as Hugging Face directories: which safetensors files hold which tensors, and which other files exist."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENAMETOOLONG
from functools import lru_cache
from pathlib import Path
from shlex import quote

from relexio.checkpoints.converters import adapter_to_safetensors, of_dcp, of_partitions
from relexio.checkpoints.disk import OnDisk
from relexio.checkpoints.disk import read_exactly as read_exactly
from relexio.checkpoints.files import ADAPTER, INDEX, SINGLE, inside, is_file, left_out, side_files
from relexio.checkpoints.header import MAX_HEADER, Entry, Shard, parse_json, parse_once, read_shard
from relexio.checkpoints.protocol import Read
from relexio.checkpoints.record import CheckpointRecord, NotStored, ShardRecord
from relexio.dtypes import Table
from relexio.errors import CheckpointError, IncompleteError, MissingError

#: What a shard's name says of how many there are.
_PART = re.compile(r"-of-(\d{1,9})\.safetensors$")


class HuggingFace(OnDisk):
    """One model directory at one training step (None: the base); ``top`` is all that the trainer wrote, with the model in it.

    ``index`` has the bytes of the index of the shards, if it has one.
    """

    def __init__(
        self,
        path: Path,
        step: int | None,
        shards: tuple[Shard, ...],
        index: bytes | None,
        side: dict[str, Path],
        top: Path | None = None,
    ) -> None:
        super().__init__()
        self.label = f"base {path}" if step is None else f"step {step} ({path})"
        self.source = str(path.resolve())
        self.path, self.step, self.shards, self.index = path, step, shards, index
        self.side: dict[str, Path] = side
        self.files, self.directory = shards, top or path
        self.tensors, self._places = _tables(tuple((shard.header, shard.size) for shard in shards))

    def locate(self, name: str) -> tuple[Path, Entry]:
        """Where a tensor is: the shard, and its entry there."""
        number, entry = self._places[name]
        return self.shards[number].path, entry

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """Keep the file of a tensor open, and read these bytes ahead."""
        path, entry = self.locate(name)
        fd = self.descriptor(path, entry.start + first_byte, nbytes)
        try:
            yield lambda first, out: read_exactly(fd, entry.start + first, out, path)
        finally:
            os.close(fd)

    def not_stored(self) -> dict[str, int]:
        """Bytes, by path, of everything that does not belong to the model; a directory of such files is one entry."""
        stored = {*self.side, *(shard.path.name for shard in self.shards), *([] if self.index is None else [INDEX])}
        return left_out(self.directory, self.path, stored)

    def record(self, name_of: Callable[[Path | bytes], str]) -> CheckpointRecord:
        """What the store keeps of it: with headers and index, to write the same files again."""
        shards = tuple(ShardRecord(s.path.name, s.size, s.mtime_ns, name_of(s.header)) for s in self.shards)
        index = name_of(self.index) if self.index is not None else None
        side = {name: name_of(path) for name, path in self.side.items()}
        return CheckpointRecord(self.step, self.source, shards, index, side, NotStored.of(self.not_stored()))


@lru_cache(maxsize=256)
def _tables(shards: tuple[tuple[bytes, int], ...]) -> tuple[Table, dict[str, tuple[int, Entry]]]:
    """Tensors and places by the headers and sizes of all shards; most steps have the same, and share them."""
    entries = [(i, e) for i, (header, size) in enumerate(shards) for e in parse_once(header, size)]
    return {e.name: (e.dtype, e.shape) for _, e in entries}, {e.name: (i, e) for i, e in entries}


def open_directory(path: Path, step: int | None = None, top: Path | None = None) -> HuggingFace:
    """Read the headers and the list of side files of one checkpoint directory. As ``layout.open_checkpoint``."""
    if not path.is_dir():
        raise MissingError(f"{path}: {_not_a_directory(path)}")
    try:
        return _open(path, step, top)
    except OSError as error:
        if error.errno != ENAMETOOLONG:
            raise
        raise CheckpointError(f"{error.filename}: a link to a name that no file can have; remove it") from error


def _open(path: Path, step: int | None, top: Path | None) -> HuggingFace:
    index = path / INDEX
    if is_file(index) and is_file(path / SINGLE):
        raise CheckpointError(f"{path}: holds both {SINGLE} and {INDEX}; remove the one that is not the model")
    if is_file(index):
        if index.stat().st_size > MAX_HEADER:
            raise CheckpointError(f"{index}: {index.stat().st_size:,} bytes, more than any index has; copy it again")
        data = inside(path, index).read_bytes()
        shards = sharded(path, data)
    else:
        data = None
        shards = (read_shard(inside(path, _single(path, step))),)
    taken = {*(shard.path.name for shard in shards), *([] if data is None else [INDEX])}
    checkpoint = HuggingFace(path, step, shards, data, side_files(path, taken), top)
    if not checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.label}: its safetensors files hold no tensor")
    return checkpoint


def _not_a_directory(path: Path) -> str:
    if path.exists():
        return "is a file; give the directory that holds it"
    if len(path.parts) == 2 and not path.parent.exists():
        command = f"hf download {quote(str(path))} --local-dir {quote(path.name)}"
        return f"no such directory; download a model on the Hub first: {command}"
    return "no such directory"


def _single(path: Path, step: int | None) -> Path:
    files = _shards(path)
    if path / SINGLE in files:
        return path / SINGLE
    part = _PART.search(files[0].name) if len(files) == 1 else None
    if len(files) == 1 and (part is None or int(part[1]) == 1):
        return files[0]
    if files:
        raise IncompleteError(f"{path}: {len(files)} safetensors files and no {INDEX}; a shard or the index is missing")
    way_out = "give the directory of the base model" if step is None else "leave this step out with --steps"
    problem = _other_format(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    what = "a config and no weights" if is_file(path / "config.json") else "no safetensors file"
    raise IncompleteError(f"{path}: {what}; {way_out}, or save its weights as safetensors")


def weight_files(path: Path) -> list[Path]:
    """The files of a directory that can hold a whole model: safetensors files, sorted, or what is left: their index.

    Beside an adapter, a file of any name but those that a model is saved under is none.
    """
    if is_file(path / ADAPTER) and not is_file(path / SINGLE) and not is_file(path / INDEX):
        return []
    return _shards(path) or [path / INDEX] * is_file(path / INDEX)


def _shards(path: Path) -> list[Path]:
    return sorted(p for p in path.glob("*.safetensors") if is_file(p) and not p.name.startswith("adapter_"))


def _other_format(path: Path) -> str | None:
    """What a directory holds in place of safetensors weights, and what to do; None if it holds no weights at all."""
    if is_file(path / "adapter_model.bin"):
        return f"holds a LoRA adapter as a torch file; save it as safetensors: {adapter_to_safetensors(path)}"
    shards = [*path.glob("**/model_world_size_*_rank_*.pt"), *path.parent.glob("model_world_size_*_rank_*.pt")]
    if shards:
        return f"holds no model itself; there are FSDP shards in {shards[0].parent}: give that directory"
    if command := of_partitions(path):
        return f"holds no model, but the partitions of DeepSpeed's ZeRO; make one of them: {command}"
    if command := of_dcp(path):
        return f"holds a torch distributed checkpoint (DCP) that is not read; convert it: {command}"
    if others := sorted([*path.glob("*.bin"), *path.glob("*.pt")]):
        name, wanted = quote(str(others[0])), quote(str(path / "pytorch_model.bin"))
        return f"holds torch files that are not named pytorch_model*.bin; if it is the model's state_dict: mv {name} {wanted}"
    return None


def sharded(path: Path, data: bytes) -> tuple[Shard, ...]:
    """The shards that an index names. Raises CheckpointError unless they hold what it says."""
    index = path / INDEX
    weight_map = parse_json(data, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to file names")
    shards, present = [], {file.name for file in path.iterdir() if is_file(file)}
    for name in dict.fromkeys(weight_map.values()):
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index}: names a shard outside its directory: {name!r}")
        if name not in present:
            raise IncompleteError(f"{path / name}: the index names this shard, but it is missing; copy it again")
        shards.append(read_shard(inside(path, path / name)))
    shard_of = {entry.name: shard.path.name for shard in shards for entry in shard.entries}
    if sum(len(shard.entries) for shard in shards) != len(shard_of):
        raise CheckpointError(f"{path}: two of its shards hold the same tensor")
    for tensor in sorted(weight_map.keys() | shard_of.keys()):
        if weight_map.get(tensor) != shard_of.get(tensor):
            raise CheckpointError(
                f"{index}: tensor {tensor}: the index says {weight_map.get(tensor)}, the shards say {shard_of.get(tensor)}"
            )
    return tuple(shards)
