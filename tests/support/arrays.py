"""Checkpoints that are NumPy arrays in memory, as a source that is no directory of safetensors files."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from relexio.checkpoints.files import File
from relexio.checkpoints.protocol import Checkpoint
from relexio.dtypes import Table
from tests.support.make import NAMES, Run, Tensors


@dataclass
class Arrays(Checkpoint):
    """Arrays by name, with side files as bytes; ``step`` is None for the base."""

    step: int | None
    arrays: Tensors
    side: dict[str, bytes] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    directory: Path | None = None

    def __post_init__(self) -> None:
        self.label = f"step {self.step} (arrays)" if self.step is not None else "base (arrays)"
        self.source = "arrays in memory"
        self.tensors: Table = {name: (NAMES[a.dtype.name], a.shape) for name, a in self.arrays.items()}

    def read(self, name: str, first_byte: int, out: memoryview) -> None:
        """Fill ``out`` with a tensor's bytes."""
        data = np.ascontiguousarray(self.arrays[name]).reshape(-1).view(np.uint8)
        out[:] = data.data[first_byte : first_byte + len(out)]


def arrays_of(run: Run, side: dict[str, bytes] | None = None) -> tuple[Arrays, dict[int, Arrays]]:
    """Base and steps of a made-up run as arrays."""
    side = {} if side is None else side
    return Arrays(None, run.base, side), {step: Arrays(step, tensors, side) for step, tensors in run.steps.items()}
