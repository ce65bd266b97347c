"""Checkpoints in memory: tensors of NumPy or torch, copied, in the types that a trajectory has."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from relexio.checkpoints.files import File
from relexio.checkpoints.match import written_from
from relexio.checkpoints.protocol import Checkpoint
from relexio.dtypes import Table, can_cast, cast, kind_of
from relexio.errors import CheckpointError

#: What safetensors calls a type, by what NumPy (with ml_dtypes) and torch call it.
_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_AT_ONCE = 1 << 20  # elements that are rounded at a time

#: Tensors by name, or pairs of a name and a tensor, which may be made one at a time.
Tensors = Mapping[str, Any] | Iterable[tuple[str, Any]]


class Arrays(Checkpoint):
    """One model at a step (None: the base), as copies of tensors, with side files as bytes.

    A float tensor whose type in the table ``like`` is another float type is rounded to that, to nearest even.
    Raises CheckpointError, naming step and tensor, for what is no tensor of a type that safetensors knows.
    """

    def __init__(
        self, step: int | None, tensors: Tensors, side: Mapping[str, bytes] | None = None, like: Table | None = None
    ) -> None:
        self.step, self.side, self.source = step, dict(side or {}), "arrays in memory"
        self.label = f"step {step} (arrays)" if step is not None else "base (arrays)"
        self.files: tuple[File, ...] = ()
        self.directory: Path | None = None
        self.tensors: Table = {}
        self._bytes: dict[str, np.ndarray] = {}
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            alike = (like or {}).get(written_from(name, like or {}))
            wanted = alike[0] if alike else None
            self.tensors[name], self._bytes[name] = self._copy(name, tensor, wanted)

    def _copy(self, name: str, tensor: Any, wanted: str | None) -> tuple[tuple[str, tuple[int, ...]], np.ndarray]:
        """Type and shape of a tensor in the trajectory, and its bytes."""
        dtype = _NAMES.get(str(getattr(tensor, "dtype", "")).rpartition(".")[2])
        if dtype is None:
            raise CheckpointError(f"{self.label}: tensor {name}: {_described(tensor)} is no tensor that can be stored")
        wanted = wanted if wanted and can_cast(dtype, wanted) else dtype
        copied = _from_torch(tensor, wanted) if hasattr(tensor, "detach") else _from_numpy(tensor, dtype, wanted)
        return (wanted, tuple(tensor.shape)), copied

    def read(self, name: str, first_byte: int, out: memoryview) -> None:
        """Fill ``out`` with a tensor's bytes."""
        out[:] = self._bytes[name].data[first_byte : first_byte + len(out)]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(len(data) for data in self._bytes.values())


def _described(tensor: Any) -> str:
    dtype = getattr(tensor, "dtype", None)
    return f"type {dtype}" if dtype is not None else f"a {type(tensor).__name__}"


def _from_torch(tensor: Any, wanted: str) -> np.ndarray:
    """The bytes of a torch tensor. torch rounds, where the tensor is: a GPU sends no more than what is kept."""
    torch = sys.modules["torch"]
    dtype = getattr(torch, _TORCH[wanted]) if wanted in _TORCH else tensor.dtype
    flat = tensor.detach().to("cpu", dtype, copy=True).contiguous().reshape(-1)
    copied: np.ndarray = flat.view(torch.uint8).numpy()
    return copied


def _from_numpy(array: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    flat = np.ascontiguousarray(array).reshape(-1)
    raw = flat.astype(flat.dtype.newbyteorder("<")).view(np.uint8)
    if dtype == wanted:
        return raw
    size, bits = flat.itemsize, np.empty(flat.size, kind_of(wanted).bits)
    for first in range(0, flat.size, _AT_ONCE):
        bits[first : first + _AT_ONCE] = cast(raw[first * size : (first + _AT_ONCE) * size], dtype, wanted)
    return bits.view(np.uint8)
