"""The library of compiled loops (``loops.c``), and what its functions take: addresses of arrays, and kinds."""

import ctypes
from importlib.util import find_spec

import numpy as np

from relexio.loops.moves import Moves

KIND = {"bf16": 0, "f16": 1, "f32": 2, "raw": 3}
FLOAT = {"bf16": 0, "f16": 1, "f32": 2}
#: As Source in loops.c.
SOURCE = np.dtype([
    *((field, np.int64) for field in ("when", "when_left", "by", "by_left", "columns", "row", "next", "open", "marked")),
    *((field, np.int64) for field in ("ahead", "at", "ended")), ("inverse", np.uint64),
])  # fmt: skip

#: Arguments of each function: p is the address of an array, i an int64; and whether it returns an int64.
_FUNCTIONS = {
    "find": ("piiiiipipppppi", False), "pack": ("ppiiipp", True),
    "mark": ("piiiip", True), "collect": ("pipiippppi", False),
    "fold": ("pppippppi", True), "advance": ("piipi", True),
    "increments": ("pppipi", False), "dense": ("pppiip", False),
    "gram": ("piiipppppi", True), "predict": ("piiipppppiippi", True), "product": ("ppiiip", False),
}  # fmt: skip


def _load() -> ctypes.CDLL:
    spec = find_spec("relexio.loops._loops")
    if spec is None or spec.origin is None:
        raise ImportError("relexio was installed without its compiled loops")
    loaded = ctypes.CDLL(spec.origin)
    for name, (arguments, returns) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_void_p if letter == "p" else ctypes.c_int64 for letter in arguments]
        function.restype = ctypes.c_int64 if returns else None
    return loaded


library = _load()


def address(array: np.ndarray, dtype: str) -> int:
    """The address of an array in one piece of memory."""
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"an array is not {np.dtype(dtype)} in one piece of memory")
    return array.ctypes.data


def addresses(moves: Moves) -> tuple[int, int]:
    """The addresses of where each element's moves begin, and of their rows."""
    return address(moves.start, "i8"), address(moves.row, "u2")
