"""Solving a probe of the attention, writing its result into the residual stream, and the rows of the head that read it there.

The attention outputs of the upper layers at the last token tell the label better than the final hidden state does: SmolLM2-135M, linear fits on
2,000 rows, test accuracy 86.5 instead of 82.8 % on SST-2, 93.4 instead of 83.0 % on TREC. A linear read-out of them is a change of rank K - 1 of
the output projections; what it writes is small against the residual stream, and passes the layers above nearly unchanged.

References:
    Li et al. 2023, Inference-Time Intervention: Eliciting Truthful Answers from a Language Model (arXiv 2306.03341), which probes the
    outputs of attention heads and adds directions there.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgezo.runtime.softmax_fit import Floats, bounded_scale, folds

RATIO = 0.2  # of the change of the hidden states to them: 2,000 rows of SST-2 lose 0, 0, 1 % at 0.1, 0.2, 0.4, of TREC 4, 3, 2 %
RIDGES = tuple(10.0**power for power in range(-7, 1))  # of features of mean square 1


def contrasts(count: int) -> Floats:
    """Orthonormal columns [count, count - 1] that add up to zero: scores are the same with a constant added."""
    centred = np.eye(count) - 1 / count
    columns: Floats = np.linalg.qr(centred[:, : count - 1])[0]
    return columns


def read_linearly(states: Floats, wanted: Floats) -> Floats:
    """U float64 [width, columns], states @ U near `wanted`: ridge regression, the ridge chosen on held-out folds.

    Args:
        states: float64 [n, width].
        wanted: float64 [n, columns].
    """
    scale = bounded_scale(np.sqrt((states**2).mean(axis=0)))
    scaled, fold = states / scale, folds(len(states))
    errors = np.zeros(len(RIDGES))
    for held in range(fold.max() + 1):
        inside, outside = fold != held, fold == held
        for place, weights in enumerate(_ridge(scaled[inside], wanted[inside], RIDGES)):
            errors[place] += ((scaled[outside] @ weights - wanted[outside]) ** 2).sum()
    (best,) = _ridge(scaled, wanted, [RIDGES[int(errors.argmin())]])
    found: Floats = best / scale[:, None]
    return found


def _ridge(states: Floats, wanted: Floats, ridges: Sequence[float]) -> list[Floats]:
    values, axes = np.linalg.eigh(states.T @ states / len(states))
    turned = axes.T @ (states.T @ wanted / len(states))
    return [axes @ (turned / (np.maximum(values, 0)[:, None] + ridge)) for ridge in ridges]


def relative_change(before: npt.NDArray[np.floating], after: npt.NDArray[np.floating]) -> float:
    """|after - before| / |before|, over all elements."""
    return float(np.linalg.norm(after - before) / np.linalg.norm(before))
