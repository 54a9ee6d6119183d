"""What a sampler is: it says which weights a direction moves, and how far."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from edgezo.runtime.grid import Additions, GridTensor
from edgezo.runtime.noise import Direction, Distribution, Floats, tensor_id

# (tensor, first block, its values from that block on): adds to the values, which are changed in place
Adder = Callable[[GridTensor, int, Floats], None]


class Sampler(ABC):
    """Directions z of the tunable tensors.

    Attributes:
        largest: max |z|.
        entries: how many steps of the grid rounding one direction may move an element by.
        distribution: that of the shared table whose windows are z; None when z is anything else, which no device can make.
    """

    largest: float
    entries = 1
    distribution: Distribution | None = None

    @abstractmethod
    def adder(self, tensors: Sequence[GridTensor], additions: Additions) -> Adder:
        """What adds sum of times * q_d(scale * z) to parts of these tensors; parts may be added to in any order, on any thread."""

    def moves(self, name: str, direction: Direction) -> bool:
        """Whether a direction moves a tensor at all."""
        return True

    def draw(self, direction: Direction, name: str, size: int) -> Floats:
        """z of one tensor, flat, float32 [size], on a grid of 2^-24 of its largest value: the slow way."""
        tensor = GridTensor(name, tensor_id(name), size, False, exponent=math.ceil(math.log2(self.largest)) + 1)
        z = np.zeros(size, np.float32)
        self.adder([tensor], {direction: {1.0: 1}})(tensor, 0, z)
        return z
