"""FSDP shards as verl and SkyRL write them: ``model_world_size_W_rank_R.pt``, one file for each rank, read as one model."""

import re
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path

from relexio.checkpoints.converters import MergeableError, verl_merger
from relexio.checkpoints.dtensor import SHARD_NAMES, Local, local_of
from relexio.checkpoints.files import File, inside, is_file, side_files
from relexio.checkpoints.lora_state import BESIDE
from relexio.checkpoints.pieces import Piece, Pieced, Where, piece_of, present, tiled
from relexio.checkpoints.torch_file import Contents, read_torch, state_dict
from relexio.dtypes import BITS, Table
from relexio.errors import CheckpointError, IncompleteError

_NAME = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")

#: What the file of each rank, in the order of the shards, says of the tensors.
Ranks = tuple[Mapping[str, Local], ...]


def weight_files(path: Path) -> list[Path]:
    """The files of the ranks in a directory, by rank."""
    found = [
        (int(match[2]), file) for file in path.glob("model_world_size_*.pt") if (match := _NAME.fullmatch(file.name))
    ]
    return [file for _, file in sorted(found) if is_file(file)]


def open_directory(path: Path, step: int | None = None, top: Path | None = None) -> Pieced:
    """Read what the files of the ranks say, and list the side files. Raises as ``layout.open_checkpoint``."""
    ranks = _ranks(path)
    read = [_read(path, *next(iter(ranks.items())))]
    shards = max(local.shards for local in read[0][1].values())
    chosen = {}
    for index in range(shards):
        rank = next((rank for rank in range(index, max(ranks) + 1, shards) if rank in ranks), None)
        if rank is None:
            missing = next(iter(ranks.values())).name.rpartition("_")[0]
            raise IncompleteError(f"{path / f'{missing}_{index}.pt'}: missing; copy the files of all ranks")
        chosen[rank] = ranks[rank]
    read = [_read(path, rank, file) for rank, file in chosen.items()]
    try:
        tensors, pieces = _together(tuple(locals_ for _, locals_ in read))
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    names = {file.name for file in ranks.values()}
    below = path / BESIDE
    side = side_files(below, ()) if below.is_dir() and not below.is_symlink() else side_files(path, names)
    prefix = f"{BESIDE}/" if below.is_dir() and not below.is_symlink() else ""
    where = Where(path, step, top, side, (*names, *(prefix + name for name in side)))
    return Pieced(where, tuple(file for file, _ in read), tensors, pieces)


def _ranks(path: Path) -> dict[int, Path]:
    """The files by rank, all of one world size."""
    files = {match: file for file in present(path, weight_files(path)) if (match := _NAME.fullmatch(file.name))}
    sizes = sorted({int(match[1]) for match in files})
    if len(sizes) > 1:
        raise CheckpointError(
            f"{path}: holds the shards of runs on {sizes[0]} and {sizes[1]} ranks; move those away that are not its own"
        )
    return {int(match[2]): inside(path, file) for match, file in files.items()}


def _read(path: Path, rank: int, file: Path) -> tuple[File, Mapping[str, Local]]:
    found, contents = read_torch(file, SHARD_NAMES)
    merger = verl_merger("fsdp", path, path / BESIDE)
    try:
        table = locals_of(contents)
    except MergeableError as error:
        raise CheckpointError(f"{file}: {error}; merge the shards, and then this again: {merger}") from error
    except CheckpointError as error:
        raise type(error)(f"{file}: {error}") from error
    writers = {local.rank for local in table.values() if local.rank is not None}
    if writers - {rank}:
        raise CheckpointError(f"{file}: was written by rank {min(writers - {rank})}; give it the name that it had")
    return found, table


@lru_cache(maxsize=512)
def locals_of(contents: Contents) -> Mapping[str, Local]:
    """The tensors of a file by name. Raises CheckpointError (which names no file)."""
    table = {}
    for name, value in state_dict(contents).items():
        try:
            table[name] = local_of(value, contents)
        except CheckpointError as error:
            raise type(error)(f"tensor {name}: {error}") from error
    return table


def _together(ranks: Ranks) -> tuple[Table, dict[str, tuple[Piece, ...]]]:
    """The tensors of the whole model, and the pieces of each: the same objects where the files say the same."""
    return _whole(_Same(ranks))


class _Same:
    """A key by the identity of what ``locals_of`` gave, which steps share; it keeps them alive."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.ranks)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and list(map(id, self.ranks)) == list(map(id, other.ranks))


@lru_cache(maxsize=64)
def _whole(same: _Same) -> tuple[Table, dict[str, tuple[Piece, ...]]]:
    tensors: Table = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for rank in same.ranks:
        if odd := rank.keys() ^ same.ranks[0].keys():
            raise CheckpointError(f"tensor {min(odd)}: not in the files of all ranks; copy them again")
    for name, first in same.ranks[0].items():
        try:
            tensors[name] = first.array.dtype, first.shape
            pieces[name] = tiled(_pieces([rank[name] for rank in same.ranks]), *tensors[name])
        except CheckpointError as error:
            raise type(error)(f"tensor {name}: {error}") from error
    return tensors, pieces


def _pieces(parts: list[Local]) -> list[Piece]:
    """The pieces of one tensor: those of every shard, or all of it from the first file."""
    first, pieces = parts[0], []
    for number, part in enumerate(parts if first.shards > 1 else parts[:1]):
        kind = (part.shards, part.index, part.array.dtype, part.shape)
        if kind != (first.shards, number, first.array.dtype, first.shape) or first.shards not in (1, len(parts)):
            raise CheckpointError(
                f"shard {part.index} of {part.shards}, {part.array.dtype} of shape {list(part.shape)}, does not fit the other "
                f"ranks; copy the files of all ranks of one step"
            )
        row = prod(part.shape[1:]) * BITS[part.array.dtype] // 8
        piece = piece_of(part.array, number, part.rows[0] * row)
        pieces += [] if piece is None else [piece]
    return pieces
