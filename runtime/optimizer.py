"""ZO-SGD: theta <- (1 - lr * weight_decay) (theta - lr * projected_grad * z), and the learning-rate schedules."""

import math
from typing import Literal, Protocol

from edgezo.runtime.noise import Direction

Schedule = Literal["constant", "linear", "cosine"]


class Updatable(Protocol):
    """Parameters that take updates (`MutableWeights`)."""

    def update(self, direction: Direction, scale: float, decay: float = 0.0) -> None:
        """theta <- (1 - decay) (theta + scale * z(direction))."""


def sgd_step(parameters: Updatable, direction: Direction, projected_grad: float, lr: float, weight_decay: float = 0.0) -> None:
    """Apply one update from its scalars; tuning and replay both call this and nothing else.

    Args:
        parameters: theta, restored to its value before the step (the restore may be pending).
        direction: names z.
        projected_grad: (L+ - L-) / (2 eps), as stored in the journal (float32).
        lr: learning rate of this step, as stored in the journal (float32).
        weight_decay: decoupled; matrices alone decay, biases and norms do not.

    References:
        Malladi et al. 2023, arXiv 2305.17333, algorithm 1; Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization.
    """
    parameters.update(direction, -lr * projected_grad, lr * weight_decay)


def schedule_factor(schedule: Schedule, progress: float, warmup: float = 0.0) -> float:
    """The factor on the base learning rate at `progress` in [0, 1] of the run.

    constant 1; linear 1 - p; cosine (1 + cos(pi p)) / 2; after a linear warm-up over the first fraction `warmup`.
    """
    if progress < warmup:
        return progress / warmup
    fraction = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if schedule == "linear":
        return 1 - fraction
    if schedule == "cosine":
        return (1 + math.cos(math.pi * fraction)) / 2
    return 1.0
