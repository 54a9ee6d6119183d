"""Metrics of classification, from counts.

TP: rows of a class that were taken for it; FP: others that were taken for it; FN: rows of it that were taken for others.

    precision = TP / (TP + FP)          recall = TP / (TP + FN)          F1 = 2 TP / (2 TP + FP + FN)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Classes = npt.NDArray[np.int64]


class ClassCounts(NamedTuple):
    """One class: how many rows have it (TP + FN), for how many it was predicted (TP + FP), and TP."""

    rows: int
    predicted: int
    true_positives: int

    @property
    def precision(self) -> float | None:
        """TP / (TP + FP); None where it was never predicted."""
        return self.true_positives / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN); None where no row has it."""
        return self.true_positives / self.rows if self.rows else None

    @property
    def f1(self) -> float | None:
        """2 TP / (2 TP + FP + FN); None where it neither occurs nor was predicted."""
        return 2 * self.true_positives / (self.rows + self.predicted) if self.rows + self.predicted else None

    def as_dict(self) -> dict[str, Any]:
        """Counts and figures by name."""
        return {**self._asdict(), "precision": self.precision, "recall": self.recall, "f1": self.f1}


def count_classes(predicted: Classes, gold: Classes, classes: int) -> list[ClassCounts]:
    """Counts of every class.

    Args:
        predicted: int64 [rows], number of the predicted class, from 0.
        gold: int64 [rows], number of the right one.
        classes: how many there are.
    """
    columns = (np.bincount(found, minlength=classes).tolist() for found in (gold, predicted, gold[predicted == gold]))
    return [ClassCounts(*counts) for counts in zip(*columns, strict=True)]


def macro_f1(counts: Sequence[ClassCounts]) -> float:
    """mean_k F1_k over the classes k that occur or were predicted."""
    return float(np.mean([found.f1 for found in counts if found.f1 is not None]))
