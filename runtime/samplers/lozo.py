"""LOZO: one factor is drawn every step, the other is kept for a while."""

from edgezo.runtime import noise
from edgezo.runtime.noise import Direction
from edgezo.runtime.samplers.low_rank import Integers, LowRank


class Lozo(LowRank):
    """z = U V^T / sqrt(rank), U and V of signs, U new in every step, V every so many.

    The published factors are normal and divided by the rank; signs keep the products integers, and 1 / sqrt(rank) makes E[z z^T] = I.

    References:
        Chen et al. 2024, Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures (arXiv 2410.07698).
    """

    def factors(self, direction: Direction, name: str) -> tuple[Integers, Integers]:
        """As `LowRank`."""
        rows, columns = self.matrices[name]
        left = self.signs(noise.LEFT, direction, name, rows, self.rank)
        return left, self.signs(noise.RIGHT, self.kept(direction), name, self.rank, columns)
