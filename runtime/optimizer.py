"""One update of theta, and the learning-rate schedules. The rules are in runtime/rules."""

import math
from collections.abc import Sequence
from typing import Literal

from edgezo.runtime.noise import Direction
from edgezo.runtime.rules.rule import Rule, Updatable
from edgezo.runtime.rules.sgd import Sgd

Schedule = Literal["constant", "linear", "cosine"]
SGD = Sgd()


def zo_step(
    parameters: Updatable,
    directions: Sequence[Direction],
    projected_grads: Sequence[float],
    lr: float,
    rule: Rule = SGD,
    weight_decay: float = 0.0,
) -> None:
    """Apply one update from its scalars; tuning and replay both call this and nothing else.

    Args:
        parameters: theta, restored to its value before the step (the restore may be pending).
        directions: name z_1 .. z_Q.
        projected_grads: g_1 .. g_Q and what else the rule takes, as stored in the journal (float32).
        lr: learning rate of this step, as stored in the journal (float32).
        rule: how they become an update; its state is that of the steps before, and is brought up to date.
        weight_decay: decoupled; matrices alone decay, biases and norms do not.

    References:
        Loshchilov and Hutter 2017, Decoupled Weight Decay Regularization (arXiv 1711.05101); for the rest see the rules.
    """
    rule.step(parameters, directions, projected_grads, lr, lr * weight_decay)


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
