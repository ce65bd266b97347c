"""Moves: when an element of a tensor took which bits, and the float64 increments that a fit works on.

Pure kernels over NumPy or CuPy arrays. K = steps of a group, n = elements of a tile, E = their moves.
An element moves at a step if its bits are other than at the step before; the first step is compared with the base. RLVR
in bf16 moves an element a few times in a hundred steps: what costs time here grows with E, hardly with K n.
"""

from dataclasses import dataclass

import numpy as np

from relexio.dtypes import Array, Kind, to_float64


@dataclass(frozen=True)
class Moves:
    """The moves of n elements, element by element, each one's in the order of time.

    ``count`` [n] says how many each has; ``step`` [E] are columns of the group, ``xor`` [E] the new bits XOR the base's.
    """

    count: np.ndarray
    step: np.ndarray
    xor: np.ndarray

    @property
    def owner(self) -> np.ndarray:
        """The place of each move's element [E]."""
        return np.repeat(np.arange(len(self.count)), self.count)

    @property
    def first(self) -> np.ndarray:
        """The place of each element's first move [n]; every element must have one."""
        return np.cumsum(self.count, dtype=np.intp) - self.count


def changed(xor: np.ndarray) -> np.ndarray:
    """The places of the elements that differ from the base at any step, given XOR bits [K, n]."""
    return np.flatnonzero(np.bitwise_or.reduce(xor, axis=0) != 0)  # nonzero is fast for bool only


def find_moves(xor: np.ndarray) -> Moves:
    """The moves in XOR bits [K, n] of n <= 65,536 elements, all of which differ from the base at some step."""
    moved = np.empty(xor.shape, bool)
    np.not_equal(xor[:1], 0, out=moved[:1])
    np.not_equal(xor[1:], xor[:-1], out=moved[1:])
    at = np.flatnonzero(moved)  # step by step, and within a step element by element
    bits = xor.ravel()[at]
    step = (at // max(xor.shape[1], 1)).astype(np.uint32)
    at -= step * np.intp(xor.shape[1])
    owner = at.astype(np.uint16)  # NumPy sorts 16 bits by radix
    order = np.argsort(owner, kind="stable")
    return Moves(np.bincount(owner, minlength=xor.shape[1]), step[order], bits[order])


def expand(moves: Moves, steps: int) -> np.ndarray:
    """The XOR bits [K, n] that moves came from: every element keeps its bits until its next move."""
    found = np.zeros((steps, len(moves.count)), moves.xor.dtype)
    found[moves.step, moves.owner] = moves.xor ^ _before(moves.xor, moves.first, 0)
    return np.bitwise_xor.accumulate(found, axis=0, out=found)


def count_changed(moves: Moves, steps: int) -> np.ndarray:
    """How many elements differ from the base at each step: int64 [K]."""
    now = (moves.xor != 0).astype(np.int64)
    change = now - _before(now, moves.first, 0)
    return np.cumsum(np.bincount(moves.step, change, steps).astype(np.int64))


def owners(xor: Array, first: Array) -> Array:
    """The place of each move's element [E] from where the elements' first moves are [n], on whichever device these are."""
    begins = np.zeros_like(xor, np.int32)
    begins[first] = 1
    return np.cumsum(begins, dtype=np.int32) - np.int32(1)


def increments(xor: Array, base: Array, owner: Array, first: Array, kind: Kind) -> Array:
    """What each move adds to its element: XOR bits [E] and base bits [n] to float64 [E].

    The difference is taken in float64, where those of bf16 and fp16 are exact and those of fp32 nearly always.
    """
    values = to_float64(xor ^ base[owner], kind)
    values -= _before(values, first, to_float64(base, kind))
    return values


def _before(values: Array, first: Array, start: Array | int) -> Array:
    """What each move replaces [E]: the value that its element's last move brought, or ``start`` [n] for its first."""
    before = values.copy()
    before[1:] = values[:-1]
    before[first] = start
    return before
