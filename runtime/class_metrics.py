"""Metrics of classification, from counts of right predictions (TP), wrong ones (FP) and rows of the class that were taken for others (FN).

precision = TP / (TP + FP)          recall = TP / (TP + FN)          F1 = 2 TP / (2 TP + FP + FN)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class ClassCounts(NamedTuple):
    """One class: how many rows have it, how many were taken for it, and how many of these rightly."""

    name: str
    rows: int
    predicted: int
    right: int

    @property
    def precision(self) -> float | None:
        """None where no row was taken for it."""
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """None where no row has it."""
        return self.right / self.rows if self.rows else None

    @property
    def f1(self) -> float | None:
        """None where neither."""
        return 2 * self.right / (self.rows + self.predicted) if self.rows + self.predicted else None

    def as_dict(self) -> dict[str, Any]:
        """Counts and figures by name; the class's own name is left out."""
        counts = {"rows": self.rows, "predicted": self.predicted, "right": self.right}
        return {**counts, "precision": self.precision, "recall": self.recall, "f1": self.f1}


def count_classes(names: Sequence[str], predicted: npt.NDArray[Any], gold: npt.NDArray[Any]) -> list[ClassCounts]:
    """Counts of every class.

    Args:
        names: of the classes.
        predicted: index of a class for each row.
        gold: that of the right one.
    """
    columns = (np.bincount(found, minlength=len(names)).tolist() for found in (gold, predicted, gold[predicted == gold]))
    return [ClassCounts(*counts) for counts in zip(names, *columns, strict=True)]


def macro_f1(classes: Sequence[ClassCounts]) -> float:
    """Unweighted mean of F1 over the classes; one that neither occurs nor is predicted is left out."""
    return float(np.mean([counts.f1 for counts in classes if counts.f1 is not None]))
