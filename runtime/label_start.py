"""An exact start for label words: logistic regression on what one forward a row gives, put into the weights.

Two kinds, the one with the lower held-out loss first: rows of the head for the label words, solved on the hidden states that the head reads; or a
probe of the attention outputs of the upper layers, whose output projections write its result into the residual stream, where rows of the head
read it. Both stand on top of the untuned model's scores (runtime/softmax_fit.py).
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.examples import Example
from edgezo.runtime.head_fit import HeadFit
from edgezo.runtime.head_rows import NO_ROWS, HeadRows, summed
from edgezo.runtime.objective import Objective
from edgezo.runtime.probe_fit import RATIO, contrasts, read_linearly, relative_change
from edgezo.runtime.scoring import Candidate, Classified, Masked
from edgezo.runtime.softmax_fit import Floats, SoftmaxFit, fit_softmax, read_out

CHUNK = 256  # rows between two looks at the clock
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


def first_tokens(examples: Sequence[Example], candidates: int) -> list[int] | None:
    """The token that every candidate begins with, the same in all rows and another for each candidate; None where there is no such."""
    found = {tuple(_target(pair) for pair in example.pairs[:candidates]) for example in examples}
    one_state = all(len({_place(pair) for pair in example.pairs[:candidates]}) == 1 for example in examples)
    tokens = next(iter(found), ())
    return list(tokens) if len(found) == 1 and one_state and len(set(tokens)) == len(tokens) else None


def label_fits(objective: Objective, examples: Sequence[Example], features: Features) -> Iterator[HeadFit]:
    """Solutions by their held-out loss, those that lower it.

    Args:
        objective: of a classification; its model is as it was for the features.
        examples: rows of the features.
        features: from `read_features`.
    """
    count, candidates = features.scores.shape
    tokens = np.array(first_tokens(examples, candidates), np.int64)
    head = fit_softmax(features.states, features.scores, features.gold)
    seen = features.scores + read_out(features.states, head.weights)
    found = [
        HeadFit(
            f"rows of the head for {candidates} label words",
            count,
            head.before,
            head.held_out.loss,
            lambda: HeadRows(tokens, head.weights.astype(np.float32)),
            head.held_out.logits - seen,
        )
    ]
    layers = len(objective.sequences.model.manifest.probes)
    if features.attention.size:
        probe = fit_softmax(features.attention, features.scores, features.gold, layers, PROBE_SHARES)
        wanted = probe.share * features.scores + read_out(features.attention, probe.weights)
        found.append(
            HeadFit(
                f"a probe of the attention of {layers} layers for {candidates} label words",
                count,
                head.before,
                probe.held_out.loss,
                lambda: _written(objective, examples, features, tokens, probe, wanted),
                probe.held_out.logits - wanted,
            )
        )
    yield from sorted((fit for fit in found if fit.held_out < fit.before), key=lambda fit: fit.held_out)


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
        raise NonFiniteLossError(f"the model gives no finite scores or hidden states; {objective.sequences.model.remedy}")
    return found


def _read_chunk(objective: Objective, examples: Sequence[Example], candidates: int, attention: bool) -> Features:
    read = objective.sequences.states([pair for example in examples for pair in example.pairs], attention, stride=candidates)
    scores = np.stack(objective.candidate_scores(read.scores, examples))

    def one_a_row(states: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        apart = states.reshape(len(examples), len(states) // len(examples), states.shape[1])
        found: npt.NDArray[np.float32] = apart[:, 0] - apart[:, 1] if apart.shape[1] > 1 else apart[:, 0]
        return found

    return Features(one_a_row(read.hidden), one_a_row(read.attention), scores, np.array([example.gold for example in examples]))
