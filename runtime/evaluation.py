"""What an evaluation found, and which of several is best."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Evaluation(NamedTuple):
    """Loss in nats and metrics over `rows` rows. `accuracy` and `macro_f1` are None unless rows have candidates."""

    rows: int
    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(loss), the loss being the mean over tokens; None where rows have candidates."""
        return math.exp(min(self.loss, 700.0)) if self.accuracy is None else None

    def score(self) -> tuple[float, float]:
        """Larger is better: accuracy first where there is one, then lower loss."""
        return (self.accuracy or 0.0, -self.loss)

    def as_dict(self) -> dict[str, float | int]:
        """The fields that hold a number."""
        values = {**self._asdict(), "perplexity": self.perplexity}
        return {name: value for name, value in values.items() if value is not None}


def best_step(evaluations: Mapping[int, Evaluation], default: int) -> int:
    """The step whose evaluation is best, the earliest of equals; `default` when there is none."""
    return max(evaluations, key=lambda step: (evaluations[step].score(), -step), default=default)
