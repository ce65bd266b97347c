"""Element types: what safetensors calls them, how many bits they have, and how bits become numbers.

Arithmetic is float64; a result is rounded to the checkpoint's type exactly once, to nearest, ties to even.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

Array = Any  # a NumPy or CuPy array

#: Bits of one element, by the name that safetensors gives the type.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

#: NumPy types of the tensors that are carried over as they are, where NumPy has one.
NUMPY = {
    "BOOL": "bool", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How the elements of a group of tensors are stored: as floats that a fit can use, or as raw bytes.

    ``bits`` is the unsigned NumPy type that holds one element; ``exponent`` masks its exponent bits.
    """

    name: str
    bits: str
    exponent: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return np.dtype(self.bits).itemsize

    @property
    def is_float(self) -> bool:
        """Whether a trajectory of these elements can be fitted."""
        return self.exponent != 0


KINDS = {
    "bf16": Kind("bf16", "<u2", 0x7F80),
    "f16": Kind("f16", "<u2", 0x7C00),
    "f32": Kind("f32", "<u4", 0x7F800000),
    "raw": Kind("raw", "|u1"),
}
_KIND_OF = {"BF16": "bf16", "F16": "f16", "F32": "f32"}

#: Tensors by name, in order: dtype in safetensors' words, and shape.
Table = dict[str, tuple[str, tuple[int, ...]]]


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a checkpoint."""
    return prod(shape) * BITS[dtype] // 8


def kind_of(dtype: str) -> Kind:
    """The kind that stores tensors of safetensors type ``dtype``; raw bytes for all but BF16, F16, F32."""
    return KINDS[_KIND_OF.get(dtype, "raw")]


def is_buffer(dtype: str) -> bool:
    """Whether the type is an integer or bool: carried over from the last observed checkpoint."""
    return dtype[0] in "BUI" and dtype != "BF16"


def to_float64(bits: np.ndarray, kind: Kind) -> np.ndarray:
    """The exact float64 values of element bits (uint16 or uint32, any shape)."""
    with np.errstate(invalid="ignore"):  # a signalling NaN is data here, not an event
        return _to_float(bits, kind).astype(np.float64)


def _to_float(bits: np.ndarray, kind: Kind) -> np.ndarray:
    if kind.name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16 if kind.name == "f16" else np.float32)


def to_native(bits: np.ndarray, kind: Kind) -> np.ndarray:
    """The values of element bits in the nearest NumPy type: bf16 widens to float32, exactly."""
    return _to_float(bits, kind) if kind.is_float else bits


def from_float64(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Element bits of float64 ``values`` rounded once, to nearest even; overflow gives infinity.

    By way of a float32 rounded to odd, which keeps what the second rounding needs to be right
    (Boldo and Melquiond, "When double rounding is odd", 2005).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        if kind.name == "f32":
            return single.view(np.uint32)
        odd = _round_to_odd(values, single)
        if kind.name == "f16":
            return odd.view(np.float32).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values), _upper(odd) | np.uint16(0x40), _upper(_rounded_up(odd)))


def from_float32(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Element bits of float32 ``values`` rounded once, to nearest even; overflow gives infinity. NaN stay NaN."""
    if kind.name == "f32":
        return values.view(np.uint32)
    if kind.name == "f16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits, lost = values.view(np.uint32), np.isnan(values)
    high = _upper(_rounded_up(bits))
    return np.where(lost, _upper(bits) | np.uint16(0x40), high) if lost.any() else high


def can_cast(dtype: str, to: str) -> bool:
    """Whether elements of one type in safetensors' words can be rounded to another: floats that a fit can use, and F64."""
    return kind_of(to).is_float and (kind_of(dtype).is_float or dtype == "F64")


def cast(raw: np.ndarray, dtype: str, to: str) -> np.ndarray:
    """Element bits of type ``to`` from bytes (uint8 [n]) of another float type: rounded once, to nearest even."""
    if dtype == "F64":
        return from_float64(raw.view("<f8"), kind_of(to))
    own = kind_of(dtype)
    return from_float32(_to_float(raw.view(own.bits), own).astype(np.float32), kind_of(to))


def _upper(bits: np.ndarray) -> np.ndarray:
    """The upper half of uint32 elements, which is a bf16."""
    return (bits >> np.uint32(16)).astype(np.uint16)


def _rounded_up(bits: np.ndarray) -> np.ndarray:
    """uint32 elements whose upper halves are those of the float32 rounded to nearest even."""
    with np.errstate(over="ignore"):  # of a NaN, which is given another value
        return bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)


def _round_to_odd(values: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    bits = nearest.view(np.uint32)
    back = nearest.astype(np.float64)
    inexact = (back != values) & ~np.isnan(values)
    too_far = inexact & (np.abs(back) > np.abs(values))
    bits = bits - too_far.astype(np.uint32)
    return bits | inexact.astype(np.uint32)


def nonfinite(bits: np.ndarray, kind: Kind) -> np.ndarray:
    """Where element bits are NaN or infinite (bool, same shape)."""
    mask = np.dtype(kind.bits).type(kind.exponent)
    return (bits & mask) == mask
