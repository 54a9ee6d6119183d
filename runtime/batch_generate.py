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
    for rows in make_batches(lengths, [1] * len(prompts), batch_tokens, most_rows(model), alike=must_be_alike(model, beginning.before)):
        chosen = [prompts[row][beginning.length :] for row in rows]
        found = answer(model, beginning, [chosen], max_tokens, stop, [picks[row] for row in rows], may_be_empty=may_be_empty)
        for row, answered in zip(rows, found, strict=True):
            answers[row] = answered
    return answers


def most_rows(model: EdgeModel) -> int:
    """Rows whose logits one forward may hold."""
    return LOGITS_BYTES // (4 * model.manifest.origin.vocab_size)


def must_be_alike(model: EdgeModel, before: int) -> bool:
    """Whether texts of a batch must have one length: something stands before them, and positions are places of the cache."""
    return before > 0 and "position_ids" not in model.generation_facts.inputs


def answer(
    model: EdgeModel,
    beginning: Beginning,
    copies: Sequence[Sequence[list[int]]],
    max_tokens: int,
    stop: str | None,
    picks: Sequence[Pick],
    *,
    may_be_empty: bool = False,
) -> list[tuple[list[int], str]]:
    """Token ids and texts of one batch.

    Args:
        beginning: of as many copies of the adapter as `copies` has.
        copies: the prompts of every copy, without the beginning that was read.
        picks: one a prompt, as the answers, copy after copy.
    """
    live, prompts = _Live(model, beginning, copies), [prompt for group in copies for prompt in group]
    ends, read = set(model.manifest.tokenizer.eos_token_ids), beginning.length
    written: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    del beginning  # its copies leave with the rows
    for number in range(max_tokens):
        logits = live.forward()
        if not number and not may_be_empty:
            logits = np.where(model.text.beginnings(logits.shape[1], stop), logits, np.float32(-np.inf))
        tokens, going = np.zeros(len(logits), np.int64), []
        for place, row in live.writing():
            tokens[place] = token = picks[row](logits[place])
            if token not in ends:
                written[row].append(token)
            text = model.text.decode(written[row])
            stopped = stop is not None and stop in text
            texts[row] = text.split(stop)[0] if stop is not None and stopped else text
            full = read + len(prompts[row]) + len(written[row]) >= model.context
            if token not in ends and not stopped and not full:
                going.append(place)
        if not going:
            break
        live.keep(going, tokens)
    return [(tokens, text.strip()) for tokens, text in zip(written, texts, strict=True)]


class _Live:
    """The rows of a batch that still write, their next token at one place of the cache: padding stands before a text.

    Every copy of the adapter has equally many places. A copy with fewer rows is filled up; a copy without rows leaves.

    Attributes:
        batch: what is fed next.
        past: keys and values by graph input, float32 [places, heads, cache, head_dim].
        copied: of the adapter by graph input, [copies, ...].
        rows: int64 [places], the number of the text that each place writes; -1 where it only fills up.
    """

    def __init__(self, model: EdgeModel, beginning: Beginning, copies: Sequence[Sequence[list[int]]]) -> None:
        prompts = [prompt for group in copies for prompt in group]
        ends = np.cumsum([len(group) for group in copies]).tolist()
        numbers, real = _even([list(range(end - len(group), end)) for group, end in zip(copies, ends, strict=True)])
        self.model, self.fed, self.copied, self.copies = model, beginning.fed, dict(beginning.copied), len(copies)
        self.batch = pad([prompts[number] for number in numbers], model, beginning, "left" if not beginning.before else "right")
        self.past = beginning.repeated(len(numbers) // self.copies)
        self.rows = np.where(real, numbers, -1)
        self._turns = beginning.before > 0

    def forward(self) -> npt.NDArray[np.float32]:
        """Logits after every place's last token, float32 [places, vocabulary]."""
        logits, self.past = forward(self.model, self.batch, self.past, {**self.fed, **self.copied}, _last(self.batch))
        if self._turns:
            _turn(self.batch, self.past)
            self._turns = False
        return logits

    def writing(self) -> list[tuple[int, int]]:
        """Places and the texts that they write."""
        return [(place, row) for place, row in enumerate(self.rows.tolist()) if row >= 0]

    def keep(self, going: list[int], tokens: npt.NDArray[np.int64]) -> None:
        """Go on with the rows at these places, in order; tokens int64 [places] were written at all."""
        each = len(self.rows) // self.copies
        groups = [[place for place in going if place // each == copy] for copy in range(self.copies)]
        kept = [copy for copy, group in enumerate(groups) if group]
        places, real = list(range(len(self.rows))), np.isin(np.arange(len(self.rows)), going)
        if len(kept) < self.copies or max(map(len, groups)) < each:
            places, real = _even([groups[copy] for copy in kept])
            for name, array in self.past.items():
                self.past[name] = np.ascontiguousarray(array[places])
        if len(kept) < self.copies:
            for name, array in self.copied.items():
                self.copied[name] = array[kept]
            self.copies = len(kept)
        self.rows = np.where(real, self.rows[places], -1)
        # what only fills up stays where it is: it would leave the context, whose positions may be a table
        mask = np.concatenate([self.batch.mask[places], real.astype(np.int64)[:, None]], axis=1)
        positions = self.batch.positions[places].max(axis=1, keepdims=True) + real[:, None]
        self.batch = Padded(tokens[places][:, None], mask, positions)


def _even(groups: Sequence[list[int]]) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """Groups filled up to one size by their own first members, group after group, and which are no fillers."""
    most = max(map(len, groups))
    filled = [[*group, *[group[0]] * (most - len(group))] for group in groups]
    real = [place < len(group) for group in groups for place in range(most)]
    return [number for group in filled for number in group], np.array(real)


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
