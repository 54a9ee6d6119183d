"""TeZO: both factors are kept for the whole run, and a few signs a matrix are drawn every step."""

from edgezo.runtime import noise
from edgezo.runtime.noise import Direction
from edgezo.runtime.samplers.low_rank import Integers, LowRank


class Tezo(LowRank):
    """z = U diag(tau) V^T / sqrt(rank), all of signs, tau [rank] new in every step, U and V those of step 0.

    The published factors and tau are normal.

    References:
        Sun et al. 2025, TeZO: Empowering the Low-Rankness on the Temporal Dimension in the Zeroth-Order Optimization for Fine-tuning LLMs
        (arXiv 2501.19057).
    """

    def factors(self, direction: Direction, name: str) -> tuple[Integers, Integers]:
        """As `LowRank`."""
        rows, columns = self.matrices[name]
        first = direction._replace(step=0)
        left = self.signs(noise.LEFT, first, name, rows, self.rank)
        return left * self.signs(noise.CORE, direction, name, self.rank), self.signs(noise.RIGHT, first, name, self.rank, columns)
