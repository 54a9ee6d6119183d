"""Notices that a run has left what it had learned: losses far above the lowest level they had, beyond their own noise.

    sigma^2 = (k s^2 + sum_i (l_i+1 - l_i)^2 / 2) / (k + n)          s = max(|l_0|, LEAST_SPREAD) / sqrt(rows): what a step's loss may scatter before any was seen
    risen:  mean(last m) - level > NOISE sigma sqrt(1/m + 1/w)   and   mean(last m) - level > RISE |level|,          for m = 2 or m = 8

level is the lowest mean of w = 8 losses in a row (fewer at the start) before these m.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.runtime.evaluation import Evaluation

LEVEL_STEPS = 8
RECENT_STEPS = (2, 8)  # an explosion within two steps, a slow rise over eight
NOISE = 5.0  # standard deviations; whoever asks looks again at the same rows
RISE = 0.25  # of the level
PRIOR_STEPS = 4  # k: how many steps the guess of the noise counts for
LEAST_SPREAD = 0.25  # of one row's loss; that of dpo begins at ln 2 for every row
WORSE = 1.1  # of the start's validation loss


class Rise(NamedTuple):
    """Losses rose from `level` to `loss`; `good_step` is the last step of the level: so many steps were done when it was measured."""

    loss: float
    level: float
    good_step: int


def find_rise(losses: Sequence[float], rows: int) -> Rise | None:
    """Whether the last losses lie far above the lowest level before them.

    Args:
        losses: l_i measured at the weights after i steps, i = 0 .. n - 1.
        rows: of a step.

    Returns:
        None while all is well.
    """
    for recent in RECENT_STEPS:
        before = np.asarray(losses[:-recent], np.float64)
        if not len(before):
            continue
        level, good_step, count = lowest_level(before)
        rise = float(np.mean(losses[-recent:])) - level
        scatter = NOISE * _noise(before, rows) * math.sqrt(1 / recent + 1 / count)
        if rise > scatter and rise > RISE * abs(level):
            return Rise(level + rise, level, good_step)
    return None


def lowest_level(losses: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, int, int]:
    """The lowest mean of LEVEL_STEPS losses in a row, the index of the last of these, and how many they are."""
    count = min(LEVEL_STEPS, len(losses))
    means = np.convolve(losses, np.full(count, 1 / count), mode="valid")
    first = int(np.argmin(means))
    return float(means[first]), first + count - 1, count


def worse_than_start(start: Evaluation, found: Evaluation) -> bool:
    """Whether a state is no better by its metric than the start, and its loss clearly higher."""
    return found.score() <= start.score() and found.loss > WORSE * start.loss


def _noise(losses: npt.NDArray[np.float64], rows: int) -> float:
    """Standard deviation of a step's loss, from differences of neighbours, which a trend hardly touches."""
    prior = max(abs(float(losses[0])), LEAST_SPREAD) ** 2 / rows
    changes = np.diff(losses)
    return math.sqrt((PRIOR_STEPS * prior + float(changes @ changes) / 2) / (PRIOR_STEPS + len(changes)))
