"""svrg: a gradient over many rows now and then, corrected by few rows in between."""

from collections.abc import Sequence

from edgezo.runtime.estimators.estimator import Estimate
from edgezo.runtime.noise import Direction
from edgezo.runtime.rules.rule import Problem, Updatable
from edgezo.runtime.rules.sgd import Sgd


class Svrg(Sgd):
    """theta <- theta - lr / Q * (sum_q (g_q(theta) - g_q(theta')) z_q + sum_q g'_q z'_q).

    Every `every` steps theta' is the theta of that step, and z' and g' are its directions and their projected gradients on the rows of
    `batches` steps; such a step moves by these alone. The journal holds g' of such a step and the differences of others, whose estimates
    cost twice the forwards. A copy of theta' is kept.

    Args:
        every: steps.
        batches: steps whose rows such an estimate has.

    References:
        Gautam et al. 2024, Variance-reduced Zeroth-Order Methods for Fine-Tuning Language Models (arXiv 2404.08080).
    """

    def __init__(self, every: int, batches: int) -> None:
        self.every, self.batches = every, batches
        self.anchors: list[Direction] = []
        self.anchor_grads: list[float] = []

    def step(
        self, parameters: Updatable, directions: Sequence[Direction], projected_grads: Sequence[float], lr: float, decay: float = 0.0
    ) -> None:
        """As `Rule`."""
        scales = self.scales(projected_grads, lr)
        if self._anchors(directions):
            parameters.keep()
            self.anchors, self.anchor_grads = list(directions), list(projected_grads)
            parameters.update(directions, scales, decay)
        else:
            parameters.update([*directions, *self.anchors], scales + self.scales(self.anchor_grads, lr), decay)

    def forward_rows(self, estimate: int, rows: int) -> float:
        """As `Rule`."""
        return estimate * (self.batches + 2 * (self.every - 1)) / self.every

    def measure(self, problem: Problem, directions: Sequence[Direction], lr: float) -> list[Estimate]:
        """As `Rule`."""
        if self._anchors(directions):
            return problem.estimates(self.batches)
        pairs = zip(problem.estimates(), problem.estimates_at_kept(), strict=True)
        return [now._replace(projected_grad=now.projected_grad - then.projected_grad) for now, then in pairs]

    def _anchors(self, directions: Sequence[Direction]) -> bool:
        return directions[0].step % self.every == 0
