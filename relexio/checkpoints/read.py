"""One checkpoint directory: which files hold which tensors, and the side files that make it loadable."""

import os
from dataclasses import dataclass, field, replace
from errno import ENAMETOOLONG
from functools import cached_property
from pathlib import Path

from relexio.checkpoints.files import inside, is_file, left_out, side_files
from relexio.checkpoints.header import MAX_HEADER, Entry, Shard, parse_json, read_shard
from relexio.errors import CheckpointError, IncompleteError, MissingError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
#: A head that some trainers write beside the embedding it is tied to, and others leave out.
HEAD = "lm_head.weight"
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "embed_tokens.weight",
    "transformer.wte.weight",
)


@dataclass(frozen=True)
class Location:
    """Where the bytes of one tensor stand: the shard's path and the first byte."""

    path: Path
    start: int


@dataclass(frozen=True)
class Checkpoint:
    """One model directory at one training step (``step`` is None for the base); ``top`` is all that the trainer wrote."""

    path: Path
    step: int | None
    shards: tuple[Shard, ...]
    index: bytes | None
    side: dict[str, Path] = field(default_factory=dict)
    top: Path | None = None

    @property
    def label(self) -> str:
        """How errors name it."""
        return f"base {self.path}" if self.step is None else f"step {self.step} ({self.path})"

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor by name, in file order."""
        return {entry.name: entry for shard in self.shards for entry in shard.entries}

    @cached_property
    def _shard_of(self) -> dict[str, Shard]:
        return {entry.name: shard for shard in self.shards for entry in shard.entries}

    def location(self, name: str) -> Location:
        """Where a tensor stands."""
        return Location(self._shard_of[name].path, self.entries[name].start)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def side_sizes(self) -> list[int]:
        """Bytes of each side file."""
        return [file.stat().st_size for file in self.side.values()]

    def left_out(self) -> dict[str, int]:
        """Bytes of what is there and does not belong to the model, by path; a directory of such is one entry."""
        stored = {*self.side, *(shard.path.name for shard in self.shards), *([] if self.index is None else [INDEX])}
        return left_out(self.top or self.path, self.path, stored)


def open_checkpoint(path: Path, step: int | None = None, top: Path | None = None) -> Checkpoint:
    """Read the headers and the list of side files of one checkpoint directory; no tensor is read.

    ``top`` is the directory of the step, where that of the model is one in it.

    Raises MissingError or CheckpointError, naming the directory and file, for anything that is not whole.
    """
    if not path.is_dir():
        raise MissingError(f"{path}: {_not_a_directory(path)}")
    try:
        return replace(_open(path, step), top=top)
    except OSError as error:
        if error.errno != ENAMETOOLONG:
            raise
        raise CheckpointError(f"{error.filename}: a link to a name that no file can have; remove it") from error


def _open(path: Path, step: int | None) -> Checkpoint:
    index = path / INDEX
    if is_file(index) and is_file(path / SINGLE):
        raise CheckpointError(f"{path}: holds both {SINGLE} and {INDEX}; remove the one that is not the model")
    if is_file(index):
        if index.stat().st_size > MAX_HEADER:
            raise CheckpointError(f"{index}: {index.stat().st_size:,} bytes, which no index has; copy it again")
        data = inside(path, index).read_bytes()
        shards = _sharded(path, data)
    else:
        data = None
        shards = (read_shard(inside(path, _single(path, step))),)
    taken = {*(shard.path.name for shard in shards), *([] if data is None else [INDEX])}
    checkpoint = Checkpoint(path, step, shards, data, side_files(path, taken))
    if not checkpoint.entries:
        raise CheckpointError(f"{checkpoint.label}: its safetensors files hold no tensor")
    return checkpoint


def _not_a_directory(path: Path) -> str:
    if path.exists():
        return "is a file; give the directory that holds it"
    if len(path.parts) == 2 and not path.parent.exists():
        return f"no such directory; a model on the Hub is downloaded first: hf download {path} --local-dir {path.name}"
    return "no such directory"


def _single(path: Path, step: int | None) -> Path:
    found = weight_files(path)
    if path / SINGLE in found:
        return path / SINGLE
    if len(found) == 1:
        return found[0]
    if found:
        raise IncompleteError(f"{path}: {len(found)} safetensors files and no {INDEX}; a shard or the index is missing")
    way_out = "give the directory of the base model" if step is None else "leave this step out with --steps"
    problem = _other_format(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    what = "a config and no weights" if is_file(path / "config.json") else "no safetensors file"
    raise IncompleteError(f"{path}: {what}; {way_out}, or save its weights as safetensors")


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory that can hold a whole model, sorted."""
    return sorted(p for p in path.glob("*.safetensors") if is_file(p) and not p.name.startswith("adapter_"))


def _other_format(path: Path) -> str | None:
    """What a directory holds in place of safetensors weights, and what to do; None if it holds no weights at all."""
    if is_file(path / "adapter_model.safetensors"):
        return "holds a LoRA adapter, not a model; merge it into its base first (peft: merge_and_unload)"
    shards = list(path.glob("**/model_world_size_*_rank_*.pt")) or list(
        path.parent.glob("model_world_size_*_rank_*.pt")
    )
    if shards:
        return "holds FSDP shards (torch), no safetensors; merge them first (verl: python -m verl.model_merger merge)"
    if any(path.glob("**/*.distcp")):
        return "holds a torch distributed checkpoint (DCP), no safetensors; convert it to Hugging Face format first"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        return "holds torch files and no safetensors; save it again with safe_serialization=True"
    return None


def _sharded(path: Path, data: bytes) -> tuple[Shard, ...]:
    index = path / INDEX
    weight_map = parse_json(data, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to file names")
    shards, present = [], {file.name for file in path.iterdir() if is_file(file)}
    for name in dict.fromkeys(weight_map.values()):
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index}: names a shard outside its directory: {name!r}")
        if name not in present:
            raise IncompleteError(f"{path / name}: the index names this shard and it is not there; copy it again")
        shards.append(read_shard(inside(path, path / name)))
    found = {entry.name: shard.path.name for shard in shards for entry in shard.entries}
    if sum(len(shard.entries) for shard in shards) != len(found):
        raise CheckpointError(f"{path}: a tensor stands in two of its shards")
    for tensor in sorted(weight_map.keys() | found.keys()):
        if weight_map.get(tensor) != found.get(tensor):
            raise CheckpointError(
                f"{index}: tensor {tensor}: the index says {weight_map.get(tensor)}, the shards say {found.get(tensor)}"
            )
    return tuple(shards)


def read_exactly(fd: int, start: int, out: memoryview, path: Path) -> None:
    """Fill ``out`` with the file's bytes from ``start`` on. Raises CheckpointError if the file ends before."""
    done = 0
    while done < len(out):
        count = os.preadv(fd, [out[done:]], start + done)
        if count == 0:
            raise CheckpointError(f"{path}: ended while it was read: its header promises more bytes; copy it again")
        done += count


def assert_unchanged(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a shard is not the file any more whose header was read."""
    for shard in checkpoint.shards:
        stat = shard.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(
                f"{shard.path}: changed while it was read; wait until training has written it, and run again"
            )
