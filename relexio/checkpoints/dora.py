"""DoRA: the rows of W + s B A, each brought to a length that was learned; any elements, in small memory.

W' = m (W + s B A) / ||W + s B A||, with one m and one norm for each output (Liu et al., "DoRA", 2024, equation 5). PEFT makes
all of it in float32, with the sums of squares in the order of torch on CPUs, and rounds once to W's type.
"""

from dataclasses import dataclass

import numpy as np

from relexio.checkpoints.product import Product
from relexio.checkpoints.protocol import Read
from relexio.dtypes import Kind, from_float32, kind_of, to_native

_ROWS = 1 << 17  # elements of whole rows that are worked on at once; one row, if it has more
#: Sums of squares that torch adds up side by side, whether the processor has AVX2 or AVX-512.
_LANES = 8
_EACH = 24  # bytes in which an element is made: bits, values and their copies, and what they are rounded in


@dataclass(frozen=True)
class Dora:
    """A weight [out, in] to which a product was added, its rows then brought to magnitudes [out], of this name and type."""

    product: Product
    magnitude: tuple[str, str]

    @property
    def scratch(self) -> int:
        """Bytes in which rows are made."""
        return _EACH * max(_ROWS, self.product.shape[1])

    def fill(self, bits: np.ndarray, kind: Kind, first: int, weight: Read, factors: tuple[Read, Read, Read]) -> None:
        """Fill element bits [n] of the merged weight, from its element ``first`` on.

        ``weight`` reads the base's: whole rows, for their norms. ``factors`` read A, B, and the magnitudes.
        """
        width, end = self.product.shape[1], first + bits.size
        last, most = -(-end // width), max(1, _ROWS // width)
        for top in range(first // width, last, most):
            bottom = min(top + most, last)
            made, begin = self._rows(kind, top, bottom, weight, factors), top * width
            low, high = max(first, begin), min(end, bottom * width)
            bits[low - first : high - first] = made[low - begin : high - begin]

    def _rows(self, kind: Kind, top: int, bottom: int, weight: Read, factors: tuple[Read, Read, Read]) -> np.ndarray:
        """Element bits [n] of whole rows. Those of a row depend on that row only."""
        (a, b, magnitude), width = factors, self.product.shape[1]
        bits = np.empty((bottom - top) * width, kind.bits)
        weight(top * width * kind.itemsize, bits.data.cast("B"))
        values = to_native(bits, kind).astype(np.float32)
        self.product.add_to(values.view(np.uint32), kind_of("F32"), top * width, a, b)
        rows = values.reshape(-1, width)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            rows *= (self._magnitudes(top, bottom, magnitude) / _norms(rows))[:, None]
        return from_float32(values, kind)

    def _magnitudes(self, top: int, bottom: int, read: Read) -> np.ndarray:
        """Those of some rows: float32 [n]."""
        kind = kind_of(self.magnitude[1])
        bits = np.empty(bottom - top, kind.bits)
        read(top * kind.itemsize, bits.data.cast("B"))
        return to_native(bits, kind).astype(np.float32)


def _norms(rows: np.ndarray) -> np.ndarray:
    """The norm of each row, with the bits of ``torch.linalg.norm(rows, dim=1)`` on CPUs: float32 [n] of float32 [n, m].

    An exact sum is up to some ulp from that of torch.
    """
    squares, whole = rows * rows, rows.shape[1] // _LANES * _LANES
    lanes = np.add.reduce(squares[:, :whole].reshape(len(rows), whole // _LANES, _LANES), axis=1)
    sums = lanes[:, 0].copy()
    for part in (*lanes.T[1:], *squares.T[whole:]):
        sums += part
    return np.sqrt(sums)
