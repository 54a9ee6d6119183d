"""Weight-only quantisation, for both halves."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from edgezo.adapters import Record

Precision = Literal["fp32", "fp16", "int8", "int4"]


class Quantized(Record):
    """w[o, i] = scales[o, i // block] * (q[o, i] - 2**(bits - 1)).

    q is stored as uint8 [out, ceil(in / block), block * bits / 8], of 4 bits two a byte, the first in the low half.
    """

    bits: Literal[4, 8]
    block: int = Field(gt=0)
    shape: list[int] = Field(min_length=2, max_length=2)
    scales: str

    @property
    def packed_shape(self) -> list[int]:
        """Shape of the stored q."""
        return [self.shape[0], -(-self.shape[1] // self.block), self.block * self.bits // 8]

    def dequantize(self, packed: npt.NDArray[Any], scales: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The weight as float32 [out, in].

        Args:
            packed: q as stored.
            scales: float32, out * ceil(in / block) numbers.
        """
        levels = packed if self.bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], self.block)
        centred = levels.astype(np.float32) - np.float32(1 << (self.bits - 1))
        centred *= scales.reshape(*packed.shape[:2], 1)
        weight: npt.NDArray[np.float32] = centred.reshape(packed.shape[0], -1)[:, : self.shape[1]]
        return weight
