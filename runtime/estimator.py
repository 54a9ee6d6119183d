"""Projected gradients from losses alone. An estimator knows parameters and a loss, never a model."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.noise import Direction

LARGEST_FLOAT32 = 3.4028235e38  # a journal holds projected gradients as float32
SIDES = (1, -1)
Loss = Callable[[], float]
StackedLoss = Callable[[Sequence[Direction], Sequence[int], float], npt.NDArray[np.float64]]


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
        for side in SIDES:
            parameters.add(direction, eps, side - offset)
            offset = side
            parameters.flush()
            value = float(loss())
            _refuse_non_finite(value, direction, side)
            losses.append(value)
    except BaseException:
        parameters.add(direction, eps, -offset)
        parameters.flush()
        raise
    parameters.add(direction, eps, -offset)
    try:
        return _estimate(losses[0], losses[1], direction, eps)
    except NonFiniteLossError:
        parameters.flush()
        raise


def stacked_two_sided(loss: StackedLoss, directions: Sequence[Direction], eps: float) -> list[Estimate]:
    """The two-sided estimates along several directions, each on its own examples, from one call of `loss`.

    Args:
        loss: (directions, sides, eps) to losses float64 [directions, sides] at theta + side * eps * z; theta itself stays.
        directions: name z_1 .. z_Q.
        eps: perturbation scale, > 0.

    Raises:
        NonFiniteLossError: a loss was NaN or infinite, or a projected gradient is no float32.
        Exception: whatever `loss` raised.

    References:
        Gao et al. 2024, MobiZO (P-RGE): Enabling Efficient LLM Fine-Tuning at the Edge via Inference Engines (arXiv 2409.15520).
    """
    estimates = []
    for direction, losses in zip(directions, loss(directions, SIDES, eps), strict=True):
        for side, value in zip(SIDES, losses, strict=True):
            _refuse_non_finite(float(value), direction, side)
        estimates.append(_estimate(float(losses[0]), float(losses[1]), direction, eps))
    return estimates


def _estimate(loss_plus: float, loss_minus: float, direction: Direction, eps: float) -> Estimate:
    projected_grad = (loss_plus - loss_minus) / (2 * eps)
    if abs(projected_grad) > LARGEST_FLOAT32:
        raise NonFiniteLossError(f"step {direction.step}: the projected gradient is {projected_grad:g}; try a larger --eps")
    return Estimate(projected_grad, loss_plus, loss_minus)


def _refuse_non_finite(value: float, direction: Direction, side: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"step {direction.step}: the loss at theta {'+' if side > 0 else '-'} eps z is {value}; the weights are as before the step, try a smaller --lr or --eps"
        )
