"""Losses and metrics of examples under the present weights."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.scoring import Copies, Scores, Sequences
from edgezo.runtime.tasks import Example


def batch_loss(sequences: Sequences, examples: Sequence[Example]) -> float:
    """The loss that tuning lowers, in nats.

    Rows with candidates: the mean over rows of -log softmax(s)[gold], s the summed log-probability of each candidate. Rows with one
    completion: the mean over all completion tokens of -log p.
    """
    return _loss(*_scores(sequences, examples), [example.gold for example in examples])


def stacked_losses(
    sequences: Sequences, groups: Sequence[Sequence[Example]], sides: Sequence[int], copies: Copies
) -> npt.NDArray[np.float64]:
    """`batch_loss` of every group under each of its copies, float64 [groups, sides]."""
    scored = sequences.stacked([[pair for example in group for pair in example.pairs] for group in groups], sides, copies)
    return np.array(
        [
            [_loss(*_by_example(parts, group), [example.gold for example in group]) for parts in by_side]
            for group, by_side in zip(groups, scored, strict=True)
        ]
    )


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
        return Evaluation(len(examples), loss)
    predicted = np.array([int(np.argmax(row)) for row in scores])
    return Evaluation(len(examples), loss, float((predicted == gold).mean()), macro_f1(predicted, gold, len(scores[0])))


def macro_f1(predicted: npt.NDArray[np.int64], gold: npt.NDArray[np.int64], classes: int) -> float:
    """Unweighted mean over classes of 2 TP / (2 TP + FP + FN); a class that neither occurs nor is predicted is left out."""
    hits = np.bincount(gold[predicted == gold], minlength=classes)
    total = np.bincount(predicted, minlength=classes) + np.bincount(gold, minlength=classes)
    present = total > 0
    return float((2 * hits[present] / total[present]).mean())


def _scores(sequences: Sequences, examples: Sequence[Example]) -> tuple[list[npt.NDArray[np.float64]], int]:
    """Summed log-probabilities of each example's candidates, and the number of scored tokens."""
    return _by_example(sequences.log_probs([pair for example in examples for pair in example.pairs]), examples)


def _by_example(parts: Scores, examples: Sequence[Example]) -> tuple[list[npt.NDArray[np.float64]], int]:
    sums = np.array([part.sum() for part in parts])
    return np.split(sums, np.cumsum([len(example.pairs) for example in examples])[:-1]), sum(map(len, parts))


def _loss(scores: list[npt.NDArray[np.float64]], tokens: int, gold: list[int]) -> float:
    if len(scores[0]) == 1:
        return -float(sum(float(row[0]) for row in scores)) / tokens
    with np.errstate(invalid="ignore"):  # NaN is the estimator's to refuse
        return float(np.mean([np.logaddexp.reduce(row) - row[index] for row, index in zip(scores, gold, strict=True)]))
