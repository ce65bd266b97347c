"""Loops over the moves of a block: compiled where the package was built with a C compiler, else in NumPy.

Arrays in, arrays out; both do the same, bit for bit.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from relexio.loops.moves import Found, Moves, Stream
from relexio.loops.plain import expand

#: Whether the compiled loops are in use.
COMPILED = find_spec("relexio.loops._loops") is not None

if TYPE_CHECKING or COMPILED:
    from relexio.loops.compiled import Reader, Walk, advance, dense, find, fold, increments, pack, product
else:
    from relexio.loops.plain import Reader, Walk, advance, dense, find, fold, increments, pack, product

__all__ = [
    "COMPILED",
    "Found",
    "Moves",
    "Reader",
    "Stream",
    "Walk",
    "advance",
    "dense",
    "expand",
    "find",
    "fold",
    "increments",
    "pack",
    "product",
]
