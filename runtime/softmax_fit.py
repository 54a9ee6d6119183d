"""Penalised multinomial logistic regression on top of scores that are there already, solved to the end.

    minimise over V   mean over rows of -log softmax(c s + V^T x)[gold] + penalty / 2 * sum_dk (r_d V_dk)^2

x: features; s: the candidates' scores of the untuned model, c: the share of them that is kept; r_d: the root mean square of x_d over the rows, no
less than a hundredth of the median feature's. With c = 1 the penalty pulls to the model as it is, so that few rows change little. It is chosen on held-out folds, and so is c where there is a choice.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.runtime import noise
from edgezo.runtime.lbfgs import minimize

PENALTIES = tuple(10.0 ** (power / 2) for power in range(4, -7, -1))
FOLDS = 3
TOLERANCE = 1e-4  # of the fits that are compared; the last is finer
CHUNK_FEATURES = 2048  # that are float64 at a time
LEAST_SCALE = 1e-2  # of a feature to the median one; all of SmolLM2-135M lie above, on SST-2: hidden states from 0.38, attention outputs from 0.019 (128 rows; script not kept)

Floats = npt.NDArray[np.float64]


class SoftmaxFit(NamedTuple):
    """A solution.

    weights: float64 [features, K]. share: of the scores, c. held_out: of every row by a fit of the other folds. before: mean loss in nats of
    the scores alone.
    """

    weights: Floats
    share: float
    held_out: "HeldOut"
    before: float


class HeldOut(NamedTuple):
    """Mean loss in nats of rows by fits that have not seen them, and their logits, float64 [n, K]."""

    loss: float
    logits: Floats


class Turned(NamedTuple):
    """Features along their principal axes.

    states: float64 [n, axes], less those after the neutral prompt when scores are calibrated. scores: float64 [n, K], what they are added to.
    gold: int64 [n].
    """

    states: Floats
    scores: Floats
    gold: npt.NDArray[np.int64]


def fit_softmax(
    features: npt.NDArray[np.floating],
    scores: Floats,
    gold: npt.NDArray[np.int64],
    groups: int = 1,
    shares: Sequence[float] = (1.0,),
    fold: npt.NDArray[np.int64] | None = None,
    rest: bool = False,
) -> SoftmaxFit:
    """Solve for V, the penalty chosen on held-out folds of the rows, and the share of the scores with it.

    Args:
        features: [n, features], more or fewer than rows.
        scores: [n, K].
        gold: of 0 to K - 1.
        groups: parts of the features that are each as large as a feature set of its own; the penalty is as many times as strong.
        shares: to choose from.
        fold: of each row, from 0; drawn when None.
        rest: whether the last class stands for whatever has none of its own. A class that no row outside a held-out fold has would not be one without these rows:
            there it is as the last.
    """
    fold = folds(len(gold)) if fold is None else fold
    scale = np.sqrt(np.concatenate([(part.astype(np.float64) ** 2).mean(axis=0) for part in _parts(features)]) * groups)
    scale = bounded_scale(scale)
    axes, back = _principal(features, scale)
    tried = {
        (share, penalty): found for share in shares for penalty, found in held_out(Turned(axes, share * scores, gold), fold, rest).items()
    }
    share, penalty = best = min(tried, key=lambda choice: tried[choice].loss)
    solution = back @ solve(Turned(axes, share * scores, gold), penalty, TOLERANCE / 100)
    if len(back) != len(scale):  # in terms of rows: more features than those
        solution = np.concatenate([part.T @ solution for part in _parts(features, scale)])
    return SoftmaxFit(solution / scale[:, None], share, tried[best], mean_loss(scores, gold))


def bounded_scale(scale: Floats) -> Floats:
    """Root mean squares of features, float64 [features], those far below the median raised to LEAST_SCALE times it.

    A feature that a layer norm has switched off (all-MiniLM-L6-v2 has one, of 1e-33) would else get weights of thousands on rounding errors:
    the rows are fit as well, and the loss is lost at the first change of the norm's own weight.
    """
    alive = scale[scale > 0]
    return np.maximum(scale, LEAST_SCALE * np.median(alive) if len(alive) else 1.0)


def read_out(features: npt.NDArray[np.floating], weights: Floats) -> Floats:
    """features @ weights in float64, without a float64 copy of all features."""
    firsts = range(0, features.shape[1], CHUNK_FEATURES)
    total: Floats = sum(
        (part @ weights[first : first + CHUNK_FEATURES] for first, part in zip(firsts, _parts(features), strict=True)), np.zeros(())
    )
    return total


def folds(count: int) -> npt.NDArray[np.int64]:
    """A fold for each row: rows of a file may come label by label, in turns."""
    return noise.permutation(0, count, 0) % min(FOLDS, count)


def held_out(turned: Turned, fold: npt.NDArray[np.int64], rest: bool = False) -> dict[float, HeldOut]:
    """By penalty, from the strongest down until two were no better: every row by a fit of the other folds."""
    solved: dict[int, Floats] = {}  # of the penalty before: a start near the solution
    tried: dict[float, HeldOut] = {}
    for penalty in PENALTIES:
        logits = turned.scores.copy()
        for held in range(fold.max() + 1):
            inside, outside = fold != held, fold == held
            if not inside.any():
                return {penalty: HeldOut(math.inf, logits)}  # one row: nothing to choose by
            rows = solved[held] = solve(Turned(*(part[inside] for part in turned)), penalty, TOLERANCE, solved.get(held))
            if rest:
                unknown = np.setdiff1d(np.arange(rows.shape[1]), turned.gold[inside])
                rows = rows.copy()
                rows[:, unknown] = rows[:, -1:]
            logits[outside] += turned.states[outside] @ rows
        tried[penalty] = HeldOut(mean_loss(logits, turned.gold), logits)
        losses = [found.loss for found in tried.values()]
        if min(losses[-2:]) > min(losses):
            break
    return tried


def solve(turned: Turned, penalty: float, tolerance: float, start: Floats | None = None) -> Floats:
    """V float64 [axes, K] for states along their principal axes, where a quarter of the second moment and the penalty are nearly the curvature."""
    states, scores, gold = turned
    shape, count = (states.shape[1], scores.shape[1]), len(gold)
    unit = 1 / np.sqrt((states**2).mean(axis=0)[:, None] / 4 + penalty)  # of each axis; a tenth of the iterations

    def loss(point: Floats) -> tuple[float, Floats]:
        rows = unit * point.reshape(shape)
        logits = scores + states @ rows
        wrong = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        wrong[np.arange(count), gold] -= 1
        gradient = unit * (states.T @ wrong / count + penalty * rows)
        return mean_loss(logits, gold) + penalty / 2 * float((rows**2).sum()), gradient.ravel()

    first = np.zeros(shape) if start is None else start / unit
    found: Floats = unit * minimize(loss, first.ravel(), tolerance=tolerance).reshape(shape)
    return found


def mean_loss(logits: Floats, gold: npt.NDArray[np.int64]) -> float:
    """Mean of -log softmax(logits)[gold], nats."""
    return float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(gold)), gold]).mean())


def _parts(features: npt.NDArray[np.floating], scale: Floats | None = None) -> Iterator[Floats]:
    """Columns of the features as float64, scaled, a memory's worth at a time."""
    for first in range(0, features.shape[1], CHUNK_FEATURES):
        part = features[:, first : first + CHUNK_FEATURES].astype(np.float64)
        yield part if scale is None else part / scale[first : first + CHUNK_FEATURES]


def _principal(features: npt.NDArray[np.floating], scale: Floats) -> tuple[Floats, Floats]:
    """Scaled features along their principal axes, and what a solution there is multiplied by: to weights of the scaled features where
    these are no more than rows, else to shares of the rows that sum up to them.
    """
    count, width = features.shape
    if count >= width:
        scaled = features / scale
        axes: Floats = np.linalg.eigh(scaled.T @ scaled)[1]
        return scaled @ axes, axes
    gram = np.zeros((count, count))
    for part in _parts(features, scale):
        gram += part @ part.T
    values, vectors = np.linalg.eigh(gram)
    kept = values > values[-1] * np.finfo(np.float64).eps * count
    root = np.sqrt(values[kept])
    return vectors[:, kept] * root, vectors[:, kept] / root
