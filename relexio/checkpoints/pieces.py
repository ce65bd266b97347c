"""Checkpoints whose tensors lie in pieces, in several files: each piece is a run of bytes of the tensor."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from relexio.checkpoints.disk import OnDisk, read_exactly
from relexio.checkpoints.files import File, left_out
from relexio.checkpoints.protocol import Read
from relexio.checkpoints.torch_file import Array
from relexio.dtypes import Table, tensor_bytes
from relexio.errors import CheckpointError, IncompleteError


@dataclass(frozen=True)
class Piece:
    """Bytes of a tensor from ``first`` on: where they begin in a file (by its number).

    They lie together, or row by row: ``row`` bytes each, ``pitch`` bytes from one to the next.
    """

    first: int
    nbytes: int
    file: int
    start: int
    row: int
    pitch: int


@dataclass(frozen=True)
class Where:
    """Where a checkpoint lies: the directory of its weights, that of all the trainer wrote, and what is stored of it.

    ``stored`` has the paths, inside ``path``, of its weights' files and of those beside them in ``side``.
    """

    path: Path
    step: int | None
    top: Path | None
    side: Mapping[str, Path]
    stored: tuple[str, ...]


class Pieced(OnDisk):
    """A checkpoint in pieces, at one training step (None: the base)."""

    def __init__(
        self, where: Where, files: tuple[File, ...], tensors: Table, pieces: Mapping[str, tuple[Piece, ...]]
    ) -> None:
        super().__init__()
        self.step, self.source = where.step, str(where.path.resolve())
        self.label = f"base {where.path}" if where.step is None else f"step {where.step} ({where.path})"
        self.side = dict(where.side)
        self.files, self.directory = files, where.top or where.path
        self.tensors, self._pieces, self._where = tensors, pieces, where

    @contextmanager
    def held(self, name: str, first_byte: int, nbytes: int) -> Iterator[Read]:
        """Keep one of the files of these bytes open, and read ahead in it: the one that was read last."""
        reader = _Reader(self, self._pieces[name], first_byte, first_byte + nbytes)
        try:
            yield reader.read
        finally:
            reader.close()

    def not_stored(self) -> dict[str, int]:
        """Bytes, by path, of everything that does not belong to the model; a directory of such files is one entry."""
        return left_out(self.directory or self._where.path, self._where.path, self._where.stored)


class _Reader:
    """Reads a range of a tensor's bytes, with one open file at a time."""

    def __init__(self, checkpoint: Pieced, pieces: tuple[Piece, ...], first: int, end: int) -> None:
        self._checkpoint, self._pieces, self._first, self._end = checkpoint, pieces, first, end
        self._starts = [piece.first for piece in pieces]
        self._fd, self._file = -1, -1
        if first < end:
            self._open(pieces[bisect_right(self._starts, first) - 1])

    def read(self, first: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            piece = self._pieces[bisect_right(self._starts, first + done) - 1]
            begin = first + done - piece.first
            count = min(piece.nbytes - begin, len(out) - done)
            self._read(piece, begin, out[done : done + count])
            done += count

    def _read(self, piece: Piece, begin: int, out: memoryview) -> None:
        if piece.file != self._file:
            self._open(piece)
        path, done = self._checkpoint.files[piece.file].path, 0
        while done < len(out):
            row, column = divmod(begin + done, piece.row)
            count = min(piece.row - column, len(out) - done)
            read_exactly(self._fd, piece.start + row * piece.pitch + column, out[done : done + count], path)
            done += count

    def _open(self, piece: Piece) -> None:
        self.close()
        begin, end = max(self._first - piece.first, 0), min(self._end - piece.first, piece.nbytes)
        begin, end = (at // piece.row * piece.pitch + at % piece.row for at in (begin, end))
        path = self._checkpoint.files[piece.file].path
        self._fd, self._file = self._checkpoint.descriptor(path, piece.start + begin, end - begin), piece.file

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._file = -1, -1


def present(path: Path, files: list[Path]) -> list[Path]:
    """The files that hold a model's weights. Raises IncompleteError if there are none: they were removed meanwhile."""
    if not files:
        raise IncompleteError(f"{path}: its files of weights are gone; leave it out, or copy it again")
    return files


def piece_of(array: Array, file: int, first: int = 0) -> Piece | None:
    """The piece that a tensor of a file is, from a byte of the whole on; None if it has no elements.

    Raises CheckpointError (which names no file) if neither it nor its rows lie together.
    """
    nbytes = tensor_bytes(array.dtype, array.shape)
    if not nbytes:
        return None
    rows = next((i for i, n in enumerate(array.shape) if n != 1), len(array.shape))  # the first dimension that counts
    expected = 1
    for n, stride in reversed(list(zip(array.shape, array.strides, strict=True))[rows + 1 :]):
        if n != 1 and stride != expected:
            raise CheckpointError(_SCATTERED)
        expected *= n
    together = rows == len(array.shape) or array.strides[rows] == expected
    if together:
        return Piece(first, nbytes, file, array.start, nbytes, nbytes)
    if expected == 1 or array.strides[rows] < expected:  # rows that overlap would make much of few bytes
        raise CheckpointError(_SCATTERED)
    return Piece(first, nbytes, file, array.start, expected * array.itemsize, array.strides[rows] * array.itemsize)


_SCATTERED = "its elements do not lie in order in the file; save a state dict of tensors that are .contiguous()"


def tiled(pieces: list[Piece], dtype: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The pieces in order. Raises CheckpointError (which names no file) unless they make up the tensor exactly."""
    ordered = tuple(sorted(pieces, key=lambda piece: piece.first))
    at = 0
    for piece in ordered:
        if piece.first != at:
            raise CheckpointError(
                f"its pieces {'overlap' if piece.first < at else 'leave a gap'} at byte {piece.first:,}"
            )
        at += piece.nbytes
    if at != tensor_bytes(dtype, shape):
        raise CheckpointError(
            f"its pieces have {at:,} bytes where {dtype} of shape {list(shape)} needs {tensor_bytes(dtype, shape):,}"
        )
    return ordered
