"""Predictions held against the float64 truth."""

from pathlib import Path

import numpy as np

from tests.support.make import BF16, differing, load_checkpoint

DTYPES = [BF16, np.dtype("float16"), np.dtype("float32")]


#: Save ties: two of a million elements may differ.
ALLOWED = 2e-6


def agree(found: Path, truth: dict[str, np.ndarray]) -> None:
    wrong, total = differing(load_checkpoint(found), truth)
    assert wrong <= max(ALLOWED * total, 0), f"{wrong} of {total} elements differ"
