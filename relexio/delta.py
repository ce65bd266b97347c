"""Deltas: XOR bits against the base, and the float64 differences that a fit works on.

Pure kernels over NumPy or CuPy arrays. n = elements of a tile, K = steps of a group.
"""

import numpy as np

from relexio.dtypes import Array, Kind, to_float64


def changed(xor: Array) -> Array:
    """Which elements differ from the base at any step: XOR bits [K, n] to bool [n]."""
    return np.bitwise_or.reduce(xor, axis=0) != 0


def gather(xor: Array, mask: Array) -> Array:
    """The XOR bits of the changed elements: [K, n] and bool [n] to [K, n_changed]."""
    return np.take(xor, np.flatnonzero(mask), axis=1)


def deltas(xor: Array, base: Array, kind: Kind) -> Array:
    """theta_t - theta_0 of changed elements: XOR bits [K, n] and base bits [n] to float64 [K, n].

    The difference is taken in float64, where those of bf16 and fp16 are exact and those of fp32 nearly always.
    """
    values = to_float64(xor ^ base, kind)
    values -= to_float64(base, kind)
    return values
