"""hizoo: every weight's step is divided by an average of the curvature that its directions met."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.estimators.curvature import weight
from edgezo.runtime.estimators.estimator import LARGEST_FLOAT32, Estimate
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.rules.rule import Problem, Rule, Updatable

LEAST = 1e-2  # of h: where nothing curves, steps are at most a hundred times those of sgd


class Hizoo(Rule):
    """For each direction: h <- max((1 - s) h + s |c| / 2 * z^2, 0.01), theta <- theta - lr / Q * g z / h; h is 1 at the start.

    g = (L+ - L-) / (2 eps), c = (L+ - 2 L(theta) + L-) / eps^2. The journal holds g_1 .. g_Q, then c_1 .. c_Q. For normal z the mean of c z^2
    is the trace of the Hessian and twice its diagonal; for signs that move every weight, all have the same h. Published with perturbations
    of z / sqrt(h), here they are z: g z / h is the gradient over h on average, as there. Four bytes an element.

    Args:
        sizes: elements of every tensor.
        smooth: s.

    References:
        Zhao et al. 2024, Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order Optimizer (arXiv 2402.15173).
    """

    def __init__(self, sizes: Mapping[str, int], smooth: float) -> None:
        self.h = {name: np.ones(size, np.float32) for name, size in sizes.items()}
        self.state_bytes = 4 * sum(sizes.values())
        self.smooth = smooth

    def measure(self, problem: Problem, directions: Sequence[Direction], lr: float) -> list[Estimate]:
        """As `Rule`; all projected gradients, without the weights of their estimator, then all curvatures.

        Raises:
            NonFiniteLossError: a curvature is no float32.
        """
        estimates = problem.estimates()
        largest = max(abs(estimate.curvature) for estimate in estimates)
        if largest > LARGEST_FLOAT32:
            raise NonFiniteLossError(f"step {directions[0].step}: the curvature is {largest:g}; try a larger --eps")
        slopes = [estimate._replace(projected_grad=estimate.projected_grad * weight(estimate.curvature)) for estimate in estimates]
        return [*slopes, *(estimate._replace(projected_grad=estimate.curvature) for estimate in estimates)]

    def step(
        self, parameters: Updatable, directions: Sequence[Direction], projected_grads: Sequence[float], lr: float, decay: float = 0.0
    ) -> None:
        """As `Rule`."""
        count = len(directions)
        for number, direction in enumerate(directions):
            scale = np.float32(-lr * projected_grads[number] / count)
            added = np.float32(self.smooth * abs(projected_grads[count + number]) / 2)

            def change(name: str, place: slice, z: Floats, scale: np.float32 = scale, added: np.float32 = added) -> Floats:
                h = self.h[name][place]
                h *= np.float32(1 - self.smooth)
                h += z * z * added
                np.maximum(h, np.float32(LEAST), out=h)
                z *= scale
                z /= h
                return z

            parameters.update_by([direction], [1.0], change, decay if number == count - 1 else 0.0)
