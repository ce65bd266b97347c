"""The demo's run: Qwen2 architecture, 1.6 M parameters, trained by GRPO to add numbers (lr 3e-6, a checkpoint each step).

The package holds the base, every fifth step up to 50, and step 200.
"""

import json
import lzma
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

WINDOW_END = 50
TARGET = 200


@dataclass(frozen=True)
class Run:
    """Directories of the base and of the steps, and the held-out problems as (prompt, answer)."""

    base: Path
    checkpoints: Path
    problems: list[tuple[str, str]]

    def step(self, step: int) -> Path:
        """The directory of one step."""
        return self.checkpoints / f"global_step_{step}"


def unpack(directory: Path) -> Run:
    """Write base and steps below ``directory`` as Hugging Face checkpoint directories, as training saved them."""
    raw = lzma.decompress(resources.files("relexio.verbs.demo").joinpath("run.xz").read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    head = json.loads(raw[8 : 8 + length])
    count, steps = head["elements"], head["steps"]
    planes = np.frombuffer(raw, np.uint8, offset=8 + length)
    bits = _merge(planes[: 2 * count], count, 1)[:, 0]
    changes = _merge(planes[2 * count :], count, len(steps))
    run = Run(directory / "base", directory / "checkpoints", [tuple(pair) for pair in head["problems"]])
    _write(run.base, head["header"], bits, head["base_files"])
    for column, step in enumerate(steps):
        bits = bits ^ changes[:, column]
        _write(run.step(step), head["header"], bits, head["step_files"])
    return run


def _merge(planes: np.ndarray, rows: int, columns: int) -> np.ndarray:
    low, high = planes.reshape(2, rows, columns)
    return low | high.astype(np.uint16) << 8


def _write(directory: Path, header: str, bits: np.ndarray, files: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    text = header.encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bits.astype("<u2").tobytes())
    for name, content in files.items():
        (directory / name).write_text(content)
