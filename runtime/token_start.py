"""An exact start for texts: rows of the head for the tokens whose probabilities are most wrong.

Rows r_k added to the head for K tokens change the log-probability of the token t that follows a hidden state h, s_t before, to

    s_t + [t in K] r_t h - log(sum over K of exp(s_k + r_k h) + 1 - sum over K of exp(s_k))

which is logistic regression on top of the scores s with a class for each of the K tokens and one for all others, whose own row is taken from
the rest (runtime/softmax_fit.py). Texts that the model writes by itself are learned beside those it is given: rows that the given texts alone
determine may do anything elsewhere.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.examples import Example
from edgezo.runtime.head_fit import HeadFit
from edgezo.runtime.head_rows import HeadRows
from edgezo.runtime.objective import Objective
from edgezo.runtime.own_text import own_texts
from edgezo.runtime.scoring import Classified, Masked, Pair, TokenStates
from edgezo.runtime.softmax_fit import FOLDS, Floats, fit_softmax, mean_loss

TOKENS = 128  # rows of the head that are changed at most; docs/decisions.md has others, and other numbers of positions
POOL = 256  # tokens that they are chosen from, those that are written most often
POSITIONS = 4096  # tokens of texts that are learned from at most
CHUNK = 32  # texts between two looks at the clock
LEAST = 1e-6  # probability of all other tokens; rounding of log-probabilities could leave none


class Positions(NamedTuple):
    """n tokens of texts.

    states: float32 [n, width], what the head reads before each. scores: float64 [n, K + 1], log-probabilities of K tokens and of all others.
    gold: int64 [n], which it is. texts: int64 [n], the text that it is of. own: bool [n], whether the model wrote that by itself.
    """

    states: npt.NDArray[np.float32]
    scores: Floats
    gold: npt.NDArray[np.int64]
    texts: npt.NDArray[np.int64]
    own: npt.NDArray[np.bool_]


def token_fits(
    objective: Objective, examples: Sequence[Example], seconds: float, stage: Callable[[str], None] = lambda text: None
) -> Iterator[HeadFit]:
    """The solution, if it lowers the held-out loss of the texts given.

    Args:
        objective: of rows with one text each, or choices, of which the right one is learned.
        examples: to learn from.
        seconds: forwards of further texts begin no later than this.
        stage: told what is being done.

    Raises:
        NonFiniteLossError: the model gives no finite log-probabilities or hidden states.
    """
    stage("letting the model write texts of its own, which stay")
    own = own_texts(objective.sequences.model, objective.config.seed, objective.sequences.batch_tokens)
    stage(f"reading up to {POSITIONS} tokens of {len(examples)} texts for the exact start")
    tokens, found = read_positions(objective, examples, own, seconds)
    stage(f"solving the exact start for {len(tokens)} tokens")
    fit, given = fit_softmax(found.states, found.scores, found.gold, fold=found.texts % FOLDS, rest=True), ~found.own
    before, held_out = (mean_loss(logits[given], found.gold[given]) for logits in (found.scores, fit.held_out.logits))
    if held_out < before:
        rows = (fit.weights[:, :-1] - fit.weights[:, -1:]).astype(np.float32)
        count = len(np.unique(found.texts[given]))
        yield HeadFit(f"rows of the head for {len(tokens)} tokens", count, before, held_out, lambda: HeadRows(tokens, rows))


def read_positions(
    objective: Objective, examples: Sequence[Example], own: Sequence[Pair] = (), seconds: float = math.inf
) -> tuple[npt.NDArray[np.int64], Positions]:
    """One forward a text, of as many as there is time and room for.

    Args:
        objective: its model is read as it is now.
        examples: their right texts are read.
        own: texts that the model wrote by itself; all are read.
        seconds: forwards of further texts begin no later than this.

    Returns:
        int64 [K], the tokens that are most wrong in the texts given, in ascending order; and the positions.

    Raises:
        NonFiniteLossError: the model gives no finite log-probabilities or hidden states.
    """
    pairs = _first_pairs(examples)
    often = Counter(token for _, completion in pairs for token in completion).most_common(POOL)
    pool = np.array(sorted(token for token, _ in often), np.int64)
    deadline, parts = time.monotonic() + seconds, list[TokenStates]()
    for first in range(0, len(pairs), CHUNK):
        if not parts or time.monotonic() < deadline:
            parts.append(objective.sequences.token_states(pairs[first : first + CHUNK], pool))
    given = sum(len(part.tokens) for part in parts)
    if own:
        parts.append(objective.sequences.token_states(own, pool))
    hidden, log_probs, stands = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not np.isfinite(hidden).all() or not np.isfinite(log_probs).all():
        raise NonFiniteLossError(f"the model gives no finite log-probabilities or hidden states; {objective.sequences.model.remedy}")
    texts = [np.repeat(np.arange(len(some)), [len(completion) for _, completion in some]) for some in (pairs, own)]
    chosen = _most_wrong(log_probs[:given], stands[:given, None] == pool)
    scores, is_one = log_probs[:, chosen].astype(np.float64), stands[:, None] == pool[chosen]
    others = np.log(np.maximum(1 - np.exp(scores).sum(axis=1, keepdims=True), LEAST))
    gold = np.where(is_one.any(axis=1), is_one.argmax(axis=1), len(chosen))
    return pool[chosen], Positions(
        hidden, np.hstack([scores, others]), gold, np.concatenate([texts[0][:given], texts[1]]), np.arange(len(gold)) >= given
    )


def _first_pairs(examples: Sequence[Example]) -> list[Pair]:
    """Right texts until there are enough positions, none with so many that others could not be held out."""
    pairs: list[Pair] = []
    count = 0
    for example in examples:
        pair = example.pairs[example.gold]
        assert not isinstance(pair, Masked | Classified), "these have label words"
        if count < POSITIONS:
            pairs.append((pair[0], pair[1][: POSITIONS // FOLDS]))
            count += len(pairs[-1][1])
    return pairs


def _most_wrong(log_probs: npt.NDArray[np.float32], stands: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Places of the tokens with the largest sum over positions of |p - [it stands there]|, in ascending order."""
    wrong = np.abs(np.exp(log_probs.astype(np.float64)) - stands).sum(axis=0)
    return np.sort(np.argsort(-wrong, kind="stable")[:TOKENS])
