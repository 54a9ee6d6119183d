"""What an update rule is: it turns the scalars of a step into a change of theta."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from edgezo.runtime.estimators.estimator import Estimate
from edgezo.runtime.noise import Direction, Floats

# (tensor, its elements, sum of coefficients * z there, which may be overwritten) to what is added to theta
Change = Callable[[str, slice, Floats], Floats]


class Updatable(Protocol):
    """Parameters that take updates (`MutableWeights`)."""

    def update(self, directions: Sequence[Direction], scales: Sequence[float], decay: float = 0.0) -> None:
        """theta <- (1 - decay) (theta + sum_q scales[q] * z(directions[q]))."""

    def update_by(self, directions: Sequence[Direction], coefficients: Sequence[float], change: Change, decay: float = 0.0) -> None:
        """theta <- (1 - decay) (theta + change(sum_q coefficients[q] * z(directions[q])))."""

    def keep(self) -> None:
        """Keep a copy of theta."""


class Problem(Protocol):
    """The rows of one step under theta; theta is afterwards as before, restoring additions may be pending."""

    def estimates(self, batches: int = 1) -> list[Estimate]:
        """One for each direction of the step, on rows of so many steps."""

    def losses_at(self, scales: Sequence[float], factors: Sequence[int]) -> list[float]:
        """The loss over all rows of the step at theta + factor * sum_q scales[q] * z_q, for every factor."""

    def estimates_at_kept(self) -> list[Estimate]:
        """`estimates` at the theta that was kept."""


class Rule(ABC):
    """An update rule. Its state is a function of the scalars of the steps so far, so a replay rebuilds it.

    Attributes:
        state_bytes: memory that its state takes.
        rests: whether a step may move nothing on purpose.
    """

    state_bytes = 0
    rests = False

    @abstractmethod
    def step(
        self, parameters: Updatable, directions: Sequence[Direction], projected_grads: Sequence[float], lr: float, decay: float = 0.0
    ) -> None:
        """Apply one update from its scalars, float32 values as the journal holds them, and nothing else.

        Args:
            parameters: theta, restored to its value before the step (the restore may be pending).
            directions: name z_1 .. z_Q.
            projected_grads: g_1 .. g_Q, and behind them what else the rule takes of each (`SCALARS` in edgezo/config.py).
            lr: learning rate of this step.
            decay: lr * weight_decay; matrices alone decay, biases and norms do not.
        """

    def measure(self, problem: Problem, directions: Sequence[Direction], lr: float) -> list[Estimate]:
        """The scalars of a step, as the journal will hold them; needs forward passes, so a replay never calls it."""
        return problem.estimates()

    def forward_rows(self, estimate: int, rows: int) -> float:
        """Rows of forward that a step takes on average.

        Args:
            estimate: those of one estimate along all directions.
            rows: of a step.
        """
        return estimate

    def rate(self, move: float, grad_rms: float, directions: int) -> float:
        """The learning rate whose updates walk like steps that move every weight by `move` in root mean square.

        Averages make single steps shorter and as much longer the way that several go together. For z of signs.

        Args:
            grad_rms: root mean square of the projected gradients.
            directions: of a step.
        """
        return move * math.sqrt(directions) / grad_rms


class ScalarRule(Rule):
    """A rule that gives every z of the step a factor."""

    def step(
        self, parameters: Updatable, directions: Sequence[Direction], projected_grads: Sequence[float], lr: float, decay: float = 0.0
    ) -> None:
        """As `Rule`."""
        parameters.update(directions, self.scales(projected_grads, lr), decay)

    @abstractmethod
    def scales(self, projected_grads: Sequence[float], lr: float) -> list[float]:
        """The factor of every z in the update, in float64; sums are rounded once (`math.fsum`), so it is the same everywhere."""


class DenseRule(Rule):
    """A rule with float32 arrays of the size of theta, changed element by element: the bits depend on no thread and no piece.

    Args:
        sizes: elements of every tensor.
        count: arrays.
    """

    def __init__(self, sizes: Mapping[str, int], count: int) -> None:
        # written once, so that all of the memory is taken now and not page by page
        self.moments = [{name: np.full(size, 0, np.float32) for name, size in sizes.items()} for _ in range(count)]
        self.state_bytes = 4 * count * sum(sizes.values())

    def step(
        self, parameters: Updatable, directions: Sequence[Direction], projected_grads: Sequence[float], lr: float, decay: float = 0.0
    ) -> None:
        """As `Rule`, with the mean over the directions as the gradient."""
        means = [grad / len(projected_grads) for grad in projected_grads]
        parameters.update_by(directions, means, lambda name, place, gradient: self.change(name, place, gradient, lr), decay)

    @abstractmethod
    def change(self, name: str, place: slice, gradient: Floats, lr: float) -> Floats:
        """Bring the moments of some elements up to date; returns what is added to theta there.

        Args:
            gradient: mean of g_q z_q, float32; may be overwritten.
        """
