"""An exact start for texts: rows of the head for the tokens whose probabilities are most wrong.

Rows r_k added to the head for K tokens change the log-probability of the token t that follows a hidden state h, s_t before, to

    s_t + [t in K] r_t h - log(sum over K of exp(s_k + r_k h) + 1 - sum over K of exp(s_k))

which is logistic regression on top of the scores s with a class for each of the K tokens and one for all others, whose own row is taken from
the rest (runtime/softmax_fit.py).
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.examples import Example
from edgezo.runtime.head_rows import HeadFit, HeadRows
from edgezo.runtime.objective import Objective
from edgezo.runtime.scoring import Pair, TokenStates
from edgezo.runtime.softmax_fit import FOLDS, Floats, fit_softmax

TOKENS = (
    128  # rows of the head that are changed at most; data to text, 4,096 positions: loss of test tokens 2.38, 2.03 with 64, 1.96 with 128
)
POOL = 256  # tokens that they are chosen from, those that are written most often
POSITIONS = 4096  # tokens of texts that are learned from at most; 64 rows by 8,192 positions: 2.02 instead of 2.03, twice the time
CHUNK = 32  # texts between two looks at the clock
LEAST = 1e-6  # probability of all other tokens; rounding of log-probabilities could leave none


class Positions(NamedTuple):
    """n tokens of texts.

    states: float32 [n, width], what the head reads before each. scores: float64 [n, K + 1], log-probabilities of K tokens and of all others.
    gold: int64 [n], which it is. texts: int64 [n], the text that it is of.
    """

    states: npt.NDArray[np.float32]
    scores: Floats
    gold: npt.NDArray[np.int64]
    texts: npt.NDArray[np.int64]


def token_fits(objective: Objective, examples: Sequence[Example], seconds: float) -> Iterator[HeadFit]:
    """The solution, if it lowers the held-out loss.

    Args:
        objective: of rows with one text each, or choices, of which the right one is learned.
        examples: to learn from.
        seconds: forwards of further texts begin no later than this.

    Raises:
        NonFiniteLossError: the model gives no finite log-probabilities or hidden states.
    """
    pairs = [example.pairs[example.gold] for example in examples]
    tokens, found = read_positions(objective, pairs, seconds)  # type: ignore[arg-type]
    fit = fit_softmax(found.states, found.scores, found.gold, fold=found.texts % FOLDS)
    if fit.held_out.loss < fit.before:
        rows = (fit.weights[:, :-1] - fit.weights[:, -1:]).astype(np.float32)
        count = int(found.texts.max()) + 1
        yield HeadFit(f"rows of the head for {len(tokens)} tokens", count, fit.before, fit.held_out.loss, lambda: HeadRows(tokens, rows))


def read_positions(objective: Objective, pairs: Sequence[Pair], seconds: float = math.inf) -> tuple[npt.NDArray[np.int64], Positions]:
    """One forward a text, of as many as there is time and room for.

    Returns:
        int64 [K], the tokens that lose most: sum over positions of |p - [it stands there]|, in ascending order; and the positions.
    """
    often = Counter(token for _, completion in pairs for token in completion).most_common(POOL)
    pool = np.array(sorted(token for token, _ in often), np.int64)
    deadline, count = time.monotonic() + seconds, 0
    parts: list[TokenStates] = []
    texts: list[npt.NDArray[np.int64]] = []
    for first in range(0, len(pairs), CHUNK):
        if parts and (time.monotonic() > deadline or count >= POSITIONS):
            break
        chunk = pairs[first : first + CHUNK]
        parts.append(objective.sequences.token_states(chunk, pool))
        texts.append(np.repeat(np.arange(first, first + len(chunk)), [len(completion) for _, completion in chunk]))
        count += len(texts[-1])
    hidden, log_probs, stands = (np.concatenate(part)[:POSITIONS] for part in zip(*parts, strict=True))
    if not np.isfinite(hidden).all() or not np.isfinite(log_probs).all():
        raise NonFiniteLossError(
            f"the model gives no finite log-probabilities or hidden states; {objective.sequences.model.manifest.remedy}"
        )
    wrong = np.abs(np.exp(log_probs.astype(np.float64)) - (stands[:, None] == pool)).sum(axis=0)
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:TOKENS])
    scores = log_probs[:, chosen].astype(np.float64)
    others = np.log(np.maximum(1 - np.exp(scores).sum(axis=1, keepdims=True), LEAST))
    gold = np.full(len(stands), len(chosen))
    at, which = np.nonzero(stands[:, None] == pool[chosen])
    gold[at] = which
    return pool[chosen], Positions(hidden, np.hstack([scores, others]), gold, np.concatenate(texts)[:POSITIONS])
