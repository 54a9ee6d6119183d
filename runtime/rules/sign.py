"""sign: one bit a direction."""

import math
from collections.abc import Sequence

from edgezo.runtime.rules.rule import ScalarRule


class Sign(ScalarRule):
    """theta <- theta - lr / Q * sum_q sign(g_q) z_q.

    References:
        Zhang et al. 2024, Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark (arXiv 2402.11592), whose
        ZO-SGD-Sign this is for one direction of signs.
    """

    def scales(self, projected_grads: Sequence[float], lr: float) -> list[float]:
        """As `ScalarRule`."""
        return [-lr * math.copysign(1, grad) / len(projected_grads) if grad else 0.0 for grad in projected_grads]

    def rate(self, move: float, grad_rms: float, directions: int) -> float:
        """As `Rule`."""
        return move * math.sqrt(directions)
