"""Files of torch.save: which tensors they hold, and where the bytes of each lie. No byte of a tensor is read here."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

from relexio.checkpoints.files import File
from relexio.checkpoints.unpickle import MAX_PICKLE, Global, Record, loads
from relexio.checkpoints.zipped import Member, members_of
from relexio.dtypes import BITS
from relexio.errors import CheckpointError, IncompleteError

DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "storage.UntypedStorage": "U8", "UntypedStorage": "U8",
}  # fmt: skip
#: The names that occur where a tensor is all that a file holds.
TENSOR_NAMES = {
    "collections.OrderedDict", "torch.Size", "torch.Tensor", "torch.device", "torch.serialization._get_layout",
    "torch._tensor._rebuild_from_type_v2", "torch.nn.parameter.Parameter",
    *(f"torch._utils._rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter", "parameter_with_state")),
    *(f"torch.{name}" for name in (*DTYPES, *_STORAGES)),
}  # fmt: skip
_LEGACY = (
    b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the number that files before torch 1.6 begin with
)
_MAX_DIMENSIONS = 64

Members = tuple[tuple[str, Member], ...]


@dataclass(frozen=True)
class Array:
    """A plain tensor in a file: ``start`` is the place of its first byte, ``strides`` count elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return BITS[self.dtype] // 8


@dataclass(frozen=True, eq=False)
class Contents:
    """What a torch file holds: its pickle's value, and where its storages are, by their keys."""

    value: Any
    storages: dict[str, Member]

    def array(self, value: Any) -> Array | None:
        """A tensor that a value describes; None if it is none. Raises CheckpointError (which names no file) if it is odd."""
        while isinstance(value, Record) and value.args:
            if value.kind.startswith("torch._utils._rebuild_parameter"):
                value = value.args[0]
            elif (
                value.kind == "torch._tensor._rebuild_from_type_v2"
                and len(value.args) == 4
                and _is_plain(value.args[1])
            ):
                func, _, args, _ = value.args
                if not isinstance(func, Global) or not isinstance(args, tuple):
                    return None
                value = Record(func.name, args)
            elif value.kind in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
                return _array(value, self.storages)
            else:
                return None
        return None


def read_torch(path: Path, known: frozenset[str], window: tuple[int, int] | None = None) -> tuple[File, Contents]:
    """Read what a torch file (or the one in some bytes of a file: first, count) holds; ``known`` names may occur in it.

    Raises CheckpointError for a file that is truncated, of another format, or asks for other names.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        start, size = window or (0, stat.st_size)
        try:
            contents = _read(file.fileno(), start, size, known, _contents if window is None else _contents.__wrapped__)
        except CheckpointError as error:
            raise type(error)(f"{path}: {error}") from error
        except _Legacy:
            code = f"import torch; p = {str(path)!r}; torch.save(torch.load(p, 'cpu', weights_only=True), p)"
            raise CheckpointError(
                f"{path}: a torch file of the format before torch 1.6; save it again: python -c {quote(code)}"
            ) from None
    return File(path.absolute(), stat.st_size, stat.st_mtime_ns), contents


class _Legacy(Exception):  # noqa: N818
    pass


def _read(fd: int, start: int, size: int, known: frozenset[str], make: Callable[..., Contents]) -> Contents:
    begin = os.pread(fd, len(_LEGACY), start)
    if begin == _LEGACY:
        raise _Legacy
    if begin[:4] != b"PK\3\4":
        raise IncompleteError("truncated, or not a file of torch.save; copy the file again")
    members = members_of(fd, start, size)
    tops = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tops) != 1:
        raise CheckpointError("is a zip file, but none of torch.save: it has no data.pkl")
    (top,) = tops
    order = members.get(f"{top}/byteorder", Member(0, 0))
    if order.size and os.pread(fd, min(order.size, 8), order.start) != b"little":
        raise CheckpointError(
            "was written on a big-endian machine; load it and save it again with torch on a little-endian one"
        )
    pickled = members[f"{top}/data.pkl"]
    if pickled.size > MAX_PICKLE:
        raise CheckpointError(f"its pickle has {pickled.size:,} bytes, more than that of any model")
    data = os.pread(fd, pickled.size, pickled.start)
    prefix = f"{top}/data/"
    storages = ((name.removeprefix(prefix), member) for name, member in members.items() if name.startswith(prefix))
    return make(data, tuple(sorted(storages)), known)


@lru_cache(maxsize=512)
def _contents(data: bytes, storages: Members, known: frozenset[str]) -> Contents:
    """The same object for equal files but for their tensors, as those of one rank are at most steps."""
    return Contents(_unpickled(data, known), dict(storages))


@lru_cache(maxsize=512)
def _unpickled(data: bytes, known: frozenset[str]) -> Any:
    """The same object for equal pickles: those of a DCP's tensors that have the same shape are."""
    return loads(data, known)


def state_dict(contents: Contents) -> dict[str, Any]:
    """The table of a file that holds tensors by name. Raises CheckpointError (which names no file)."""
    value = contents.value
    if not isinstance(value, dict) or not value:
        raise CheckpointError("holds no table of tensors; save the model's state_dict() alone")
    if not all(isinstance(name, str) for name in value):
        raise CheckpointError("holds tensors that have no names; save the model's state_dict() alone")
    return value


def counts(value: Any, what: str) -> tuple[int, ...]:
    """Sizes or strides. Raises CheckpointError (which names no file) if they are none."""
    if isinstance(value, Record) and value.kind == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        raise CheckpointError(f"its {what} is not a list of numbers")
    if not all(type(n) is int and 0 <= n < 2**62 for n in value):
        raise CheckpointError(f"its {what} is not a list of numbers")
    return tuple(value)


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, Global) and kind.name in ("torch.Tensor", "torch.nn.parameter.Parameter")


def _array(record: Record, storages: dict[str, Member]) -> Array:
    third = record.kind.endswith("v3")
    if not 6 + third <= len(record.args) <= 7 + third or (len(record.args) == 7 + third and record.args[-1]):
        raise CheckpointError(
            "is a tensor of a kind that cannot be read (conjugated or negated); save it again as a plain one"
        )
    dtype, numel, member = _storage(record.args[0], storages)
    if third:
        kind = record.args[6]
        named = DTYPES.get(kind.name.removeprefix("torch.")) if isinstance(kind, Global) else None
        if named is None:
            raise CheckpointError("its dtype is unknown")
        numel, dtype = member.size // (BITS[named] // 8), named
    (offset,) = counts((record.args[1],), "offset")
    shape, strides = counts(record.args[2], "shape"), counts(record.args[3], "strides")
    if len(shape) != len(strides):
        raise CheckpointError("its shape and strides have different lengths")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if prod(shape) and last >= numel:
        raise CheckpointError(f"its shape and strides reach past the {numel:,} elements of its storage")
    if prod(shape) > 2**62:
        raise CheckpointError("its shape has more elements than any file holds")
    return Array(dtype, shape, strides, member.start + offset * BITS[dtype] // 8)


def _storage(value: Any, storages: dict[str, Member]) -> tuple[str, int, Member]:
    """The dtype of a storage, the number of its elements, and where it is."""
    pid = value.args[0] if isinstance(value, Record) and value.kind == "persistent" else None
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], Global):
        raise CheckpointError("has no storage")
    _, kind, key, _, numel = pid
    dtype = _STORAGES.get(kind.name.removeprefix("torch."))
    if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise CheckpointError("its storage is of an unknown kind")
    if key not in storages:
        raise IncompleteError(f"its storage {key[:40]} is missing; copy the file again")
    if storages[key].size != numel * BITS[dtype] // 8:
        raise CheckpointError(
            f"its storage {key[:40]} has {storages[key].size:,} bytes and not {numel:,} elements of {dtype}"
        )
    return dtype, numel, storages[key]
