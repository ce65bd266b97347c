"""An evaluation whose score is known: how near the sum of a checkpoint's float32 weights comes to a number."""

import array
import struct
import sys
from pathlib import Path


def score(checkpoint: Path, wanted: float) -> float:
    """Minus the distance of the sum to ``wanted``."""
    raw = (checkpoint / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return -abs(sum(array.array("f", raw[8 + length :])) - wanted)


if __name__ == "__main__":
    print("loading", file=sys.stderr)
    print("scores:\n\n", score(Path(sys.argv[1]), float(sys.argv[2])), "\n")
