"""What an evaluation found, and which of several is best."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Evaluation(NamedTuple):
    """Loss in nats and metrics over `rows` rows.

    `accuracy` and `macro_f1` are None unless rows have candidates. `others`: metrics of generated text, of preferences, or of the user's own
    function, by name; larger is better, the first ranks.
    """

    rows: int
    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None
    others: Mapping[str, float] = MappingProxyType({})

    @property
    def perplexity(self) -> float | None:
        """exp(loss), the loss being the mean over tokens; None where rows have candidates."""
        return math.exp(min(self.loss, 700.0)) if self.accuracy is None and "preferred" not in self.others else None

    def score(self) -> tuple[float, float]:
        """Larger is better: the first of the other metrics or else accuracy where there is one, then lower loss."""
        return (next(iter(self.others.values()), self.accuracy or 0.0), -self.loss)

    @property
    def ranked_by(self) -> str:
        """What `score` goes by, in words."""
        first = next(iter(self.others), "accuracy" if self.accuracy is not None else None)
        return "loss" if first is None else f"{first.replace('_', ' ')}, then loss"

    def as_dict(self) -> dict[str, float | int]:
        """The fields that hold a number."""
        values = {**self._asdict(), "perplexity": self.perplexity}
        del values["others"]
        return {**{name: value for name, value in values.items() if value is not None}, **self.others}


def scheduled_evaluations(evaluations: Mapping[int, Evaluation], every: int, step: int) -> dict[int, Evaluation]:
    """Those of every `every` steps and of `step`, without those where an earlier call ended: a run that goes on is the run that never stopped."""
    return {number: found for number, found in evaluations.items() if number % every == 0 or number == step}


def evaluations_waited(evaluations: Mapping[int, Evaluation], every: int, step: int) -> int:
    """How many of every `every` steps came after the best of them and `step`, which is what patience counts."""
    scheduled = scheduled_evaluations(evaluations, every, step)
    best = best_step(scheduled, step)
    return sum(number > best and number % every == 0 for number in scheduled)


def best_step(evaluations: Mapping[int, Evaluation], default: int) -> int:
    """The step whose evaluation is best, the earliest of equals; `default` when there is none."""
    return max(evaluations, key=lambda step: (evaluations[step].score(), -step), default=default)
