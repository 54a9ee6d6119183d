"""Labels for rows without one: what a tuned classifier is for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgezo.errors import DataError, NonFiniteLossError
from edgezo.runtime.data import Row
from edgezo.runtime.examples import make_candidates
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.tasks import Task


class Prediction(NamedTuple):
    """The likeliest label of a row, as the data writes it, and the probability of every label: softmax over the candidates' log p."""

    label: str
    probabilities: dict[str, float]


def predict(model: EdgeModel, rows: Sequence[Row], task: Task, max_length: int) -> list[Prediction]:
    """Rank the label words of every row; the rows need no label.

    Args:
        rows: with the template's fields.
        task: a classification.
        max_length: tokens of a row; longer prompts lose their first tokens.

    Raises:
        DataError: a row lacks a field of the template, or a label word does not fit.
        NonFiniteLossError: the model gives no finite scores.
    """
    if task.kind != "classification":
        raise DataError(f"labels are predicted by a classification, this is {task.kind}; give --template and --labels")
    candidates = [make_candidates(row, task, model.text, max_length)[0] for row in rows]
    scores = iter(Sequences(model).log_probs([pair for pairs in candidates for pair in pairs]))
    found = []
    for _ in rows:
        sums = np.array([next(scores).sum() for _ in task.words])
        if task.calibrate is not None:
            sums -= np.array([next(scores).sum() for _ in task.words])
        if not np.isfinite(sums).all():
            raise NonFiniteLossError("the model gives no finite scores; export it again, or tune with a smaller --lr")
        probabilities = np.exp(sums - np.logaddexp.reduce(sums))
        ranked = dict(zip(task.classes, probabilities.tolist(), strict=True))
        found.append(Prediction(max(ranked, key=lambda label: ranked[label]), ranked))
    return found
