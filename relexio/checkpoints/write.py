"""Writing a checkpoint block by block: every header is known in advance, so nothing ever holds a whole tensor."""

import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from relexio.checkpoints.files import SINGLE
from relexio.checkpoints.header import header_for_transformers, header_of, parse_header
from relexio.checkpoints.match import written_from
from relexio.checkpoints.record import CheckpointRecord
from relexio.dtypes import Table
from relexio.errors import CheckpointError, StoreError

CARD = "README.md"
PROVENANCE = "relexio.json"


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to be written: its name, its header (JSON bytes, padded), and its size in bytes.

    ``places`` has the first byte of each tensor in it, and the name of the stored one that it is written from.
    """

    name: str
    header: bytes
    size: int
    places: tuple[tuple[str, int], ...]


def output_files(
    record: CheckpointRecord, table: Table, read: Callable[[str], bytes], shown: str, loadable: bool = False
) -> list[OutputFile]:
    """The files that a stored checkpoint's tensors are written into: those it had, or one if it had no safetensors files.

    ``read`` gives the bytes of a stored file, ``shown`` is how errors name the store. ``loadable`` changes headers where
    ``from_pretrained`` would not take them. Raises StoreError where a header does not fit the tensor table.
    """
    change = header_for_transformers if loadable else bytes
    if not record.from_safetensors:
        return [_output_file(SINGLE, header_of(table), record.nbytes(table), table, shown, change)]
    return [
        _output_file(shard.name, read(shard.header), shard.size, table, f"{shown}: {shard.header}", change)
        for shard in record.shards
    ]


def _output_file(
    name: str, header: bytes, size: int, table: Table, shown: str, change: Callable[[bytes], bytes]
) -> OutputFile:
    entries = parse_header(header, size, shown)
    for entry in entries:
        # a tensor longer in the table than in its file would be written over the next one
        if (entry.dtype, entry.shape) != table.get(written_from(entry.name, table)):
            raise StoreError(f"{shown}: tensor {entry.name} is not as in the table; the store is damaged")
    changed = change(header)
    longer = len(changed) - len(header)
    places = tuple((written_from(entry.name, table), entry.start + longer) for entry in entries)
    return OutputFile(name, changed, size + longer, places)


@dataclass(frozen=True)
class Output:
    """A checkpoint directory being written, with the places of every tensor. Can be sent to other processes."""

    directory: str
    places: dict[str, list[tuple[str, int]]]

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, from byte ``offset`` of it on, wherever it is stored; nowhere if the files lack it."""
        for name, start in self.places.get(tensor, ()):
            fd = os.open(Path(self.directory, name), os.O_WRONLY)
            try:
                done = 0
                while done < len(data):
                    done += os.pwrite(fd, data[done:], start + offset + done)
            finally:
                os.close(fd)


def begin(directory: Path, shards: Iterable[OutputFile]) -> Output:
    """Create the files of a checkpoint at their final size, headers written, in an existing empty directory.

    Raises OSError (ENOSPC) at once where the disk cannot hold them.
    """
    places: dict[str, list[tuple[str, int]]] = {}
    for shard in shards:
        with open(directory / shard.name, "xb") as file:
            file.write(struct.pack("<Q", len(shard.header)) + shard.header)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, shard.size)
            else:
                os.truncate(file.fileno(), shard.size)
        for tensor, start in shard.places:
            places.setdefault(tensor, []).append((shard.name, start))
    return Output(str(directory.absolute()), places)


def without_clashes(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """The side files, in order, that clash neither with files that are ``taken`` nor with those before them.

    A file and a directory cannot have one name (``README.md`` and ``README.md/x``).
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


def validate(directory: Path, expected: Iterable[OutputFile]) -> None:
    """Open every shard with the safetensors library; names, shapes and dtypes must be the header's.

    Raises CheckpointError naming the file.
    """
    from safetensors import SafetensorError, safe_open

    for shard in expected:
        path = directory / shard.name
        entries = parse_header(shard.header, path.stat().st_size, path)
        try:
            with safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
                if {e.name: (e.dtype, list(e.shape)) for e in entries} != {
                    name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()
                }:
                    raise CheckpointError(f"{path}: was not written as planned; remove it and run again")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: the safetensors library cannot read it back: {error}") from error


def model_card(base_model: str | None, facts: dict[str, object], made: str) -> str:
    """A model card: YAML with base model and tags, a paragraph with how it was ``made``, and the provenance as JSON."""
    base = f"base_model: {json.dumps(base_model)}\n" if base_model else ""
    title = "Mixed checkpoint" if facts["step"] is None else f"Predicted checkpoint, step {facts['step']}"
    return (
        f"---\nlibrary_name: transformers\n{base}tags:\n- relexio\n- rlvr\n- weight-extrapolation\n---\n\n"
        f"# {title}\n\n"
        f"These weights were not trained. {made} How well they do their task is for an evaluation to say.\n\n"
        f"```json\n{json.dumps(facts, indent=2)}\n```\n"
    )
