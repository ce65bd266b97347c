"""The models whose delta chains real trainers wrote (tests/deltas), by a formula, and the chains, for tests."""

import tarfile
from pathlib import Path

import numpy as np

from tests.support.make import BF16, Tensors

ARCHIVE = Path(__file__).parents[1] / "deltas" / "chains.tar.xz"
#: The chains, and how the versions of each are named.
CHAINS = {
    "slime-xor": "weight_v{:06d}", "slime-overwrite": "weight_v{:06d}", "miles-xor": "weight_v{:06d}",
    "miles-overwrite": "weight_v{:06d}", "skyrl": "delta-{:08d}",
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (48, 40), "model.layers.0.mlp.down_proj.weight": (24, 40),
    "model.layers.0.self_attn.q_proj.weight": (40, 40), "model.norm.weight": (40,), "model.router.bias": (8,),
}  # fmt: skip
VERSIONS = (1, 2, 3, 4, 5)
#: In this version nothing changes; the last leaves one tensor as it was.
STILL, LEFT = 3, "model.norm.weight"


def _noise(count: int, seed: int) -> np.ndarray:
    """Numbers of 64 bits that look random (SplitMix64)."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64(1000003 * seed)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def model(version: int) -> Tensors:
    """All tensors at a version; 0 is the base."""
    tensors: Tensors = {}
    for place, (name, shape) in enumerate(SHAPES.items(), 1):
        count, wide = int(np.prod(shape)), name.endswith("bias")
        noise = _noise(count, place)
        bits = (noise % 0x800 + 0x3C00).astype(np.uint32) if not wide else (noise % 2**24 + 2**29).astype(np.uint32)
        for one in range(1, version + 1):
            if one != STILL and (one, name) != (VERSIONS[-1], LEFT):
                change = _noise(count, 100 * one + place)
                bits ^= np.where(change % 7 == 0, 1 + change // 7 % 5, 0).astype(np.uint32)
        tensors[name] = (bits.view("f4") if wide else bits.astype("u2").view(BF16)).reshape(shape)
    return tensors


def unpack(out: Path) -> Path:
    """All chains, each in a directory of its own."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(out, filter="data")
    return out
