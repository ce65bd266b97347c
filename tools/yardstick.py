"""The published method (RELEX, arXiv 2605.21468) as a dense two-pass stream: what bench.py holds relexio against.

usage: python tools/yardstick.py STEPS BASE STEP OUT [--workers N] [--window 1:75] [--strength 1.0]

Pass 1 reads the base and every checkpoint of the window and sums the Gram matrix of each tensor's deltas. Pass 2 reads
them all again and writes the base plus the deltas' weighted sum. Nothing is compressed or kept, so each further target
costs both passes again. Deltas and products are float32, sums over blocks float64. Rank 1.
"""

import argparse
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from relexio.checkpoints.header import Entry
from relexio.checkpoints.layout import find_steps, parse_steps
from relexio.checkpoints.read import Checkpoint, open_checkpoint, read_exactly

BLOCK = 1 << 18  # elements; of 2^16 to 2^20 the fastest, if by little
WIDTH = {"BF16": 2, "F16": 2, "F32": 4}

Piece = tuple[Entry, int, int]  # a run of one tensor's elements: the tensor, the first element, how many


class Files:
    """The base and the checkpoints of the window, held open; every thread reads into buffers of its own."""

    def __init__(self, base: Checkpoint, steps: list[Checkpoint]) -> None:
        self.base, self.all = base, [base, *steps]
        paths = {place.path for checkpoint in self.all for place in checkpoint.locations.values()}
        self.open = {path: os.open(path, os.O_RDONLY) for path in paths}
        self.own = threading.local()

    def read(self, checkpoint: Checkpoint, piece: Piece, out: np.ndarray) -> None:
        """Fill ``out`` with the bytes of a piece in one checkpoint."""
        entry, first, _ = piece
        place = checkpoint.locations[entry.name]
        at = place.start + first * WIDTH.get(entry.dtype, 1)
        read_exactly(self.open[place.path], at, memoryview(out).cast("B"), place.path)

    def deltas(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """theta_0 [n] and the deltas [T, n] of a piece, float32, in this thread's buffers until its next call."""
        entry, _, count = piece
        if not hasattr(self.own, "deltas"):
            self.own.deltas = np.empty((len(self.all) - 1) * BLOCK, np.float32)
            self.own.raw, self.own.wide, self.own.base = (np.empty(BLOCK, np.uint32) for _ in range(3))
        raw = self.own.raw.view("u2" if WIDTH[entry.dtype] == 2 else "u4")[:count]
        base, wide = self.own.base[:count].view(np.float32), self.own.wide[:count].view(np.float32)
        deltas = self.own.deltas[: (len(self.all) - 1) * count].reshape(-1, count)
        self.read(self.base, piece, raw)
        base[:] = to_float32(raw, entry.dtype, wide)
        for row, checkpoint in zip(deltas, self.all[1:], strict=True):
            self.read(checkpoint, piece, raw)
            np.subtract(to_float32(raw, entry.dtype, wide), base, out=row)
        return base, deltas

    def pieces(self) -> Iterator[Piece]:
        """Every tensor in runs of at most ``BLOCK`` elements (bytes for what is no float)."""
        for entry in self.base.entries.values():
            size = entry.nbytes // WIDTH.get(entry.dtype, 1)
            yield from ((entry, first, min(BLOCK, size - first)) for first in range(0, size, BLOCK))


def to_float32(bits: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """The values of element bits, in ``out`` or where they stand."""
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F16":
        out[:] = bits.view(np.float16)
    else:
        np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32)
    return out


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to the tensor's type, to nearest even."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def weights(gram: np.ndarray, steps: np.ndarray, target: int, strength: float) -> np.ndarray:
    """How much of each delta the prediction takes [T]: a line through the first direction's coefficients."""
    values, vectors = np.linalg.eigh(gram)
    sigma, u = np.sqrt(max(values[-1], 0.0)), vectors[:, -1]
    if sigma == 0.0:
        return np.zeros(len(steps), np.float32)
    slope, intercept = np.polyfit(steps, sigma * u, 1)
    return (strength * (slope * target + intercept) / sigma * u).astype(np.float32)


def fit(files: Files, run: Callable, steps: np.ndarray, target: int, strength: float) -> dict[str, np.ndarray]:
    """Pass 1: the weights [T] of every float tensor."""

    def gram(piece: Piece) -> tuple[str, np.ndarray]:
        deltas = files.deltas(piece)[1]
        return piece[0].name, deltas @ deltas.T

    grams: dict[str, np.ndarray] = {}
    for name, part in run(gram, (piece for piece in files.pieces() if piece[0].dtype in WIDTH)):
        grams[name] = grams.get(name, 0.0) + part.astype(np.float64)
    return {name: weights(gram, steps, target, strength) for name, gram in grams.items()}


def write(files: Files, run: Callable, found: dict[str, np.ndarray], out: Path) -> None:
    """Pass 2: base plus weighted deltas, block by block into files laid out as the base's."""
    out.mkdir(parents=True)
    for side in (path for path in files.base.path.iterdir() if path.is_file() and path.suffix != ".safetensors"):
        shutil.copy(side, out)
    for shard in files.base.shards:
        (out / shard.path.name).write_bytes(struct.pack("<Q", len(shard.header)) + shard.header)
    written = {shard.path: os.open(out / shard.path.name, os.O_WRONLY) for shard in files.base.shards}

    def combine(piece: Piece) -> None:
        entry, first, count = piece
        if entry.name in found:
            base, deltas = files.deltas(piece)
            base += found[entry.name] @ deltas
            bits = to_bits(base, entry.dtype)
        else:  # what is no float is taken from the last step
            bits = np.empty(count, np.uint8)
            files.read(files.all[-1], piece, bits)
        place = files.base.locations[entry.name]
        os.pwrite(written[place.path], memoryview(bits).cast("B"), place.start + first * bits.itemsize)

    for _ in run(combine, files.pieces()):
        pass


def main() -> None:
    """Predict one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("step", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--window", type=parse_steps)
    parser.add_argument("--strength", type=float, default=1.0)
    chosen = parser.parse_args()
    found, _ = find_steps(chosen.steps, chosen.window)
    files = Files(open_checkpoint(chosen.base), [open_checkpoint(path, step) for step, path in found.items()])
    with threadpool_limits(1), ThreadPoolExecutor(chosen.workers) as pool:
        window = np.array(list(found), float)
        write(files, pool.map, fit(files, pool.map, window, chosen.step, chosen.strength), chosen.out)


if __name__ == "__main__":
    main()
