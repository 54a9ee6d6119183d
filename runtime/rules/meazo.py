"""meazo: one scalar adapts the step."""

import math
from collections.abc import Sequence

from edgezo.runtime.rules.rule import ScalarRule


class Meazo(ScalarRule):
    """v <- beta_v v + (1 - beta_v) sum_q g_q^2 / Q^2, theta <- theta - lr / (Q sqrt(v / (1 - beta_v^t))) * sum_q g_q z_q.

    The published v is of the square of the mean of g; sum_q g_q^2 / Q^2 is what that is on average, since z and -z are alike, and the same
    for one direction. A step's root mean square is about lr.

    Args:
        beta_v: of the average.

    References:
        Dbouk et al. 2026, On Adaptivity in Zeroth-Order Optimization (arXiv 2605.03869).
    """

    def __init__(self, beta_v: float) -> None:
        self.beta_v = beta_v
        self.v, self.power = 0.0, 1.0  # beta_v^t, by multiplications: pow has other last bits elsewhere

    def scales(self, projected_grads: Sequence[float], lr: float) -> list[float]:
        """As `ScalarRule`; a call is a step."""
        count = len(projected_grads)
        self.power *= self.beta_v
        self.v = self.beta_v * self.v + (1 - self.beta_v) * math.fsum(grad * grad for grad in projected_grads) / count**2
        size = math.sqrt(self.v / (1 - self.power))
        return [-lr * (grad / size) / count if size else 0.0 for grad in projected_grads]

    def rate(self, move: float, grad_rms: float, directions: int) -> float:
        """As `Rule`."""
        return move
