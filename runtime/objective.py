"""Losses and metrics of examples under the present weights."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.tasks import Example


class Evaluation(NamedTuple):
    """What an evaluation found. `accuracy` and `macro_f1` are None unless rows have candidates; `perplexity` is None if they have."""

    rows: int
    loss: float
    accuracy: float | None
    macro_f1: float | None
    perplexity: float | None

    def score(self) -> tuple[float, float]:
        """Larger is better: accuracy first where there is one, then lower loss."""
        return (self.accuracy or 0.0, -self.loss)

    @classmethod
    def from_dict(cls, values: Mapping[str, float | int]) -> "Evaluation":
        """What `as_dict` gave."""
        return cls(int(values["rows"]), float(values["loss"]), values.get("accuracy"), values.get("macro_f1"), values.get("perplexity"))

    def as_dict(self) -> dict[str, float | int]:
        """The fields that hold a number."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def best_step(evaluations: Mapping[int, Evaluation], default: int) -> int:
    """The step whose evaluation is best, the earliest of equals; `default` when there is none."""
    return max(evaluations, key=lambda step: (evaluations[step].score(), -step), default=default)


def batch_loss(sequences: Sequences, examples: Sequence[Example]) -> float:
    """The loss that tuning lowers, in nats.

    Rows with candidates: the mean over rows of -log softmax(s)[gold], s the summed log-probability of each candidate. Rows with one
    completion: the mean over all completion tokens of -log p.
    """
    return _loss(*_scores(sequences, examples), [example.gold for example in examples])


def evaluate(sequences: Sequences, examples: Sequence[Example]) -> Evaluation:
    """Loss and metrics over all examples.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite.
    """
    scores, tokens = _scores(sequences, examples)
    gold = np.array([example.gold for example in examples])
    loss = _loss(scores, tokens, gold.tolist())
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the loss over {len(examples)} rows is {loss}; export the model again, or tune with a smaller --lr")
    if len(scores[0]) == 1:
        return Evaluation(len(examples), loss, None, None, float(np.exp(min(loss, 700.0))))
    predicted = np.array([int(np.argmax(row)) for row in scores])
    return Evaluation(len(examples), loss, float((predicted == gold).mean()), macro_f1(predicted, gold, len(scores[0])), None)


def macro_f1(predicted: npt.NDArray[np.int64], gold: npt.NDArray[np.int64], classes: int) -> float:
    """Unweighted mean over classes of 2 TP / (2 TP + FP + FN); a class that neither occurs nor is predicted is left out."""
    hits = np.bincount(gold[predicted == gold], minlength=classes)
    total = np.bincount(predicted, minlength=classes) + np.bincount(gold, minlength=classes)
    present = total > 0
    return float((2 * hits[present] / total[present]).mean())


def _scores(sequences: Sequences, examples: Sequence[Example]) -> tuple[list[npt.NDArray[np.float64]], int]:
    """Summed log-probabilities of each example's candidates, and the number of scored tokens."""
    parts = sequences.log_probs([pair for example in examples for pair in example.pairs])
    sums = np.array([part.sum() for part in parts])
    return np.split(sums, np.cumsum([len(example.pairs) for example in examples])[:-1]), sum(map(len, parts))


def _loss(scores: list[npt.NDArray[np.float64]], tokens: int, gold: list[int]) -> float:
    if len(scores[0]) == 1:
        return -float(sum(float(row[0]) for row in scores)) / tokens
    with np.errstate(invalid="ignore"):  # NaN is the estimator's to refuse
        return float(np.mean([np.logaddexp.reduce(row) - row[index] for row, index in zip(scores, gold, strict=True)]))
