"""The published method (RELEX, arXiv 2605.21468) as a dense two-pass stream: what bench.py holds relexio against.

usage: python tools/bench/yardstick.py STEPS BASE STEP OUT [--workers N] [--window 1:75] [--strength 1.0]

Pass 1 reads the base and every checkpoint of the window and sums the Gram matrix of each tensor's deltas. Pass 2 reads
them all again and writes the base plus the deltas' weighted sum. Nothing is compressed or kept, so each further target
costs both passes again. Deltas and products are float32, sums over blocks float64. Rank 1.
"""

import argparse
import os
import shutil
import struct
import threading
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from relexio.checkpoints.header import Entry
from relexio.checkpoints.layout import find_steps
from relexio.checkpoints.safetensors import HuggingFace, open_directory, read_exactly
from relexio.dtypes import BITS
from relexio.engine.process import cores
from relexio.words import parse_steps

BLOCK = 1 << 17  # elements; as fast as any from 2^16 to 2^20, in less memory than 2^20
WIDTH = {"BF16": 2, "F16": 2, "F32": 4}
Piece = tuple[Entry, int, int]  # a run of one tensor's elements: the tensor, the first element, how many
Run = Callable[..., Iterator[Any]]  # ``map`` in several threads


class Files:
    """The base and the checkpoints of the window, held open; every thread reads into buffers of its own."""

    def __init__(self, base: HuggingFace, steps: list[HuggingFace]) -> None:
        self.base, self.all = base, [base, *steps]
        paths = [shard.path for checkpoint in self.all for shard in checkpoint.shards]
        self.open = {path: os.open(path, os.O_RDONLY) for path in paths}
        self.own = threading.local()

    def read(self, checkpoint: HuggingFace, piece: Piece, out: np.ndarray) -> None:
        """Fill ``out`` with the bytes of a piece in one checkpoint."""
        path, entry = checkpoint.locate(piece[0].name)
        skipped = piece[1] * WIDTH.get(piece[0].dtype, 1)
        read_exactly(self.open[path], entry.start + skipped, out.data.cast("B"), path)

    def deltas(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """theta_0 [n] and the deltas [T, n] of a piece, float32, in this thread's buffers until its next call."""
        entry, _, count = piece
        if not hasattr(self.own, "deltas"):
            self.own.deltas = np.empty((len(self.all) - 1, BLOCK), np.float32)
            self.own.raw = np.empty(BLOCK, np.uint32)
            self.own.wide, self.own.base = np.empty((2, BLOCK), np.float32)
        raw = self.own.raw.view("u2" if WIDTH[entry.dtype] == 2 else "u4")[:count]
        base, wide, deltas = (own[..., :count] for own in (self.own.base, self.own.wide, self.own.deltas))
        self.read(self.base, piece, raw)
        to_float32(raw, entry.dtype, base)
        for row, checkpoint in zip(deltas, self.all[1:], strict=True):
            self.read(checkpoint, piece, raw)
            np.subtract(to_float32(raw, entry.dtype, wide), base, out=row)
        return base, deltas

    def pieces(self, kinds: Container[str] = BITS) -> Iterator[Piece]:
        """Tensors of these types in runs of at most ``BLOCK`` elements (bytes for what is no float)."""
        for entry in (entry for shard in self.base.shards for entry in shard.entries if entry.dtype in kinds):
            size = entry.nbytes // WIDTH.get(entry.dtype, 1)
            yield from ((entry, first, min(BLOCK, size - first)) for first in range(0, size, BLOCK))


def to_float32(bits: np.ndarray, dtype: str, out: np.ndarray) -> np.ndarray:
    """The values of element bits, in ``out``."""
    if dtype == "BF16":
        return np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32).view(np.float32)
    out[:] = bits.view(np.float16 if dtype == "F16" else np.float32)
    return out


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to the tensor's type, to nearest even."""
    if dtype != "BF16":
        return values.astype(np.float16 if dtype == "F16" else np.float32)
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def weights(gram: np.ndarray, steps: np.ndarray, target: int, strength: float) -> np.ndarray:
    """How much of each delta the prediction takes [T]: a line through the first direction's coefficients."""
    if not gram.any():
        return np.zeros(len(steps), np.float32)
    values, vectors = np.linalg.eigh(gram)
    sigma, u = np.sqrt(values[-1]), vectors[:, -1]
    slope, intercept = np.polyfit(steps, sigma * u, 1)
    return (strength * (slope * target + intercept) / sigma * u).astype(np.float32)


def fit(files: Files, run: Run, steps: np.ndarray, target: int, strength: float) -> dict[str, np.ndarray]:
    """Pass 1: the weights [T] of every float tensor."""

    def gram(piece: Piece) -> tuple[str, np.ndarray]:
        deltas = files.deltas(piece)[1]
        return piece[0].name, deltas @ deltas.T

    grams: dict[str, np.ndarray] = {}
    for name, part in run(gram, files.pieces(WIDTH)):
        grams[name] = grams.get(name, 0.0) + part.astype(np.float64)
    return {name: weights(gram, steps, target, strength) for name, gram in grams.items()}


def write(files: Files, run: Run, found: dict[str, np.ndarray], out: Path) -> None:
    """Pass 2: base plus weighted deltas, block by block into files laid out as the base's."""
    shutil.copytree(files.base.path, out, ignore=shutil.ignore_patterns("*.safetensors"))
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
        path = files.base.locate(entry.name)[0]
        os.pwrite(written[path], bits.data.cast("B"), entry.start + first * bits.itemsize)

    list(run(combine, files.pieces()))


def main() -> None:
    """Predict one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in (("steps", Path), ("base", Path), ("step", int), ("out", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--window", type=parse_steps)
    parser.add_argument("--strength", type=float, default=1.0)
    chosen = parser.parse_args()
    found, _ = find_steps(chosen.steps, chosen.window)
    files = Files(open_directory(chosen.base), list(map(open_directory, found.values())))
    with threadpool_limits(1), ThreadPoolExecutor(chosen.workers) as pool:
        taken = fit(files, pool.map, np.array(list(found), float), chosen.step, chosen.strength)
        write(files, pool.map, taken, chosen.out)


if __name__ == "__main__":
    main()
