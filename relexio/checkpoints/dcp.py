"""Torch distributed checkpoints (DCP) as accelerate writes them under FSDP2: ``pytorch_model_fsdp_0`` in ``checkpoint-N``.

``.metadata`` says which chunks a tensor has and where each is: a torch file of one tensor, in the bytes of another file.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from relexio.checkpoints.converters import accelerate_merger
from relexio.checkpoints.files import File, inside, is_file, side_files
from relexio.checkpoints.pieces import Piece, Pieced, Where, piece_of, present, tiled
from relexio.checkpoints.torch_file import DTYPES, TENSOR_NAMES, counts, read_torch
from relexio.checkpoints.unpickle import MAX_PICKLE, Global, Record, loads
from relexio.dtypes import Table, tensor_bytes
from relexio.errors import CheckpointError, IncompleteError

_FOLDER, _METADATA = "pytorch_model_fsdp_0", ".metadata"
_FILE = re.compile(r"__\d{1,6}_\d{1,6}\.distcp")
_HOME = "torch.distributed.checkpoint"
_CLASSES = (
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
    "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_PATHS = {f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")}
_KNOWN = {
    *(f"{_HOME}.metadata.{name}" for name in _CLASSES),
    f"{_HOME}.filesystem._StorageInfo",
    *_PATHS,
    *TENSOR_NAMES,
}
_NAMES = frozenset(TENSOR_NAMES)


class _Item(NamedTuple):
    """A chunk: the place of its first element in the tensor, and the bytes of the file that hold a torch file of it."""

    offsets: tuple[int, ...]
    file: str
    start: int
    size: int


def weight_files(path: Path) -> list[Path]:
    """The files of chunks, and what says where they are; none unless accelerate wrote them."""
    folder = path if path.name == _FOLDER else path / _FOLDER
    files = sorted(file for file in folder.glob("__*.distcp") if _FILE.fullmatch(file.name) and is_file(file))
    return [*files, *[folder / _METADATA] * is_file(folder / _METADATA)]


def open_directory(path: Path, step: int | None = None, top: Path | None = None) -> Pieced:
    """Read where all chunks are, and list the side files. Raises as ``layout.open_checkpoint``."""
    folder = present(path, weight_files(path))[0].parent
    metadata = _metadata(folder)
    try:
        table, items = _table(metadata), _items(metadata)
        _assert_apart(items)
    except CheckpointError as error:
        raise type(error)(f"{folder / _METADATA}: {error}") from error
    files = _files(folder, sorted({item.file for chunks in items.values() for item in chunks}))
    pieces = {}
    for name, (dtype, shape) in table.items():
        try:
            pieces[name] = _pieces(folder, items.get(name, []), dtype, shape, list(files))
        except CheckpointError as error:
            raise type(error)(f"{folder}: tensor {name}: {error}") from error
    stored = [file.relative_to(path).as_posix() for file in weight_files(path)]
    side = side_files(path, stored)
    return Pieced(Where(path, step, top, side, (*side, *stored)), tuple(files.values()), table, pieces)


def _metadata(folder: Path) -> dict[str, Any]:
    file = folder / _METADATA
    if not is_file(file):
        raise IncompleteError(f"{file}: missing; DCP writes it last, when all ranks are done")
    with open(inside(folder, file), "rb") as opened:
        data = opened.read(MAX_PICKLE + 1)
    try:
        value = loads(data, _KNOWN)
        return _state(value, "Metadata")
    except CheckpointError as error:
        raise type(error)(f"{file}: {error}") from error


def _state(value: Any, kind: str) -> dict[str, Any]:
    if not isinstance(value, Record) or value.kind.rpartition(".")[2] != kind or not isinstance(value.state, dict):
        raise CheckpointError(f"has something else where {kind} should be; copy it again")
    return value.state


def _name(value: Any, paths: Any) -> str | None:
    """The name of a tensor of the model, which accelerate keeps below ``model``; None for anything else."""
    path = paths.get(value) if isinstance(paths, dict) and isinstance(value, str) else None
    if isinstance(path, tuple) and len(path) == 2 and path[0] == "model" and isinstance(path[1], str):
        return path[1]
    return None


def _table(metadata: dict[str, Any]) -> Table:
    """The tensors of the model."""
    table: Table = {}
    held = metadata.get("state_dict_metadata")
    for key, value in held.items() if isinstance(held, dict) else ():
        name = _name(key, metadata.get("planner_data"))
        if name is None:
            raise CheckpointError(f"holds {str(key)[:80]!r}, which is not below 'model', as accelerate writes a model")
        state = _state(value, "TensorStorageMetadata")
        properties = state.get("properties")
        fields = properties.state if isinstance(properties, Record) else None
        kind = fields[0] if isinstance(fields, tuple) and fields else None
        dtype = DTYPES.get(kind.name.removeprefix("torch.")) if isinstance(kind, Global) else None
        if dtype is None:
            raise CheckpointError(f"tensor {name}: its dtype is unknown")
        table[name] = dtype, counts(state.get("size"), "size")
    if not table:
        raise CheckpointError("holds no tensor")
    return table


def _items(metadata: dict[str, Any]) -> dict[str, list[_Item]]:
    """The chunks of each tensor."""
    items: dict[str, list[_Item]] = {}
    held = metadata.get("storage_data")
    for key, value in held.items() if isinstance(held, dict) else ():
        index, info = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
        name = _name(index.get("fqn"), metadata.get("planner_data"))
        file = info.get("relative_path")
        if name is None or not isinstance(file, str) or not _FILE.fullmatch(file):
            raise CheckpointError(f"names a file outside its directory: {str(file)[:80]!r}")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"tensor {name}: its bytes were transformed; save it again without")
        start, size = counts((info.get("offset"), info.get("length")), "place")
        items.setdefault(name, []).append(_Item(counts(index.get("offset"), "offset"), file, start, size))
    return items


def _assert_apart(items: dict[str, list[_Item]]) -> None:
    """Raise CheckpointError if two chunks are in the same bytes."""
    spans = sorted((item.file, item.start, item.size) for chunks in items.values() for item in chunks)
    for before, after in pairwise(spans):
        if before[0] == after[0] and before[1] + before[2] > after[1]:
            raise CheckpointError(f"two chunks overlap in {after[0]}, at byte {after[1]:,}")


def _files(folder: Path, names: list[str]) -> dict[str, File]:
    files = {}
    for name in names:
        if not is_file(folder / name):
            raise IncompleteError(f"{folder / name}: missing; copy the files of all ranks")
        stat = inside(folder, folder / name).stat()
        files[name] = File((folder / name).absolute(), stat.st_size, stat.st_mtime_ns)
    return files


def _pieces(
    folder: Path, items: list[_Item], dtype: str, shape: tuple[int, ...], files: list[str]
) -> tuple[Piece, ...]:
    pieces = []
    row = tensor_bytes(dtype, shape[1:])
    for item in items:
        _, contents = read_torch(folder / item.file, _NAMES, (item.start, item.size))
        array = contents.array(contents.value)
        if array is None or array.dtype != dtype or len(item.offsets) != len(array.shape):
            raise CheckpointError(f"its chunk in {item.file} is something else")
        if any(item.offsets[1:]) or array.shape[1:] != shape[1:] or len(array.shape) != len(shape):
            merge = accelerate_merger(folder, folder.parent)
            raise CheckpointError(f"is sharded along another dimension than 0; merge it: {merge}")
        piece = piece_of(array, files.index(item.file), item.offsets[0] * row if shape else 0)
        pieces += [] if piece is None else [piece]
    return tiled(pieces, dtype, shape)
