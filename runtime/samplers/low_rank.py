"""Directions of low rank: for every matrix z = c L R with factors of small integers; everything else moves as in `Full`."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.runtime import noise
from edgezo.runtime.grid import SIGNIFICAND_BITS, Additions, GridTensor, level
from edgezo.runtime.noise import BLOCK, Direction, Floats
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.samplers.sampler import Adder

Integers = npt.NDArray[Any]


class LowRank(Full):
    """z = c L R of every matrix [rows, columns]; c makes E[z z^T] = I over all draws.

    theta += d m L R with one integer m a direction: products of integers, exact in any order.

    Args:
        shapes: of every tensor; those of two dimensions are matrices.
        rank: of L R.
        every: steps between new draws of what is kept.
    """

    products = 1  # of signs over the rank: an element of L R sums rank^products of them

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], rank: int, every: int) -> None:
        super().__init__("rademacher")
        self.distribution = None
        self.rank, self.every = rank, every
        self.entries = rank**self.products
        self.factor = 1 / math.sqrt(self.entries)  # c
        self.largest = math.sqrt(self.entries)
        self.matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}

    @abstractmethod
    def factors(self, direction: Direction, name: str) -> tuple[Integers, Integers]:
        """L [rows, rank] and R [rank, columns] of one matrix, integers."""

    def adder(self, tensors: Sequence[GridTensor], additions: Additions) -> Adder:
        """As `Sampler`."""
        windows = super().adder([tensor for tensor in tensors if tensor.name not in self.matrices], additions)
        stacked = {tensor.name: self._stack(tensor, additions) for tensor in tensors if tensor.name in self.matrices}

        def add(tensor: GridTensor, first: int, part: Floats) -> None:
            if tensor.name not in stacked:
                windows(tensor, first, part)
                return
            left, right = stacked[tensor.name]
            width, begin = right.shape[1], first * BLOCK
            top, bottom = begin // width, -(-(begin + part.size) // width)
            total = (left[top:bottom] @ right).reshape(-1)[begin - top * width :][: part.size]
            total *= tensor.quantum
            part[...] = part + total  # exact on the grid

        return add

    def _stack(self, tensor: GridTensor, additions: Additions) -> tuple[Integers, Integers]:
        """m_q L_q side by side and R_q below each other, in float32 where all sums are below 2^24 and so exact, else in float64."""
        levels = [level(direction, scales, tensor.quantum, self.factor) for direction, scales in additions.items()]
        kind = np.float32 if self.entries * sum(map(abs, levels)) < 2**SIGNIFICAND_BITS else np.float64
        factors = [self.factors(direction, tensor.name) for direction in additions]
        lefts = [left.astype(kind) * kind(m) for (left, _), m in zip(factors, levels, strict=True)]
        return np.concatenate(lefts, axis=1), np.concatenate([right.astype(kind) for _, right in factors])

    def signs(self, domain: int, direction: Direction, name: str, *shape: int) -> npt.NDArray[np.int8]:
        """Signs of one factor, those of the direction's step."""
        return noise.signs(direction, noise.tensor_id(name), math.prod(shape), domain).reshape(shape)

    def kept(self, direction: Direction) -> Direction:
        """The direction whose draw is kept for `every` steps."""
        return direction._replace(step=direction.step - direction.step % self.every)
