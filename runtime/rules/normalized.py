"""normalized: a step of the length lr."""

import math
from collections.abc import Sequence

from edgezo.runtime.rules.rule import ScalarRule


class Normalized(ScalarRule):
    """theta <- theta - lr * sum_q g_q z_q / sqrt(sum_q g_q^2).

    With signs for z its root mean square is lr in every element, whatever the scale of the loss, of eps, and of Q.

    References:
        Hazan et al. 2015, Beyond Convexity: Stochastic Quasi-Convex Optimization (arXiv 1507.02030), normalized gradients.
    """

    def scales(self, projected_grads: Sequence[float], lr: float) -> list[float]:
        """As `ScalarRule`."""
        norm = math.sqrt(math.fsum(grad * grad for grad in projected_grads))
        return [-lr * (grad / norm) if norm else 0.0 for grad in projected_grads]

    def rate(self, move: float, grad_rms: float, directions: int) -> float:
        """As `Rule`."""
        return move
