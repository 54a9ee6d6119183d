"""hizoo: every weight's step is divided by an average of the curvature that its directions met."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgezo.runtime.estimators.estimator import Estimate
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.rules.rule import Problem, Rule, Updatable


class Hizoo(Rule):
    """One direction after the other: theta <- theta - lr / Q * g z / h, h <- (1 - s) h + s |c| / 2 * z^2; h is 1 at the start.

    c = (L+ - 2 L(theta) + L-) / eps^2. The journal holds g_1 .. g_Q, then eps c_1 .. eps c_Q. For normal z the mean of c z^2 is the trace of
    the Hessian and twice its diagonal; for signs every weight has the same h. Published with perturbations of z / sqrt(h), whose update is
    the same on average; here they are z. Four bytes an element.

    Args:
        sizes: elements of every tensor.
        smooth: s.
        eps: of the run; None where no step is made.

    References:
        Zhao et al. 2024, Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order Optimizer (arXiv 2402.15173).
    """

    def __init__(self, sizes: Mapping[str, int], smooth: float, eps: float | None) -> None:
        self.curvature = {name: np.ones(size, np.float32) for name, size in sizes.items()}
        self.state_bytes = 4 * sum(sizes.values())
        self.smooth, self.eps = smooth, eps

    def measure(self, problem: Problem, directions: Sequence[Direction], lr: float) -> list[Estimate]:
        """As `Rule`; all projected gradients, then all curvatures."""
        estimates = problem.estimates()
        return [*estimates, *(estimate._replace(projected_grad=estimate.curvature) for estimate in estimates)]

    def step(
        self, parameters: Updatable, directions: Sequence[Direction], projected_grads: Sequence[float], lr: float, decay: float = 0.0
    ) -> None:
        """As `Rule`."""
        assert self.eps is not None
        count = len(directions)
        for number, direction in enumerate(directions):
            scale = np.float32(-lr * projected_grads[number] / count)
            added = np.float32(self.smooth * abs(projected_grads[count + number]) / (2 * self.eps))

            def change(name: str, place: slice, z: Floats, scale: np.float32 = scale, added: np.float32 = added) -> Floats:
                h = self.curvature[name][place]
                moved: Floats = z * scale
                moved /= h
                h *= np.float32(1 - self.smooth)
                z *= z
                z *= added
                h += z
                return moved

            parameters.update_by([direction], [1.0], change, decay if number == count - 1 else 0.0)
