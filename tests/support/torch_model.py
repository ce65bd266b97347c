"""The tensors that all fixtures in tests/torch_files hold, by a formula: what a reader must give back."""

import numpy as np

from tests.support.make import BF16, FP8, Tensors

#: Shapes that divide unevenly by 2 and 4, and some with fewer rows than there are ranks.
SHAPES = {
    "model.embed_tokens.weight": (7, 4), "model.layers.0.q.weight": (5, 3), "model.layers.0.q.bias": (5,),
    "model.layers.0.conv.weight": (3, 2, 2), "model.norm.weight": (1,), "model.few.weight": (2, 6), "lm_head.weight": (9, 4),
}  # fmt: skip


def values(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that no other tensor has, and that bf16 holds exactly but for a few bits."""
    count = int(np.prod(shape))
    return ((np.arange(count) - count // 2 + 100 * number) / 1024).reshape(shape).astype(np.float32)


def model() -> Tensors:
    """The parameters in float32, and a buffer."""
    tensors = {name: values(number, shape) for number, (name, shape) in enumerate(SHAPES.items(), 1)}
    return {**tensors, "model.steps": np.arange(3)}


def many_types() -> Tensors:
    """Tensors of all types that a torch file and NumPy both have."""
    plain = values(3, (4, 5))
    types = (np.float32, np.float64, np.float16, BF16, FP8, np.int64, np.int32, np.uint8, np.bool_)
    tensors = {f"t.{np.dtype(kind).name}": (plain * 64).astype(kind) for kind in types}
    return {
        **tensors,
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "rows": plain[:, 1:4],
    }
