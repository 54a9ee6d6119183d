"""An exact start: what a linear model on top of one forward a row finds, put into the weights; zeroth-order steps go on below it.

Two kinds, the one with the lower held-out loss first: rows of the head for the label words, solved on the hidden states that the head reads; or a
probe of the attention outputs of the upper layers, whose output projections write its result into the residual stream, where rows of the head
read it. Both are logistic regressions on top of the untuned model's scores (runtime/softmax_fit.py).

References:
    Sugiura and Matsutani 2025, ElasticZO: A Memory-Efficient On-Device Learning with Combined Zeroth- and First-Order Optimization
    (arXiv 2501.04287).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.dataset import Dataset, spread
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.examples import Example, Offsets
from edgezo.runtime.head_rows import NO_ROWS, HeadRows, summed
from edgezo.runtime.journal_records import Record, evaluation_records, head_record, offsets_record
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.probe_fit import RATIO, contrasts, read_linearly, relative_change
from edgezo.runtime.scoring import Candidate, Classified, Masked
from edgezo.runtime.softmax_fit import Floats, HeldOut, SoftmaxFit, fit_softmax, read_out

CHUNK = 256  # rows between two looks at the clock
SHARE = 1 / 6  # of a time budget, that forwards of the start may take; a probe reads its rows twice
ATTENTION_BYTES = 1 << 28  # of attention outputs that are held; rows beyond it are not used
SCALE_ROWS, SCALE_TRIES = 64, 3  # that a probe's scale is measured on, and how often
PROBE_SHARES = (1.0, 0.0)  # of the scores that a probe may stand on; SST-2, 2,000 rows: held-out loss 0.344 and 0.338, test 85.9 and 86.5 %


class Features(NamedTuple):
    """What the fits read of n rows with K candidates.

    states: float32 [n, width], less those after the neutral prompt when scores are calibrated. attention: float32 [n, layers * in_features],
    likewise; no columns where there is no probe. scores: float64 [n, K], of the model as it is. gold: int64 [n].
    """

    states: npt.NDArray[np.float32]
    attention: npt.NDArray[np.float32]
    scores: Floats
    gold: npt.NDArray[np.int64]


class HeadFit(NamedTuple):
    """A solution to try: what it is called, the rows by fits of other rows, their logits by the fit itself, float64 [n, K], and what puts it into
    the weights, which may take forwards.
    """

    name: str
    held_out: HeldOut
    seen: Floats
    make: Callable[[], HeadRows]


class ExactStart(NamedTuple):
    """What the journal keeps of a start, the validation of the model before it, and offsets of the rows that it has seen."""

    records: list[Record]
    untuned: Evaluation | None = None
    offsets: Offsets | None = None


def resolve_start(model: EdgeModel, dataset: Dataset, notice: Callable[[str], None]) -> Dataset:
    """The data set with `start` of its configuration as it will be done: an exact one unless that was refused or cannot be.

    Raises:
        ConfigError: one was asked for and cannot be.
    """
    asked, problem = dataset.config.start, obstacle(model, dataset)
    if asked in {"exact", "head"} and problem is not None:
        raise ConfigError(f"--start {asked}: {problem}; or give --start none")
    if asked is None and problem is not None and dataset.task.kind == "classification":
        notice(f"no exact start: {problem}")
    start = (asked or "exact") if problem is None else "none"
    return dataset._replace(config=dataset.config.model_copy(update={"start": start}))


def start_exactly(model: EdgeModel, objective: Objective, dataset: Dataset, notice: Callable[[str], None]) -> ExactStart:
    """Give the model the solution that helps its validation rows, the one that promises more tried first; without such rows that one."""
    config, valid = dataset.config, dataset.valid
    chosen = np.array(spread(list(range(len(dataset.train.examples))), config.start_rows))
    # a file may come label by label, and parts of the rows are used for themselves
    rows = chosen[noise.permutation(config.seed, len(chosen), 0)]
    examples = [dataset.train.examples[row] for row in rows]
    before = objective.evaluate(valid.examples) if valid is not None else None
    seconds = SHARE * 60 * config.minutes if config.minutes is not None else math.inf
    features = read_features(objective, examples, len(dataset.task.words), seconds, attention=None if config.start == "exact" else False)
    examples, loss = examples[: len(features.gold)], math.nan
    found, refused = model.head, "lower the held-out loss"
    for fit, loss in fits(objective, examples, features):
        try:
            model.head = summed([found, fit.make()], [1.0, 1.0])
            after = objective.evaluate(valid.examples) if valid is not None else None
        except NonFiniteLossError:  # of the changed model; as it was it gave the features
            model.head, refused = found, f"keep the losses finite ({fit.name})"
            continue
        gain = _gain(fit, loss, before, after)
        if before is None or after is None or after.score() > before.score():
            notice(f"exact start: {fit.name} for {len(dataset.task.words)} label words, from {len(examples)} rows: {gain}")
            told = evaluation_records(0, before, True) if before is not None else []
            less = fit.held_out.logits - fit.seen  # softmax does not see a constant of a row
            offsets = Offsets(rows[: len(examples)], (less - less.mean(axis=1, keepdims=True)).astype(np.float32))
            return ExactStart([*told, head_record(model.head), offsets_record(offsets)], before, offsets)
        refused = f"help the validation rows ({gain})"
        model.head = found
    notice(f"exact start: what {len(examples)} rows teach does not {refused}; the run starts from the model as it is")
    return ExactStart([head_record(found)] if len(found.tokens) else [])


def _gain(fit: HeadFit, loss: float, before: Evaluation | None, after: Evaluation | None) -> str:
    if before is None or after is None or before.accuracy is None or after.accuracy is None:
        return f"held-out loss {loss:.3f} -> {fit.held_out.loss:.3f}"
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


def fits(objective: Objective, examples: Sequence[Example], features: Features) -> Iterator[tuple[HeadFit, float]]:
    """Solutions by their held-out loss, those that lower it, each with the loss before.

    Args:
        objective: of a classification; its model is as it was for the features.
        examples: rows of the features.
        features: from `read_features`.
    """
    tokens = np.array(first_tokens(examples, features.scores.shape[1]), np.int64)
    head = fit_softmax(features.states, features.scores, features.gold)
    seen = features.scores + read_out(features.states, head.weights)
    found = [HeadFit("rows of the head", head.held_out, seen, lambda: HeadRows(tokens, head.weights.astype(np.float32)))]
    layers = len(objective.sequences.model.manifest.probes)
    if features.attention.size:
        probe = fit_softmax(features.attention, features.scores, features.gold, layers, PROBE_SHARES)
        wanted = probe.share * features.scores + read_out(features.attention, probe.weights)
        name = f"a probe of the attention of {layers} layers"
        found.append(HeadFit(name, probe.held_out, wanted, lambda: _written(objective, examples, features, tokens, probe, wanted)))
    for fit in sorted(found, key=lambda fit: fit.held_out.loss):
        if fit.held_out.loss < head.before:
            yield fit, head.before


def _written(
    objective: Objective,
    examples: Sequence[Example],
    features: Features,
    tokens: npt.NDArray[np.int64],
    probe: SoftmaxFit,
    wanted: Floats,
) -> HeadRows:
    """The probe written into the residual stream, as large as moves the hidden states by RATIO, and rows of the head that read it there."""
    model, candidates = objective.sequences.model, len(tokens)
    before, basis = model.head, contrasts(candidates)
    read = (probe.weights @ basis).reshape(len(model.manifest.probes), -1, candidates - 1)
    read = np.pad(read, ((0, 0), (0, 0), (before.probe.shape[2], 0)))  # directions that a start before this one left free

    def changed(scale: float, rows: int) -> tuple[HeadRows, Features]:
        written = HeadRows(NO_ROWS.tokens, NO_ROWS.rows, (scale * read).astype(np.float32))
        model.head = summed([before, written], [1.0, 1.0])
        try:
            return written, read_features(objective, examples[:rows], candidates, attention=False)
        finally:
            model.head = before

    scale = 1.0
    for _ in range(SCALE_TRIES):
        _, small = changed(scale, SCALE_ROWS)
        moved = relative_change(features.states[: len(small.gold)], small.states)
        scale *= RATIO / max(moved, RATIO / 1e6)
        if 1 / 2 < moved / RATIO < 2:
            break
    written, there = changed(scale, len(examples))
    # the scores have moved, too: what the rows of the head add makes up for that
    rows = read_linearly(there.states.astype(np.float64), (wanted - there.scores) @ basis) @ basis.T
    return HeadRows(tokens, rows.astype(np.float32), written.probe)


def _target(pair: Candidate) -> int:
    return pair.target if isinstance(pair, Masked | Classified) else pair[1][0]


def _place(pair: Candidate) -> tuple[int, ...]:
    """What tells apart the hidden states that the first tokens of candidates are scored from."""
    if isinstance(pair, Masked | Classified):
        return (*pair.tokens, pair.position if isinstance(pair, Masked) else -1)
    return tuple(pair[0])


def read_features(
    objective: Objective, examples: Sequence[Example], candidates: int, seconds: float = math.inf, attention: bool | None = None
) -> Features:
    """One forward a row, of as many rows as there is time and memory for.

    Args:
        objective: of a classification, over the model as it is.
        examples: rows.
        candidates: label words of a row, which begin with tokens of their own.
        seconds: forwards of further rows begin no later than this.
        attention: whether to read that, too; where the model can be given a probe when None.

    Raises:
        NonFiniteLossError: the model gives no finite scores or hidden states.
    """
    probes, deadline = objective.sequences.model.manifest.probes, time.monotonic() + seconds
    attention = bool(probes) if attention is None else attention
    if attention:
        examples = examples[: max(CHUNK, ATTENTION_BYTES // (4 * len(probes) * probes[0].in_features))]
    parts: list[Features] = []
    for first in range(0, len(examples), CHUNK):
        if not parts or time.monotonic() < deadline:
            parts.append(_read_chunk(objective, examples[first : first + CHUNK], candidates, attention))
    found = Features(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    if not all(np.isfinite(part).all() for part in found):
        raise NonFiniteLossError("the model gives no finite scores or hidden states; export it again")
    return found


def _read_chunk(objective: Objective, examples: Sequence[Example], candidates: int, attention: bool) -> Features:
    read = objective.sequences.states([pair for example in examples for pair in example.pairs], attention, stride=candidates)
    scores = np.stack(objective.candidate_scores(read.scores, examples))

    def one_a_row(states: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        apart = states.reshape(len(examples), len(states) // len(examples), states.shape[1])
        found: npt.NDArray[np.float32] = apart[:, 0] - apart[:, 1] if apart.shape[1] > 1 else apart[:, 0]
        return found

    return Features(one_a_row(read.hidden), one_a_row(read.attention), scores, np.array([example.gold for example in examples]))
