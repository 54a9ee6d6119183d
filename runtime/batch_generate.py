"""Answers to many prompts: rows of like length share forwards of the generation graph, one token each, over one KV cache."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgezo.config import Sampling
from edgezo.errors import NonFiniteLossError
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.prefix import Prefix
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
    for rows in _batches(prompts, max_tokens, batch_tokens, LOGITS_BYTES // (4 * model.manifest.origin.vocab_size)):
        found = _answer(model, [prompts[row] for row in rows], max_tokens, stop, may_be_empty, [picks[row] for row in rows])
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
    return answers


def _batches(prompts: Sequence[list[int]], max_tokens: int, batch_tokens: int, most_rows: int) -> Iterator[list[int]]:
    """Numbers of prompts, longest first, as many as the cache may hold."""
    held: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
        longest = len(prompts[held[0]]) if held else 0
        if held and ((len(held) + 1) * (longest + max_tokens) > batch_tokens or len(held) == most_rows):
            yield held
            held = []
        held.append(row)
    if held:
        yield held


def _answer(
    model: EdgeModel, prompts: list[list[int]], max_tokens: int, stop: str | None, may_be_empty: bool, picks: list[Pick]
) -> list[tuple[list[int], str]]:
    """Rows are padded on the left, so that all write their next token at one place; rows that are done leave the batch."""
    width, ends = max(map(len, prompts)), set(model.manifest.tokenizer.eos_token_ids)
    new = np.full((len(prompts), width), model.manifest.tokenizer.pad_token_id, np.int64)
    mask = np.zeros(new.shape, np.int64)
    for row, prompt in enumerate(prompts):
        new[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    fed, past = _start(model, len(prompts))
    before = model.adapter.prefix_tokens if model.adapter is not None else 0
    mask = np.concatenate([np.ones((len(prompts), before), np.int64), mask], axis=1)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, before:]
    written: list[list[int]] = [[] for _ in prompts]
    texts: dict[int, str] = {}
    alive = np.arange(len(prompts))
    for count in range(max_tokens):
        logits, past = _forward(model, new, mask, positions, past, fed)
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
            full = len(prompts[row]) + len(written[row]) >= model.context
            if token not in ends and not stopped and not full:
                going.append(place)
        if not going:
            break
        alive, tokens, mask, positions = alive[going], tokens[going], mask[going], positions[going]
        if len(going) < len(new):
            past = {name: np.ascontiguousarray(array[going]) for name, array in past.items()}
        new, positions = tokens[:, None], positions[:, -1:] + 1
        mask = np.concatenate([mask, np.ones((len(going), 1), np.int64)], axis=1)
    return [(written[row], texts[row].strip()) for row in range(len(prompts))]


def _start(model: EdgeModel, rows: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Feeds of the adapter and the head, and the first keys and values: none, or a prefix for every row."""
    past, adapter = model.generation_facts.past, model.adapter
    if isinstance(adapter, Prefix):
        own = zip([state.input for state in past], adapter.past(), strict=True)
        return model.head_feeds(), {name: np.repeat(array, rows, axis=0) for name, array in own}
    empty = {state.input: np.zeros((rows, state.heads, 0, state.head_dim), np.float32) for state in past}
    return model.feeds(), empty


def _forward(
    model: EdgeModel,
    new: npt.NDArray[np.int64],
    mask: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    past: dict[str, Array],
    fed: dict[str, Array],
) -> tuple[npt.NDArray[np.float32], dict[str, Array]]:
    """Logits [rows, vocabulary] after the last token of every row, and the grown cache."""
    graph, (rows, count) = model.generation_facts, new.shape
    last = np.arange(rows, dtype=np.int64) * count + count - 1
    feeds = {"input_ids": new, "attention_mask": mask, "position_ids": positions, "hidden_rows": last}
    outputs = ["logits", *(state.output for state in graph.past)]
    logits, *present = model.generation.run(outputs, {**{name: feeds[name] for name in graph.inputs}, **past, **fed})
    if not np.isfinite(logits.max()):  # NaN passes through max
        raise NonFiniteLossError(f"the model's logits are NaN or infinite; {model.remedy}, or tune with a smaller --lr")
    return logits, {state.input: value for state, value in zip(graph.past, present, strict=True)}
