"""Checkpoint directories for tests, and the float64 truth that predictions are held against."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

NAMES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32",
    "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
CONFIG = {"config.json": '{"architectures": ["Qwen2ForCausalLM"]}\n', "tokenizer.json": '{"version": "1.0"}\n'}

Tensors = dict[str, np.ndarray]


def save_file(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file with NumPy alone."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    at = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def load_file(path: Path) -> Tensors:
    """Read one safetensors file with NumPy alone."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    types = {name: np.dtype(getattr(ml_dtypes, kind, None) or kind) for kind, name in NAMES.items()}
    found = {}
    for name, entry in table.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(raw[start:end], types[entry["dtype"]]).reshape(entry["shape"])
    return found


def save_checkpoint(directory: Path, tensors: Tensors, shards: int = 1, side: dict[str, str] | None = None) -> Path:
    """Write a checkpoint directory in Hugging Face layout, in one file or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (CONFIG if side is None else side).items():
        (directory / name).write_text(text)
    if shards == 1:
        save_file(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(directory / file, part)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def load_checkpoint(directory: Path) -> Tensors:
    """All tensors of a checkpoint directory."""
    found: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


@dataclass
class Run:
    """A made-up training run on disk."""

    root: Path
    base: Tensors
    steps: dict[int, Tensors]
    shards: int = 1
    pattern: str = "global_step_{}"
    base_path: Path = field(init=False)
    steps_path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.base_path = save_checkpoint(self.root / "base", self.base, self.shards)
        self.steps_path = self.root / "steps"
        for step, tensors in self.steps.items():
            save_checkpoint(self.steps_path / self.pattern.format(step), tensors, self.shards)


SHAPES = {"model.embed_tokens.weight": (40, 24), "model.layers.0.q_proj.weight": (33, 31), "model.norm.weight": (24,)}


def move(
    base: Tensors, steps: list[int], seed: int = 0, size: float = 2e-4, noise: float = 0.2, still: tuple[str, ...] = ()
) -> dict[int, Tensors]:
    """Checkpoints along one direction a tensor at a constant speed, with noise; integer tensors stay as they are."""
    rng = np.random.default_rng(seed)
    result: dict[int, Tensors] = {step: {} for step in steps}
    for name, array in base.items():
        direction = rng.standard_normal(array.shape)
        for step in steps:
            if name in still or array.dtype.kind in "iub" or array.dtype == FP8:
                result[step][name] = array
            else:
                wobble = noise * np.sqrt(step) * rng.standard_normal(array.shape)
                moved = array.astype(np.float64) + size * (step * direction + wobble)
                result[step][name] = moved.astype(np.float32).astype(array.dtype)
    return result


def base_tensors(dtype: np.dtype, seed: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Tensors:
    """Random base weights."""
    rng = np.random.default_rng(seed)
    return {name: (0.02 * rng.standard_normal(shape)).astype(dtype) for name, shape in (shapes or SHAPES).items()}


def make_run(
    root: Path,
    dtype: np.dtype = BF16,
    steps: tuple[int, ...] = (1, 2, 3, 5, 8),
    shards: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    **motion: Any,
) -> Run:
    """A run of float tensors in one dtype."""
    base = base_tensors(dtype, shapes=shapes)
    return Run(root, base, move(base, list(steps), **motion), shards)


def deltas(run_base: np.ndarray, observed: list[np.ndarray]) -> np.ndarray:
    """M [T, d] in float64."""
    return np.stack([(theta.astype(np.float64) - run_base.astype(np.float64)).ravel() for theta in observed])


def oracle(base: Tensors, steps: dict[int, Tensors], target: int, rank: int = 1, pinned: bool = False) -> Tensors:
    """The method by its definition: SVD of M, a line through every coefficient over real steps, float64 throughout."""
    times = np.array(sorted(steps))
    result = {}
    for name, array in base.items():
        m = deltas(array, [steps[step][name] for step in times])
        u, sigma, vt = np.linalg.svd(m, full_matrices=False)
        theta = array.astype(np.float64).ravel() + (m[-1] if pinned else 0.0)
        for i in range(min(rank, len(sigma))):
            slope, intercept = np.polyfit(times, sigma[i] * u[:, i], 1)
            moved = slope * (target - times[-1]) if pinned else slope * target + intercept
            theta = theta + moved * vt[i]
        result[name] = theta.reshape(array.shape)
    return result


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round float64 to the dtype once, to nearest even: NumPy's own for fp16 and fp32, exact rationals' way for bf16."""
    if dtype != BF16:
        return values.astype(dtype)
    # a bf16 is a float64 with 8 significant bits: scale so that these are integers, and let rint do ties to even
    exponent = np.maximum(np.frexp(values)[1], -125)
    scale = np.ldexp(1.0, 8 - exponent)
    return (np.rint(values * scale) / scale).astype(np.float32).astype(BF16)


def differing(found: Tensors, truth: Tensors) -> tuple[int, int]:
    """How many elements differ from the truth rounded to the same dtype, and how many there are.

    Where the truth lies on a tie but for float64 noise, either neighbour is right; where its terms cancel out, so is what
    is left of their noise.
    """
    wrong = total = 0
    for name, array in found.items():
        noise = 1e-12 * np.abs(truth[name]) + 1e-17
        low, high = (rounded(truth[name] + side, array.dtype).astype(np.float64) for side in (-noise, noise))
        values = array.astype(np.float64)
        wrong += int(np.count_nonzero(~((low <= values) & (values <= high))))
        total += array.size
    return wrong, total


def write_dense_run(root: Path, elements: int, steps: int, dtype: np.dtype, cadence: int = 1) -> None:
    """A run of one tensor in which every element changes at every step: the worst case for memory."""
    rng = np.random.default_rng(0)
    width = 2 if dtype != np.float32 else 4
    bits = np.dtype(f"u{width}")
    base = (0.02 * rng.standard_normal(elements)).astype(dtype)
    flip = rng.integers(1, 64, elements, dtype=bits)
    for step in range(steps + 1):
        values = (base.view(bits) ^ (flip + bits.type(step % 8) if step else bits.type(0))).view(dtype)
        directory = root / "base" if step == 0 else root / "steps" / f"global_step_{step * cadence}"
        directory.mkdir(parents=True)
        save_file(directory / "model.safetensors", {"w": values})
