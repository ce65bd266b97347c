"""Models as torch files in Hugging Face layout: ``pytorch_model.bin``, or several with an index."""

from pathlib import Path
from typing import Any

from relexio.checkpoints.files import inside, is_file, side_files
from relexio.checkpoints.header import MAX_HEADER, parse_json
from relexio.checkpoints.pieces import Piece, Pieced, Where, piece_of, present
from relexio.checkpoints.torch_file import TENSOR_NAMES, Contents, read_torch, state_dict
from relexio.dtypes import Table
from relexio.errors import CheckpointError, IncompleteError

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_NAMES = frozenset(TENSOR_NAMES)


def weight_files(path: Path) -> list[Path]:
    """The torch files of a directory that can hold a whole model, or what is left: their index."""
    files = sorted(file for file in path.glob("pytorch_model*.bin") if is_file(file))
    return files or [path / INDEX] * is_file(path / INDEX)


def open_directory(path: Path, step: int | None = None, top: Path | None = None) -> Pieced:
    """Read what the files say, and list the side files. Raises as ``layout.open_checkpoint``."""
    index = path / INDEX
    weight_map = _weight_map(inside(path, index)) if is_file(index) else None
    names = sorted(set(weight_map.values())) if weight_map is not None else [_single(path).name]
    read = [_read(path, name) for name in names]
    tensors: Table = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for number, (file, contents) in enumerate(read):
        for name, value in state_dict(contents).items():
            if name in tensors:
                raise CheckpointError(f"{path}: two of its files hold tensor {name}")
            if weight_map is not None and weight_map.get(name) != file.path.name:
                raise CheckpointError(
                    f"{index}: tensor {name}: the index says {weight_map.get(name)}, but {file.path.name} holds it"
                )
            tensors[name], pieces[name] = _tensor(file.path, name, value, contents, number)
    if weight_map is not None and (absent := weight_map.keys() - tensors.keys()):
        raise CheckpointError(
            f"{index}: tensor {min(absent)}: the index says {weight_map[min(absent)]}, which does not hold it"
        )
    taken = {*names, *([INDEX] if weight_map is not None else [])}
    side = side_files(path, taken)
    return Pieced(Where(path, step, top, side, (*side, *taken)), tuple(file for file, _ in read), tensors, pieces)


def _read(path: Path, name: str) -> tuple[Any, Contents]:
    if not is_file(path / name):
        raise IncompleteError(f"{path / name}: the index names this file, but it is missing; copy it again")
    file, contents = read_torch(inside(path, path / name), _NAMES)
    try:
        state_dict(contents)
    except CheckpointError as error:
        raise type(error)(f"{path / name}: {error}") from error
    return file, contents


def _tensor(path: Path, name: str, value: Any, contents: Contents, number: int) -> tuple[Any, tuple[Piece, ...]]:
    try:
        array = contents.array(value)
        if array is None:
            raise CheckpointError("is no plain tensor; save the model's state_dict() alone")
        piece = piece_of(array, number)
    except CheckpointError as error:
        raise type(error)(f"{path}: tensor {name}: {error}") from error
    return (array.dtype, array.shape), () if piece is None else (piece,)


def _single(path: Path) -> Path:
    files = present(path, weight_files(path))
    if path / SINGLE in files:
        return path / SINGLE
    if len(files) > 1:
        raise IncompleteError(
            f"{path}: {len(files)} files pytorch_model*.bin and no {INDEX}; a file or the index is missing"
        )
    return files[0]


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > MAX_HEADER:
        raise CheckpointError(f"{index}: {index.stat().st_size:,} bytes, more than any index has; copy it again")
    weight_map = parse_json(index.read_bytes(), index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to file names")
    for name in set(weight_map.values()):
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index}: names a file outside its directory: {name!r}")
    return weight_map
