"""conservative: a step is taken, turned round or left out, whichever has the lowest loss."""

from collections.abc import Sequence

from edgezo.runtime.estimators.estimator import Estimate
from edgezo.runtime.noise import Direction
from edgezo.runtime.rules.rule import Problem
from edgezo.runtime.rules.sgd import Sgd

CHOICES = (0, 1, -1)  # the first of equal losses is taken


class Conservative(Sgd):
    """theta <- argmin of L over theta, theta + step, theta - step, step = -lr / Q * sum_q g_q z_q; L over all rows of the step.

    The journal holds c g_q with the choice c of 0, 1 or -1. Costs three forwards of the step's rows more.

    References:
        Zhang et al. 2024, Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark (arXiv 2402.11592),
        ZO-SGD-Cons; Bergou et al. 2019, Stochastic Three Points Method for Unconstrained Smooth Minimization (arXiv 1902.03591).
    """

    rests = True

    def forward_rows(self, estimate: int, rows: int) -> float:
        """As `Rule`."""
        return estimate + len(CHOICES) * rows

    def measure(self, problem: Problem, directions: Sequence[Direction], lr: float) -> list[Estimate]:
        """As `Rule`."""
        estimates = problem.estimates()
        losses = problem.losses_at(self.scales([estimate.projected_grad for estimate in estimates], lr), CHOICES)
        choice = CHOICES[losses.index(min(losses))]
        return [estimate._replace(projected_grad=choice * estimate.projected_grad) for estimate in estimates]
