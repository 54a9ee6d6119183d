"""Every element moves, and all directions are equally long."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgezo.runtime import noise
from edgezo.runtime.grid import Additions, GridTensor
from edgezo.runtime.noise import BLOCK, TABLE_SIZE, Direction
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.samplers.sampler import Adder

LONGEST = 2.0  # times its own length that a direction is stretched at most; from a few dozen elements on it is 1 within 1 %
STEPS = 4096  # of the table in 1, so that squares of its entries are integers


class Sphere(Full):
    """z = sqrt(d) u / |u|, u normal over all d tunable elements: uniform on the sphere of radius sqrt(d), E[z z^T] = I.

    Signs lie on that sphere without being stretched.

    Args:
        sizes: elements of every tensor.

    References:
        Flaxman et al. 2005, Online Convex Optimization in the Bandit Setting: Gradient Descent without a Gradient (arXiv cs/0408007).
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__("gaussian")
        self.distribution = None
        self.size = sum(sizes.values())
        self.blocks = {noise.tensor_id(name): -(-size // BLOCK) for name, size in sizes.items()}
        self.lengths = np.concatenate([np.minimum(BLOCK, size - np.arange(0, size, BLOCK)) for size in sizes.values()])
        self.largest *= LONGEST
        self.stretch = functools.lru_cache(maxsize=4096)(self._stretch)

    def adder(self, tensors: Sequence[GridTensor], additions: Additions) -> Adder:
        """As `Full`, with every scale stretched."""
        stretched = {
            direction: {scale * self.stretch(direction): times for scale, times in scales.items()}
            for direction, scales in additions.items()
        }
        return super().adder(tensors, stretched)

    def _stretch(self, direction: Direction) -> float:
        """sqrt(d) / |u|; |u|^2 is a sum of integers, and so the same everywhere."""
        starts, _ = noise.block_draws(direction, self.blocks)
        squares = int((_sums()[starts + self.lengths] - _sums()[starts]).sum())
        return min(LONGEST, math.sqrt(self.size * STEPS**2 / squares)) if squares else LONGEST


@functools.cache
def _sums() -> npt.NDArray[np.int64]:
    """Sums of the squares of the first n entries of the table, in units of 2^-24; int64 [M + BLOCK + 1]."""
    entries = np.rint(noise.table("gaussian") * STEPS).astype(np.int64)
    assert len(entries) == TABLE_SIZE + BLOCK
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(entries**2)])
