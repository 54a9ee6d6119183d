"""Every element moves: windows of the shared table of signs or of normal quantiles."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgezo.runtime import noise
from edgezo.runtime.grid import SIGNIFICAND_BITS, Additions, GridTensor, direction_dither, sign_values
from edgezo.runtime.noise import BLOCK, Direction, Distribution, Floats
from edgezo.runtime.samplers.sampler import Adder, Sampler


class Full(Sampler):
    """z of independent elements, E[z z^T] = I.

    Args:
        distribution: signs, or normal quantiles.

    References:
        Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes (arXiv 2305.17333), with normal z; Spall 1992, Multivariate
        Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation, with signs.
    """

    def __init__(self, distribution: Distribution = "rademacher") -> None:
        self.distribution = distribution
        self.table: Distribution = distribution
        self.largest = noise.largest(distribution)

    def adder(self, tensors: Sequence[GridTensor], additions: Additions) -> Adder:
        """As `Sampler`: every direction's windows are added to a block while it lies in cache."""
        sizes: dict[int, int] = {}
        for tensor in tensors:
            sizes[tensor.exponent] = sizes.get(tensor.exponent, 0) + tensor.size
        windows = {
            exponent: [
                (direction, self._windows(direction, scales, 2.0 ** (exponent - SIGNIFICAND_BITS), size))
                for direction, scales in additions.items()
            ]
            for exponent, size in sizes.items()
        }

        blocks = {tensor.id: -(-tensor.size // BLOCK) for tensor in tensors}
        starts = dict(zip(blocks, np.cumsum([0, *blocks.values()]).tolist(), strict=False))
        draws = {direction: noise.block_draws(direction, blocks) for direction in additions}

        def add(tensor: GridTensor, first: int, part: Floats) -> None:
            count, start = -(-part.size // BLOCK), starts[tensor.id] + first
            drawn = [
                (window, *(found[start : start + count].tolist() for found in draws[direction]))
                for direction, window in windows[tensor.exponent]
                if self.moves(tensor.name, direction)
            ]
            for index in range(count):
                block = part[index * BLOCK : (index + 1) * BLOCK]
                for window, offsets, negated in drawn:
                    if negated[index]:
                        np.subtract(block, window(offsets[index], block.size), out=block)
                    else:
                        np.add(block, window(offsets[index], block.size), out=block)

        return add

    def _windows(self, direction: Direction, scales: Mapping[float, int], quantum: float, elements: int) -> Callable[[int, int], Floats]:
        """Windows of what one direction adds on one grid: of the whole table, or made one by one where fewer elements are wanted."""
        shared = noise.table(self.table)
        if elements < len(shared):
            return lambda offset, size: noise_values(self.table, shared[offset : offset + size], direction, scales, quantum)
        values = noise_values(self.table, shared, direction, scales, quantum)
        return lambda offset, size: values[offset : offset + size]


def noise_values(distribution: Distribution, shared: Floats, direction: Direction, scales: Mapping[float, int], quantum: float) -> Floats:
    """Sum of times * q_d(scale * z) over the additions of one direction, float32 like `shared`, a part of the table."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is found when the grid is fitted
        if distribution == "rademacher":  # two values: round them, not the table
            plus, minus = (np.float32(value) for value in sign_values(direction, scales, quantum))
            half, middle = (plus - minus) / 2, (plus + minus) / 2
            if middle + half != plus or middle - half != minus:  # sums of many additions, or infinity
                signs: Floats = np.where(shared > 0, plus, minus)
                return signs
            signs = shared * half  # 0.3 ms where the choice took 3
            if middle or not half:  # -0.0 + 0.0 is 0.0
                signs += middle
            return signs
        total = np.zeros(len(shared))
        for scale, times in scales.items():
            total += times * np.floor(scale / quantum * shared.astype(np.float64) + direction_dither(direction))
        values: Floats = (total * quantum).astype(np.float32)
        return values
