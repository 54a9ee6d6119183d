"""Only small weights move."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgezo.runtime.grid import Additions, GridTensor
from edgezo.runtime.noise import BLOCK, Distribution, Floats
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.samplers.sampler import Adder


class Magnitude(Full):
    """z = m * u, u of independent elements, m = [|theta_0| <= h], h the ceil(share * size)-th smallest |theta_0| of a tensor.

    The mask follows from the weights at the start of the run and takes a bit an element. E[z z^T] = diag(m).

    Args:
        start: theta_0 by name.
        share: of a tensor's elements that move.
        distribution: of u.

    References:
        Liu et al. 2024, Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning (arXiv 2402.15751).
    """

    def __init__(self, start: Mapping[str, Floats], share: float, distribution: Distribution) -> None:
        super().__init__(distribution)
        self.distribution = None
        self.masks = {name: _small(array, share) for name, array in start.items()}

    def adder(self, tensors: Sequence[GridTensor], additions: Additions) -> Adder:
        """As `Full`, through the mask."""
        unmasked = super().adder(tensors, additions)

        def add(tensor: GridTensor, first: int, part: Floats) -> None:
            total = np.zeros_like(part)
            unmasked(tensor, first, total)
            total *= np.unpackbits(self.masks[tensor.name][first * BLOCK // 8 :], count=part.size)
            part += total  # multiples of d: exact

        return add


def _small(array: Floats, share: float) -> npt.NDArray[np.uint8]:
    sizes = np.abs(array.reshape(-1))
    place = math.ceil(share * sizes.size) - 1
    return np.packbits(sizes <= np.partition(sizes, place)[place])
