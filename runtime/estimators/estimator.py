"""What an estimator is: it makes projected gradients of losses, and knows parameters and a loss, never a model."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.noise import Direction

LARGEST_FLOAT32 = 3.4028235e38  # a journal holds projected gradients as float32
Losses = npt.NDArray[np.float64]
Loss = Callable[[], float]


class Parameters(Protocol):
    """What an estimator moves. `add` may be deferred until `flush`; opposite additions cancel exactly."""

    def add(self, direction: Direction, scale: float, times: int = 1) -> None:
        """theta += times * scale * z(direction)."""

    def flush(self) -> None:
        """Make theta what was added."""


class Estimate(NamedTuple):
    """projected_grad, approximately z . grad L, and the loss at theta up to eps^2.

    curvature: c = (L+ - 2 L(theta) + L-) / eps^2; NaN where not all three losses are known.
    """

    projected_grad: float
    loss: float
    curvature: float = math.nan


class Estimator(NamedTuple):
    """How losses become projected gradients.

    sides: multiples of eps z at which the loss is evaluated, for every direction.
    shared: whether all directions see the same rows, on which the loss at theta itself is evaluated once too.
    grads: (losses float64 [directions, sides], loss at theta, NaN unless shared, eps) to projected gradients float64 [directions].
    """

    sides: tuple[int, ...]
    shared: bool
    grads: Callable[[Losses, float, float], Losses]

    def forwards(self, directions: int) -> int:
        """Evaluations of a loss that a step costs."""
        return directions * len(self.sides) + self.shared

    def estimates(self, losses: Losses, base: float, directions: Sequence[Direction], eps: float) -> list[Estimate]:
        """The estimates of a step from its losses.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite, or a projected gradient is no float32.
        """
        for direction, own in zip(directions, losses, strict=True):
            for side, value in zip(self.sides, own, strict=True):
                refuse_non_finite(float(value), direction, side)
        if self.shared:
            refuse_non_finite(base, directions[0], 0)
        found = []
        told = [base] * len(directions) if self.shared else losses.mean(axis=1).tolist()
        curved = second_differences(losses, base, eps) if len(self.sides) == 2 else np.full(len(losses), math.nan)
        scalars = zip(self.grads(losses, base, eps).tolist(), told, curved.tolist(), strict=True)
        for direction, (grad, loss, curvature) in zip(directions, scalars, strict=True):
            if not abs(grad) <= LARGEST_FLOAT32:
                raise NonFiniteLossError(f"step {direction.step}: the projected gradient is {grad:g}; try a larger --eps")
            found.append(Estimate(grad, loss, curvature))
        return found


def second_differences(losses: Losses, base: float, eps: float) -> Losses:
    """c = (L+ - 2 L(theta) + L-) / eps^2, float64 [directions]."""
    found: Losses = (losses[:, 0] - 2 * base + losses[:, 1]) / eps**2
    return found


def losses_in_place(parameters: Parameters, loss: Loss, direction: Direction, eps: float, sides: Sequence[int]) -> list[float]:
    """The loss at theta + side * eps * z, for each side; afterwards theta is what it was.

    The restoring addition is left to the next flush, where an update joins it, unless `loss` failed: then it is applied before the error
    is raised.

    Args:
        parameters: theta; perturbed in place.
        loss: evaluates L at the current theta; called once a side.
        direction: names z.
        eps: perturbation scale, > 0, a multiple of every tensor's grid (`MutableWeights.eps`).

    Raises:
        NonFiniteLossError: a loss was NaN or infinite.
        Exception: whatever `loss` raised.
    """
    offset = 0
    losses = []
    try:
        for side in sides:
            parameters.add(direction, eps, side - offset)
            offset = side
            parameters.flush()
            value = float(loss())
            refuse_non_finite(value, direction, side)
            losses.append(value)
    except BaseException:
        parameters.add(direction, eps, -offset)
        parameters.flush()
        raise
    parameters.add(direction, eps, -offset)
    return losses


def estimate_in_place(
    estimator: Estimator, parameters: Parameters, losses: Sequence[Loss], directions: Sequence[Direction], eps: float
) -> list[Estimate]:
    """Estimates along directions one after the other, each by a loss of its own; a shared estimator takes theta's by the first.

    Raises:
        NonFiniteLossError: a loss was NaN or infinite, or a projected gradient is no float32; theta is as before.
        Exception: whatever a loss raised; theta is as before.
    """
    base = math.nan
    if estimator.shared:
        parameters.flush()
        base = float(losses[0]())
        refuse_non_finite(base, directions[0], 0)
    pairs = zip(directions, losses, strict=True)
    found = np.array([losses_in_place(parameters, loss, direction, eps, estimator.sides) for direction, loss in pairs])
    try:
        return estimator.estimates(found, base, directions, eps)
    except NonFiniteLossError:
        parameters.flush()
        raise


def refuse_non_finite(value: float, direction: Direction, side: int) -> None:
    """Refuse a loss that is NaN or infinite."""
    if not math.isfinite(value):
        where = f"theta {'+' if side > 0 else '-'} eps z" if side else "theta"
        raise NonFiniteLossError(
            f"step {direction.step}: the loss at {where} is {value}; the weights are as before the step, try a smaller --lr or --eps"
        )
