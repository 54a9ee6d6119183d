"""Rows of the head changed by an exact solution: logits[:, tokens] += hidden @ rows, whatever else a run tunes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS
from edgezo.errors import AdapterError
from edgezo.manifest import Manifest


class HeadRows(NamedTuple):
    """Changes of K rows of the vocabulary projection, or of a head of classes; W[tokens] + rows^T is the changed head.

    tokens: int64 [K], without repeats. rows: float32 [width, K].
    """

    tokens: npt.NDArray[np.int64]
    rows: npt.NDArray[np.float32]

    def feeds(self) -> dict[str, npt.NDArray[Any]]:
        """By the names of the graphs' inputs."""
        return {HEAD_TOKENS: self.tokens, HEAD_ROWS: self.rows}

    def equals(self, other: "HeadRows") -> bool:
        """Whether all numbers are the same."""
        return np.array_equal(self.tokens, other.tokens) and np.array_equal(self.rows, other.rows)


NO_ROWS = HeadRows(np.zeros(0, np.int64), np.zeros((1, 0), np.float32))


def refuse_unnamed_head(head: HeadRows, manifest: Manifest) -> None:
    """Refuse to write rows of a head that is no weight of its own, or whose logits are scaled afterwards.

    Raises:
        AdapterError: there are such rows.
    """
    if len(head.tokens) and manifest.head is None:
        raise AdapterError(
            f"{manifest.origin.id}: the run changed rows of the head, and the logits of this model are not those of one weight; use --format edge or onnx-adapter"
        )


def summed(parts: Sequence[HeadRows], shares: Sequence[float]) -> HeadRows:
    """sum_i shares[i] * parts[i], float64 rounded once."""
    tokens = np.unique(np.concatenate([part.tokens for part in parts]))
    total = np.zeros((max(part.rows.shape[0] for part in parts), len(tokens)))
    for part, share in zip(parts, shares, strict=True):
        if len(part.tokens):
            total[:, np.searchsorted(tokens, part.tokens)] += share * part.rows.astype(np.float64)
    return HeadRows(tokens, total.astype(np.float32))
