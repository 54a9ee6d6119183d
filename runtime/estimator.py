"""Projected gradients from losses alone. An estimator knows parameters and a loss, never a model."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.noise import Direction

LARGEST_FLOAT32 = 3.4028235e38  # a journal holds projected gradients as float32
Loss = Callable[[], float]


class Parameters(Protocol):
    """What an estimator moves. `add` may be deferred until `flush`; opposite additions cancel exactly."""

    def add(self, direction: Direction, scale: float, times: int = 1) -> None:
        """theta += times * scale * z(direction)."""

    def flush(self) -> None:
        """Make theta what was added."""


class Estimate(NamedTuple):
    """projected_grad = (loss_plus - loss_minus) / (2 eps), approximately z . grad L."""

    projected_grad: float
    loss_plus: float
    loss_minus: float

    @property
    def loss(self) -> float:
        """(L(theta + eps z) + L(theta - eps z)) / 2, the loss at theta up to eps^2."""
        return (self.loss_plus + self.loss_minus) / 2


def two_sided(parameters: Parameters, loss: Loss, direction: Direction, eps: float) -> Estimate:
    """The two-sided (SPSA) estimate (L(theta + eps z) - L(theta - eps z)) / (2 eps).

    Calls `loss` exactly twice. Afterwards theta is what it was; the restoring addition is left to the next flush, where an update
    joins it, unless `loss` failed: then it is applied before the error is raised.

    Args:
        parameters: theta; perturbed in place.
        loss: evaluates L at the current theta.
        direction: names z.
        eps: perturbation scale, > 0, a multiple of every tensor's grid (`MutableWeights.eps`).

    Raises:
        NonFiniteLossError: a loss was NaN or infinite, or the projected gradient is no float32.
        Exception: whatever `loss` raised.

    References:
        Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes, algorithm 1 (arXiv 2305.17333).
        Spall 1992, Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation.
    """
    offset = 0
    losses = []
    try:
        for side in (1, -1):
            parameters.add(direction, eps, side - offset)
            offset = side
            parameters.flush()
            value = float(loss())
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"step {direction.step}: the loss at theta {'+' if side > 0 else '-'} eps z is {value}; the weights are as before the step, try a smaller --lr or --eps"
                )
            losses.append(value)
    except BaseException:
        parameters.add(direction, eps, -offset)
        parameters.flush()
        raise
    parameters.add(direction, eps, -offset)
    projected_grad = (losses[0] - losses[1]) / (2 * eps)
    if abs(projected_grad) > LARGEST_FLOAT32:
        parameters.flush()
        raise NonFiniteLossError(f"step {direction.step}: the projected gradient is {projected_grad:g}; try a larger --eps")
    return Estimate(projected_grad, losses[0], losses[1])
