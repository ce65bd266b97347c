"""Cut the demo's trajectory out of checkpoint directories of a real run.

usage: python tools/evidence/make_demo.py BASE STEPS_DIRECTORY PROMPTS.jsonl relexio/verbs/demo/run.xz
"""

import json
import lzma
import struct
import sys
from pathlib import Path

import numpy as np

from relexio.checkpoints.layout import find_steps
from relexio.checkpoints.safetensors import HuggingFace, open_directory

STEPS = [*range(5, 51, 5), 200]


def bits(checkpoint: HuggingFace) -> np.ndarray:
    (shard,) = checkpoint.shards
    return np.frombuffer(shard.path.read_bytes()[8 + len(shard.header) :], "<u2")


def planes(array: np.ndarray) -> bytes:
    """All low bytes, then all high bytes."""
    halves = np.ascontiguousarray(array, "<u2").view(np.uint8).reshape(*array.shape, 2)
    return np.moveaxis(halves, -1, 0).tobytes()


def main(base_path: str, steps_path: str, prompts: str, out: str) -> None:
    base = open_directory(Path(base_path))
    steps = [open_directory(find_steps(Path(steps_path))[0][step], step) for step in STEPS]
    values = np.stack([bits(base), *map(bits, steps)], axis=1)
    head = {
        "steps": STEPS,
        "elements": len(values),
        "header": base.shards[0].header.decode(),
        "base_files": {name: path.read_text() for name, path in base.side.items()},
        "step_files": {name: path.read_text() for name, path in steps[0].side.items()},
        "problems": [[p["prompt"], p["answer"]] for p in map(json.loads, Path(prompts).read_text().splitlines())],
    }
    text = json.dumps(head).encode()
    raw = struct.pack("<Q", len(text)) + text + planes(values[:, 0]) + planes(values[:, 1:] ^ values[:, :-1])
    Path(out).write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(*sys.argv[1:])
