"""Update rules from scalars, and the learning-rate schedules.

    sgd         theta <- theta - lr / Q * sum_q g_q z_q
    normalized  theta <- theta - lr * sum_q g_q z_q / sqrt(sum_q g_q^2)

g_q = (L+ - L-) / (2 eps) along z_q, q = 1 .. Q. With signs for z the normalized update has root mean square lr in every element, whatever the
scale of the loss, of eps, and of Q.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

from edgezo.runtime.noise import Direction

Schedule = Literal["constant", "linear", "cosine"]
Rule = Literal["sgd", "normalized"]


class Updatable(Protocol):
    """Parameters that take updates (`MutableWeights`)."""

    def update(self, directions: Sequence[Direction], scales: Sequence[float], decay: float = 0.0) -> None:
        """theta <- (1 - decay) (theta + sum_q scales[q] * z(directions[q]))."""


def zo_step(
    parameters: Updatable,
    directions: Sequence[Direction],
    projected_grads: Sequence[float],
    lr: float,
    rule: Rule = "sgd",
    weight_decay: float = 0.0,
) -> None:
    """Apply one update from its scalars; tuning and replay both call this and nothing else.

    Args:
        parameters: theta, restored to its value before the step (the restore may be pending).
        directions: name z_1 .. z_Q.
        projected_grads: g_1 .. g_Q, as stored in the journal (float32).
        lr: learning rate of this step, as stored in the journal (float32).
        rule: how they become an update.
        weight_decay: decoupled; matrices alone decay, biases and norms do not.

    References:
        Malladi et al. 2023, arXiv 2305.17333, algorithm 1 and 2 (n-SPSA); Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization.
    """
    parameters.update(directions, scales(rule, projected_grads, lr), lr * weight_decay)


def scales(rule: Rule, projected_grads: Sequence[float], lr: float) -> list[float]:
    """The factor of every z in the update; `math.fsum` rounds once, so the result is the same everywhere."""
    if rule == "sgd":
        return [-lr * grad / len(projected_grads) for grad in projected_grads]
    norm = math.sqrt(math.fsum(grad * grad for grad in projected_grads))
    return [-lr * (grad / norm) if norm else 0.0 for grad in projected_grads]


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
