"""Moves: when an element of a tensor took which bits, and the float64 increments that a fit works on.

Pure kernels over NumPy or CuPy arrays. K = steps of a group, n = elements of a tile, E = their moves.
An element moves at a step if its bits are other than at the step before, at the first step other than the base's. RLVR
in bf16 moves an element a few times in a hundred steps: what costs time here grows with E, hardly with K n.
"""

from dataclasses import dataclass

import numpy as np


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
        """The index of each move's element [E]."""
        return np.repeat(np.arange(len(self.count)), self.count)

    @property
    def first(self) -> np.ndarray:
        """The index of each element's first move [n]; every element must have one."""
        return np.cumsum(self.count, dtype=np.intp) - self.count


def changed(xor: np.ndarray) -> np.ndarray:
    """The indices of the elements that differ from the base at any step, given XOR bits [K, n]."""
    return np.flatnonzero(np.bitwise_or.reduce(xor, axis=0) != 0)  # nonzero is fast for bool only


def find_moves(xor: np.ndarray) -> Moves:
    """The moves in XOR bits [K, n] of n <= 65,536 elements, all of which differ from the base at some step.

    Where most elements move at most steps, each gets one at every step, if need be with the bits that it has: what
    is full can be worked on as an array [n, K].
    """
    moved = np.empty(xor.shape, bool)
    np.not_equal(xor[:1], 0, out=moved[:1])
    np.not_equal(xor[1:], xor[:-1], out=moved[1:])
    steps, width = xor.shape
    if 2 * np.count_nonzero(moved) > moved.size:
        return Moves(np.full(width, steps), np.tile(np.arange(steps, dtype=np.uint32), width), xor.T.ravel())
    at = np.flatnonzero(moved)  # step by step, and within a step element by element
    bits = xor.ravel()[at]
    step = (at // max(width, 1)).astype(np.uint32)
    at -= step * np.intp(width)
    owner = at.astype(np.uint16)  # NumPy sorts 16 bits by radix
    order = np.argsort(owner, kind="stable")
    return Moves(np.bincount(owner, minlength=width), step[order], bits[order])


def expand(moves: Moves, steps: int) -> np.ndarray:
    """The XOR bits [K, n] that moves came from: every element keeps its bits until its next move."""
    bits = np.zeros((steps, len(moves.count)), moves.xor.dtype)
    before = np.roll(moves.xor, 1)
    before[moves.first] = 0
    bits[moves.step, moves.owner] = moves.xor ^ before
    return np.bitwise_xor.accumulate(bits, axis=0, out=bits)


def count_changed(moves: Moves, steps: int) -> np.ndarray:
    """How many elements differ from the base at each step: int64 [K]."""
    now = moves.xor != 0
    before = np.roll(now, 1)
    before[moves.first] = False
    come = np.bincount(moves.step[now & ~before], minlength=steps)
    return np.cumsum(come - np.bincount(moves.step[before & ~now], minlength=steps))
