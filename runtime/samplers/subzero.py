"""SubZero: a small core is drawn every step, the subspace is kept for a while."""

import numpy as np

from edgezo.runtime import noise
from edgezo.runtime.noise import Direction
from edgezo.runtime.samplers.low_rank import Integers, LowRank


class Subzero(LowRank):
    """z = U Z V^T / rank, all of signs, Z [rank, rank] new in every step, U and V every so many.

    The published U and V have orthonormal columns. A QR decomposition has other last bits on every machine, so columns of signs stand for
    them: their cosines are 1 / sqrt(rows) and smaller.

    References:
        Yu et al. 2024, Zeroth-Order Fine-Tuning of LLMs in Random Subspaces (arXiv 2410.08989).
    """

    products = 2

    def factors(self, direction: Direction, name: str) -> tuple[Integers, Integers]:
        """As `LowRank`."""
        (rows, columns), kept = self.matrices[name], self.kept(direction)
        core = self.signs(noise.CORE, direction, name, self.rank, self.rank).astype(np.float64)
        left = self.signs(noise.LEFT, kept, name, rows, self.rank)
        return left @ core, self.signs(noise.RIGHT, kept, name, self.rank, columns)
