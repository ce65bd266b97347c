"""Writing a checkpoint block by block: every header is known in advance, so nothing ever holds a whole tensor."""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from relexio.checkpoints.header import parse_header
from relexio.checkpoints.read import EMBEDDINGS, HEAD
from relexio.errors import CheckpointError

CARD = "README.md"


@dataclass(frozen=True)
class OutputShard:
    """One safetensors file to be written: its name and its header (JSON bytes, padded as safetensors wants)."""

    name: str
    header: bytes
    data_bytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return 8 + len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Output:
    """A checkpoint directory being written, with the place of every tensor. Can be sent to other processes."""

    directory: str
    places: dict[str, list[tuple[str, int]]]

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, from byte ``offset`` of it on, wherever it stands; nowhere if the files lack it."""
        for name, start in self.places.get(tensor, ()):
            fd = os.open(Path(self.directory, name), os.O_WRONLY)
            try:
                done = 0
                while done < len(data):
                    done += os.pwrite(fd, data[done:], start + offset + done)
            finally:
                os.close(fd)

    def tied(self, known: set[str]) -> "Output":
        """The same, with a head that only these files hold written as the copy of the embedding that it was."""
        embedding = next((name for name in EMBEDDINGS if name in self.places), None)
        if HEAD not in self.places or HEAD in known or embedding is None:
            return self
        return Output(self.directory, {**self.places, embedding: self.places[embedding] + self.places[HEAD]})


def begin(directory: Path, shards: Iterable[OutputShard]) -> Output:
    """Create the files of a checkpoint at their final size, headers written, in an existing empty directory.

    Raises OSError (ENOSPC) at once where the disk cannot hold them.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for shard in shards:
        path = directory / shard.name
        with open(path, "xb") as file:
            file.write(struct.pack("<Q", len(shard.header)) + shard.header)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, shard.size)
            else:
                os.truncate(file.fileno(), shard.size)
        for entry in parse_header(shard.header, shard.size, path):
            places[entry.name] = [(shard.name, entry.start)]
    return Output(str(directory.absolute()), places)


def without_clashes(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Of side files, in order, those that can stand beside files that are ``taken`` and the ones before them.

    Where a file stands there can be no directory of its name (``README.md/x``), nor the other way round.
    """
    files = set(taken)
    folders = {parent for name in files for parent in _parents(name)}
    fitting = []
    for name in names:
        if name not in files | folders and not files.intersection(_parents(name)):
            files.add(name)
            folders.update(_parents(name))
            fitting.append(name)
    return fitting


def _parents(name: str) -> list[str]:
    return [parent.as_posix() for parent in PurePosixPath(name).parents][:-1]


def write_files(directory: Path, files: Iterable[tuple[str, bytes | Iterable[bytes]]]) -> None:
    """Write side files, whole or in pieces, at their relative paths, which may name directories below."""
    for name, data in files:
        path = directory / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"{name!r}: a side file outside its directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)


def validate(directory: Path, expected: Iterable[OutputShard]) -> None:
    """Open every shard with the safetensors library; names, shapes and dtypes must be the header's.

    Raises CheckpointError naming the file.
    """
    from safetensors import SafetensorError, safe_open

    for shard in expected:
        path = directory / shard.name
        entries = parse_header(shard.header, path.stat().st_size, path)
        try:
            with safe_open(path, framework="numpy") as file:
                found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
                if {e.name: (e.dtype, list(e.shape)) for e in entries} != {
                    name: (part.get_dtype(), list(part.get_shape())) for name, part in found.items()
                }:
                    raise CheckpointError(f"{path}: was not written as planned; remove it and run again")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: the safetensors library cannot read it back: {error}") from error


def model_card(base_model: str | None, facts: dict[str, object], made: str) -> str:
    """A model card: YAML with base model and tags, a paragraph with how it was ``made``, and the provenance as JSON."""
    base = f"base_model: {json.dumps(base_model)}\n" if base_model else ""
    return (
        f"---\nlibrary_name: transformers\n{base}tags:\n- relexio\n- rlvr\n- weight-extrapolation\n---\n\n"
        f"# Predicted checkpoint, step {facts['step']}\n\n"
        f"These weights were not trained. {made} How well they do their task is for an evaluation to say.\n\n"
        f"```json\n{json.dumps(facts, indent=2)}\n```\n"
    )
