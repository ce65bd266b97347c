"""The product of two factors of an adapter, added to a part of a weight: any elements, in small memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from relexio.checkpoints.protocol import Read
from relexio.dtypes import Kind, from_float32, kind_of, to_native
from relexio.loops import product

_STRIP = 1 << 13  # elements that are summed at once: in the cache
_PART = 1 << 18  # elements of a factor that are held at once, in float64
SCRATCH = 2 * _PART * (8 + 8) + _STRIP * 64  # bytes; a factor's bits and values while they are widened


@dataclass(frozen=True)
class Product:
    """B A of a weight, in the weight's ``shape``: name and type of A [rank, in] and B [out, rank].

    ``turned``: the weight is stored [in, out], as (B A)^T. That of an ``embedding`` is, and is rounded before it is added.
    """

    a: tuple[str, str]
    b: tuple[str, str]
    rank: int
    shape: tuple[int, ...]
    turned: bool
    embedding: bool
    scaling: float

    def add_to(self, bits: np.ndarray, kind: Kind, first: int, a: Read, b: Read) -> None:
        """Add it to element bits [n] of the weight, which begin at its element ``first``; ``a`` and ``b`` read the factors."""
        of_rows, of_columns = (a, b) if self.turned else (b, a)
        for (top, bottom), (left, right) in _rectangles(first, first + bits.size, self.shape[1]):
            begin = top * self.shape[1] + left - first
            part = bits[begin : begin + (bottom - top) * (right - left)].reshape(bottom - top, right - left)
            most = max(1, _PART // self.rank)
            for column in range(left, right, most):
                columns = column, min(column + most, right)
                right_factor = self._factor(not self.turned, *columns, self.shape[1], of_columns)
                for row in range(top, bottom, most):
                    rows = row, min(row + most, bottom)
                    left_factor = self._factor(self.turned, *rows, self.shape[0], of_rows)
                    here = part[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
                    self._add(here, kind, left_factor, right_factor)

    def _factor(self, is_a: bool, first: int, last: int, count: int, read: Read) -> np.ndarray:
        """Elements ``first`` to ``last`` of ``count`` of a factor: float64 [rank, n]."""
        kind, size = kind_of((self.a if is_a else self.b)[1]), last - first
        bits = np.empty((self.rank, size) if is_a else (size, self.rank), kind.bits)
        if is_a and size < count:
            for number, row in enumerate(bits):
                read((number * count + first) * kind.itemsize, row.data.cast("B"))
        else:
            read(0 if is_a else first * self.rank * kind.itemsize, bits.reshape(-1).data.cast("B"))
        values = to_native(bits, kind)
        return np.ascontiguousarray(values if is_a else values.T, np.float64)

    def _add(self, bits: np.ndarray, kind: Kind, rows: np.ndarray, columns: np.ndarray) -> None:
        """Add the product of factors [rank, n] and [rank, m] to element bits [n, m].

        The terms of each element are added one after the other by operations on single elements: a matrix product of a BLAS
        may be another one for another number of rows, and the stored bits must not depend on which rows are asked for
        together. Each sum is rounded to float32, as by fused multiply-add: of that order and rounding are the products of
        torch on CPUs as well (MKL: all bits were those of PEFT at rank 64; from some 200 on it sums in parts). An exact
        sum would be no nearer.
        """
        count = max(1, _STRIP // bits.shape[1])
        for first in range(0, bits.shape[0], count):
            part = bits[first : first + count]
            summed = product(np.ascontiguousarray(rows[:, first : first + count]), columns)
            with np.errstate(over="ignore", invalid="ignore"):
                difference = summed * np.float32(self.scaling)
                if self.embedding:
                    difference = to_native(from_float32(difference, kind), kind).astype(np.float32)
                part[:] = from_float32(to_native(part, kind).astype(np.float32) + difference, kind)


def _rectangles(first: int, last: int, width: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of the elements from ``first`` to ``last``: a part of a row, whole rows, a part of a row."""
    while first < last:
        row, column = divmod(first, width)
        rows = max(1, (last - first) // width) if column == 0 else 1
        right = min(width, column + last - first)
        yield (row, row + rows), (column, right)
        first += rows * (right - column)
