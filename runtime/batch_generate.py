"""Answers to many prompts: rows of like length share forwards of the generation graph, one token each, over one KV cache."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgezo.config import Sampling
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.prompt_cache import Beginning, Padded, forward, make_batches, pad, read_beginning
from edgezo.runtime.sampling import Pick, make_pick
from edgezo.runtime.scoring import BATCH_TOKENS, LOGITS_BYTES


def generate_batch(
    model: EdgeModel,
    prompts: Sequence[list[int]],
    max_tokens: int,
    stop: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    sampling: Sampling | None = None,
) -> list[str]:
    """The answer to every prompt, in order: greedy as `generate` continues it one by one (up to rounding of equal logits), but not empty.

    No right answer is empty, so the first token is picked among those that begin one: no end-of-text token, no white space alone, and without the
    stop text; only a stop text of several tokens can still come first. (Tuning makes the ends of answers likelier: after a start from 400 questions of SQuAD SmolLM2-135M ended 6 of 24 before their first word.)

    Args:
        model: at its present weights and adapter.
        prompts: token ids, none empty, each shorter than the context.
        max_tokens: tokens of an answer at most.
        stop: an answer ends before this text; else before an end-of-text token.
        batch_tokens: padded tokens of prompts and answers in the cache at most, unless one row has more.
        sampling: how to draw, every prompt by the seed and its own number; None is greedy.

    Raises:
        ConfigError: a setting of the sampling is out of range.
        NonFiniteLossError: the model gives no finite logits.
    """
    return [text for _, text in continue_batch(model, prompts, max_tokens, stop, batch_tokens, may_be_empty=False, sampling=sampling)]


def continue_batch(
    model: EdgeModel,
    prompts: Sequence[list[int]],
    max_tokens: int,
    stop: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    *,
    may_be_empty: bool = True,
    sampling: Sampling | None = None,
) -> list[tuple[list[int], str]]:
    """As `generate_batch`, with the token ids before each text; they may hold those of the stop text.

    Args:
        may_be_empty: whether a first token may end a text.
    """
    picks = [make_pick(sampling, row) for row in range(len(prompts))]
    answers: list[tuple[list[int], str]] = [([], "")] * len(prompts)
    lengths, beginning = [len(prompt) + max_tokens for prompt in prompts], read_beginning(model, prompts, len(prompts))
    rows_of_logits = LOGITS_BYTES // (4 * model.manifest.origin.vocab_size)
    alike = beginning.before > 0 and "position_ids" not in model.generation_facts.inputs  # positions are places of the cache
    for rows in make_batches(lengths, [1] * len(prompts), batch_tokens, rows_of_logits, alike=alike):
        chosen = [prompts[row][beginning.length :] for row in rows]
        found = _answer(model, beginning, chosen, max_tokens, stop, may_be_empty, [picks[row] for row in rows])
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
    return answers


def _answer(
    model: EdgeModel,
    beginning: Beginning,
    prompts: list[list[int]],
    max_tokens: int,
    stop: str | None,
    may_be_empty: bool,
    picks: list[Pick],
) -> list[tuple[list[int], str]]:
    """All rows write their next token at one place of the cache: padding stands before a text. Rows that are done leave the batch."""
    batch, past = pad(prompts, model, beginning, "left" if not beginning.before else "right"), beginning.repeated(len(prompts))
    ends = set(model.manifest.tokenizer.eos_token_ids)
    written: list[list[int]] = [[] for _ in prompts]
    texts: dict[int, str] = {}
    alive = np.arange(len(prompts))
    for count in range(max_tokens):
        logits, past = forward(model, batch, past, beginning.fed, _last(batch))
        if not count and beginning.before:
            _turn(batch, past)
        if not count and not may_be_empty:
            logits = np.where(model.text.beginnings(logits.shape[1], stop), logits, np.float32(-np.inf))
        tokens = np.array([picks[row](scores) for row, scores in zip(alive, logits, strict=True)])
        going = []
        for place, (row, token) in enumerate(zip(alive.tolist(), tokens.tolist(), strict=True)):
            if token not in ends:
                written[row].append(token)
            text = model.text.decode(written[row])
            stopped = stop is not None and stop in text
            texts[row] = text.split(stop)[0] if stop is not None and stopped else text
            full = beginning.length + len(prompts[row]) + len(written[row]) >= model.context
            if token not in ends and not stopped and not full:
                going.append(place)
        if not going:
            break
        if len(going) < len(batch.ids):
            past = {name: np.ascontiguousarray(array[going]) for name, array in past.items()}
        alive = alive[going]
        mask = np.concatenate([batch.mask[going], np.ones((len(going), 1), np.int64)], axis=1)
        batch = Padded(tokens[going][:, None], mask, batch.positions[going].max(axis=1, keepdims=True) + 1)
    return [(written[row], texts[row].strip()) for row in range(len(prompts))]


def _last(batch: Padded) -> npt.NDArray[np.int64]:
    """Row of hidden states of every text's last token."""
    rows, width = batch.ids.shape
    behind = np.argmax(batch.mask[:, : -width - 1 : -1], axis=1)
    places: npt.NDArray[np.int64] = np.arange(1, rows + 1, dtype=np.int64) * width - 1 - behind
    return places


def _turn(batch: Padded, past: dict[str, Array]) -> None:
    """Move padding from behind a text to before what it begins with, where its places part nothing."""
    for row, line in enumerate(batch.mask):
        if turn := int((line == 0).sum()):
            batch.mask[row] = np.roll(line, turn)
            for array in past.values():
                array[row] = np.roll(array[row], turn, axis=1)
