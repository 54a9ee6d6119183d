"""sgd: the mean over the directions."""

from collections.abc import Sequence

from edgezo.runtime.rules.rule import ScalarRule


class Sgd(ScalarRule):
    """theta <- theta - lr / Q * sum_q g_q z_q.

    References:
        Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes, algorithms 1 and 2 (arXiv 2305.17333).
    """

    def scales(self, projected_grads: Sequence[float], lr: float) -> list[float]:
        """As `ScalarRule`."""
        return [-lr * grad / len(projected_grads) for grad in projected_grads]
