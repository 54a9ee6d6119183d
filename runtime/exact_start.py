"""An exact start: the rows of the head for the label words, solved on the hidden states of one forward a row.

    minimise over V   mean over rows of -log softmax(s + V^T h)[gold] + penalty / 2 * sum_dk (r_d V_dk)^2

h: what the head reads where the label word is scored; s: the candidates' scores of the untuned model; r_d: the root mean square of h_d over the
rows. The penalty pulls to the model as it is, so that few rows change little. For the last layer this is what backpropagation would converge to; zeroth-order
steps go on below it.

References:
    Sugiura and Matsutani 2025, ElasticZO: A Memory-Efficient On-Device Learning with Combined Zeroth- and First-Order Optimization
    (arXiv 2501.04287).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.dataset import Dataset, spread
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.examples import Example
from edgezo.runtime.head_rows import NO_ROWS, HeadRows, summed
from edgezo.runtime.journal_records import Record, evaluation_records, head_record
from edgezo.runtime.lbfgs import minimize
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.scoring import Candidate, Classified, Masked

PENALTIES = tuple(10.0 ** (power / 2) for power in range(4, -7, -1))
FOLDS = 3
TOLERANCE = 1e-4  # of the fits that are compared; the last is finer
CHUNK = 256  # rows between two looks at the clock
SHARE = 1 / 4  # of a time budget, that forwards of the start may take

Floats = npt.NDArray[np.float64]


class Features(NamedTuple):
    """What the fit reads of n rows with K candidates.

    states: float64 [n, width], less those after the neutral prompt when scores are calibrated. scores: float64 [n, K], of the model as it is.
    gold: int64 [n].
    """

    states: Floats
    scores: Floats
    gold: npt.NDArray[np.int64]


class HeadFit(NamedTuple):
    """A solution.

    head: no rows where they would not lower the held-out loss. rows: of data it was solved on. loss_before, loss_after:
    of the model as it is, and held-out with the solution, nats.
    """

    head: HeadRows
    rows: int
    loss_before: float
    loss_after: float


class ExactStart(NamedTuple):
    """What the journal keeps of a start, and the validation of the model before it."""

    records: list[Record]
    untuned: Evaluation | None


def resolve_start(model: EdgeModel, dataset: Dataset, notice: Callable[[str], None]) -> Dataset:
    """The data set with `start` of its configuration as it will be done: an exact one unless that was refused or cannot be.

    Raises:
        ConfigError: one was asked for and cannot be.
    """
    asked, problem = dataset.config.start, obstacle(model, dataset)
    if asked == "exact" and problem is not None:
        raise ConfigError(f"--start exact: {problem}; or give --start none")
    if asked is None and problem is not None and dataset.task.kind == "classification":
        notice(f"no exact start: {problem}")
    start = "exact" if asked != "none" and problem is None else "none"
    return dataset._replace(config=dataset.config.model_copy(update={"start": start}))


def start_exactly(model: EdgeModel, objective: Objective, dataset: Dataset, notice: Callable[[str], None]) -> ExactStart:
    """Give the model its rows of the head, unless validation does not get better."""
    config, valid = dataset.config, dataset.valid
    examples = spread(dataset.train.examples, config.start_rows)
    before = objective.evaluate(valid.examples) if valid is not None else None
    seconds = SHARE * 60 * config.minutes if config.minutes is not None else math.inf
    fit = fit_head(objective, examples, len(dataset.task.words), seconds)
    found, model.head = model.head, summed([model.head, fit.head], [1.0, 1.0])
    after = objective.evaluate(valid.examples) if valid is not None and len(fit.head.tokens) else None
    if not len(fit.head.tokens) or (before is not None and after is not None and after.score() <= before.score()):
        model.head = found
        worse = (
            f"lower the held-out loss {fit.loss_before:.3f}"
            if not len(fit.head.tokens)
            else f"help the validation rows ({_gain(fit, before, after)})"
        )
        notice(f"exact start: rows of the head from {fit.rows} rows do not {worse}; the run starts from the model as it is")
        return ExactStart([head_record(found)] if len(found.tokens) else [], None)
    notice(f"exact start: rows of the head for {len(fit.head.tokens)} label words, from {fit.rows} rows: {_gain(fit, before, after)}")
    told = evaluation_records(0, before, True) if before is not None else []
    return ExactStart([*told, head_record(model.head)], before)


def _gain(fit: HeadFit, before: Evaluation | None, after: Evaluation | None) -> str:
    if before is None or after is None or before.accuracy is None or after.accuracy is None:
        return f"held-out loss {fit.loss_before:.3f} -> {fit.loss_after:.3f}"
    return f"validation accuracy {100 * before.accuracy:.1f} % -> {100 * after.accuracy:.1f} %, loss {before.loss:.3f} -> {after.loss:.3f}"


def first_tokens(examples: Sequence[Example], candidates: int) -> list[int] | None:
    """The token that every candidate begins with, the same in all rows and another for each candidate; None where there is no such."""
    found = {tuple(_target(pair) for pair in example.pairs[:candidates]) for example in examples}
    states = all(len({_place(pair) for pair in example.pairs[:candidates]}) == 1 for example in examples)
    tokens = next(iter(found), ())
    return list(tokens) if len(found) == 1 and states and len(set(tokens)) == len(tokens) else None


def obstacle(model: EdgeModel, dataset: Dataset) -> str | None:
    """Why a data set has no exact start; None where it has one."""
    task, examples = dataset.task, dataset.train.examples
    if task.kind != "classification":
        return f"rows of kind {task.kind} have no label words"
    if not model.takes_head_rows:
        return f"{model.directory} was exported without inputs for rows of the head, export it again"
    if first_tokens(examples, len(task.words)) is None:
        return f"the label words {', '.join(task.words)} do not begin with tokens of their own, choose other words"
    return None


def fit_head(objective: Objective, examples: Sequence[Example], candidates: int, seconds: float = math.inf) -> HeadFit:
    """Solve the rows of the head on examples, the penalty chosen on held-out folds of them.

    Args:
        objective: of a classification; its model is as it is now.
        examples: rows to learn from, one forward each.
        candidates: label words of a row, which begin with tokens of their own.
        seconds: forwards of further rows begin no later than this.

    Raises:
        NonFiniteLossError: the model gives no finite scores or hidden states.
    """
    tokens = first_tokens(examples, candidates)
    assert tokens is not None
    features = _read(objective, examples, candidates, time.monotonic() + seconds)
    scale = np.sqrt((features.states**2).mean(axis=0))
    scale[scale == 0] = 1.0
    basis = _principal(features.states / scale)
    turned = features._replace(states=features.states / scale @ basis)
    losses = _held_out_losses(turned)
    penalty = min(losses, key=lambda penalty: losses[penalty])
    rows = basis @ _solve(turned, penalty, TOLERANCE / 100) / scale[:, None]
    before = _mean_loss(features.scores, features.gold)
    head = HeadRows(np.array(tokens, np.int64), rows.astype(np.float32)) if losses[penalty] < before else NO_ROWS
    return HeadFit(head, len(features.gold), before, losses[penalty])


def _target(pair: Candidate) -> int:
    return pair.target if isinstance(pair, Masked | Classified) else pair[1][0]


def _place(pair: Candidate) -> tuple[int, ...]:
    """What tells apart the hidden states that the first tokens of candidates are scored from."""
    if isinstance(pair, Masked | Classified):
        return (*pair.tokens, pair.position if isinstance(pair, Masked) else -1)
    return tuple(pair[0])


def _read(objective: Objective, examples: Sequence[Example], candidates: int, deadline: float) -> Features:
    parts: list[Features] = []
    for first in range(0, len(examples), CHUNK):
        if not parts or time.monotonic() < deadline:
            parts.append(_read_chunk(objective, examples[first : first + CHUNK], candidates))
    found = Features(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    if not (np.isfinite(found.scores).all() and np.isfinite(found.states).all()):
        raise NonFiniteLossError("the model gives no finite scores or hidden states; export it again")
    return found


def _read_chunk(objective: Objective, examples: Sequence[Example], candidates: int) -> Features:
    every, states = objective.sequences.log_probs_and_states([pair for example in examples for pair in example.pairs])
    scores = np.stack(objective.candidate_scores(every, examples))
    apart = states.reshape(len(examples), -1, states.shape[1])[:, ::candidates].astype(np.float64)
    found = apart[:, 0] - apart[:, 1] if apart.shape[1] > 1 else apart[:, 0]
    return Features(found, scores, np.array([example.gold for example in examples]))


def _held_out_losses(features: Features) -> dict[float, float]:
    """By penalty, from the strongest down until two were no better: the mean loss in nats of every row by a fit of the other folds."""
    count = len(features.gold)
    fold = noise.permutation(0, count, 0) % min(FOLDS, count)  # rows of a file may come label by label, in turns
    solved: dict[int, Floats] = {}  # of the penalty before: a start near the solution
    losses: dict[float, float] = {}
    for penalty in PENALTIES:
        total = 0.0
        for held in range(fold.max() + 1):
            inside, outside = fold != held, fold == held
            if not inside.any():
                return {penalty: math.inf}  # one row: nothing to choose by
            rows = solved[held] = _solve(Features(*(part[inside] for part in features)), penalty, TOLERANCE, solved.get(held))
            total += outside.sum() * _mean_loss(features.scores[outside] + features.states[outside] @ rows, features.gold[outside])
        losses[penalty] = float(total) / count
        if min(list(losses.values())[-2:]) > min(losses.values()):
            break
    return losses


def _principal(states: Floats) -> Floats:
    """Orthonormal columns [width, min(n, width) at most] along the principal axes of the states; the solution is in their span."""
    count, width = states.shape
    if count >= width:
        axes: Floats = np.linalg.eigh(states.T @ states)[1]
        return axes
    values, vectors = np.linalg.eigh(states @ states.T)
    kept = values > values[-1] * np.finfo(np.float64).eps * count
    basis: Floats = states.T @ vectors[:, kept] / np.sqrt(values[kept])
    return basis


def _solve(features: Features, penalty: float, tolerance: float, start: Floats | None = None) -> Floats:
    """V float64 [axes, K] for states along their principal axes, where a quarter of the second moment and the penalty are nearly the curvature."""
    states, scores, gold = features
    shape, count = (states.shape[1], scores.shape[1]), len(gold)
    unit = 1 / np.sqrt((states**2).mean(axis=0)[:, None] / 4 + penalty)  # of each axis; a tenth of the iterations

    def loss(point: Floats) -> tuple[float, Floats]:
        rows = unit * point.reshape(shape)
        logits = scores + states @ rows
        wrong = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        wrong[np.arange(count), gold] -= 1
        gradient = unit * (states.T @ wrong / count + penalty * rows)
        return _mean_loss(logits, gold) + penalty / 2 * float((rows**2).sum()), gradient.ravel()

    first = np.zeros(shape) if start is None else start / unit
    found: Floats = unit * minimize(loss, first.ravel(), tolerance=tolerance).reshape(shape)
    return found


def _mean_loss(logits: Floats, gold: npt.NDArray[np.int64]) -> float:
    return float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(gold)), gold]).mean())
