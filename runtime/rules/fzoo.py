"""fzoo: the spread of the losses sets the step."""

import math
from collections.abc import Sequence

from edgezo.runtime.rules.rule import ScalarRule


class Fzoo(ScalarRule):
    """theta <- theta - lr / (Q std(g)) * sum_q g_q z_q, std over the directions of the step, with Q - 1.

    The published rule has one-sided estimates: there g_q = (L_q - L_0) / eps, and eps cancels. Equal g_q move nothing.

    References:
        Dang et al. 2025, FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale Speed (arXiv 2506.09034).
    """

    def scales(self, projected_grads: Sequence[float], lr: float) -> list[float]:
        """As `ScalarRule`."""
        count = len(projected_grads)
        mean = math.fsum(projected_grads) / count
        spread = math.sqrt(math.fsum((grad - mean) ** 2 for grad in projected_grads) / (count - 1))
        return [-lr * (grad / spread) / count if spread else 0.0 for grad in projected_grads]

    def rate(self, move: float, grad_rms: float, directions: int) -> float:
        """As `Rule`."""
        return move * math.sqrt(directions)
