"""Answers to many prompts: rows of like length share forwards of the generation graph, one token each, over one KV cache."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.config import Sampling
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.prompt_cache import Beginning, Padded, forward, make_batches, pad, read_beginning
from edgezo.runtime.sampling import Pick, make_pick
from edgezo.runtime.scoring import BATCH_TOKENS, LOGITS_BYTES

Beginnings = Callable[[Sequence[int], Sequence[int]], Beginning]


class _Tile(NamedTuple):
    """Rows of one group that are answered in one batch, and the tokens of the longest, its answer included."""

    group: int
    rows: list[int]
    width: int


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
    for rows in make_batches(lengths, [1] * len(prompts), batch_tokens, _most_rows(model), alike=_alike(model, beginning.before)):
        chosen = [prompts[row][beginning.length :] for row in rows]
        found = _answer(model, beginning, [chosen], max_tokens, stop, may_be_empty, [picks[row] for row in rows])
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
    return answers


def generate_stacked(
    model: EdgeModel,
    groups: Sequence[Sequence[list[int]]],
    sides: Sequence[int],
    beginnings: Beginnings,
    max_tokens: int,
    stop: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[list[str]]]:
    """As `generate_batch`, the answers to every group of prompts under its own copies of the adapter, many copies in one forward.

    Args:
        groups: prompts of each direction.
        sides: the copies of each direction, +1 and -1.
        beginnings: of the copies for some of the groups.

    Returns:
        [group][side][prompt].
    """
    answers = [[[""] * len(prompts) for _ in sides] for prompts in groups]
    before = model.adapter.prefix_tokens if model.adapter is not None else 0
    tiles = [
        _Tile(group, rows, len(prompts[rows[0]]) + max_tokens)
        for group, prompts in enumerate(groups)
        for rows in make_batches(
            [len(prompt) + max_tokens for prompt in prompts],
            [len(sides)] * len(prompts),
            batch_tokens // len(sides),
            _most_rows(model),
            alike=_alike(model, before),
        )
    ]
    for chosen in _together(tiles, len(sides), batch_tokens, _most_rows(model), alike=_alike(model, before)):
        copies = [[groups[tile.group][row] for row in tile.rows] for tile in chosen for _ in sides]
        picks = [make_pick(None, 0)] * sum(map(len, copies))
        beginning = beginnings([tile.group for tile in chosen], sides)
        found = iter(_answer(model, beginning, copies, max_tokens, stop, may_be_empty=False, picks=picks))
        for tile in chosen:
            for side in range(len(sides)):
                for row in tile.rows:
                    answers[tile.group][side][row] = next(found)[1]
    return answers


def _most_rows(model: EdgeModel) -> int:
    """Rows whose logits one forward may hold."""
    return LOGITS_BYTES // (4 * model.manifest.origin.vocab_size)


def _alike(model: EdgeModel, before: int) -> bool:
    """Whether texts of a batch must have one length: something stands before them, and positions are places of the cache."""
    return before > 0 and "position_ids" not in model.generation_facts.inputs


def _together(tiles: Sequence[_Tile], sides: int, batch_tokens: int, most_rows: int, *, alike: bool) -> Iterator[list[_Tile]]:
    """Tiles of like shape, as many as one forward may hold."""
    held: list[_Tile] = []
    for tile in sorted(tiles, key=lambda tile: (-tile.width, -len(tile.rows))):
        width, rows = (held or [tile])[0].width, sides * (len(held) + 1) * max(len(other.rows) for other in (*held, tile))
        if held and (rows * width > batch_tokens or rows > most_rows or (alike and tile.width < width)):
            yield held
            held = []
        held.append(tile)
    if held:
        yield held


def _answer(
    model: EdgeModel,
    beginning: Beginning,
    copies: list[list[list[int]]],
    max_tokens: int,
    stop: str | None,
    may_be_empty: bool,
    picks: list[Pick],
) -> list[tuple[list[int], str]]:
    """All rows write their next token at one place of the cache: padding stands before a text. Rows that are done leave the batch.

    Args:
        copies: the prompts of every copy of the adapter, without the beginning that was read.
        picks: one a prompt, as the answers, copy after copy.
    """
    prompts, copied, count = [prompt for own in copies for prompt in own], beginning.copied, len(copies)
    ends, last_tokens = np.cumsum([len(own) for own in copies]).tolist(), set(model.manifest.tokenizer.eos_token_ids)
    numbers, own = _even([list(range(end - len(part), end)) for part, end in zip(copies, ends, strict=True)])
    batch = pad([prompts[number] for number in numbers], model, beginning, "left" if not beginning.before else "right")
    past, rows = beginning.repeated(len(numbers) // count), np.where(own, numbers, -1)  # what each place of the batch writes
    written: list[list[int]] = [[] for _ in prompts]
    texts: dict[int, str] = {}
    for length in range(max_tokens):
        logits, past = forward(model, batch, past, {**beginning.fed, **copied}, _last(batch))
        if not length and beginning.before:
            _turn(batch, past)
        if not length and not may_be_empty:
            logits = np.where(model.text.beginnings(logits.shape[1], stop), logits, np.float32(-np.inf))
        tokens, each = np.zeros(len(rows), np.int64), len(rows) // count
        going: list[list[int]] = [[] for _ in range(count)]
        for place, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            tokens[place] = token = picks[row](logits[place])
            if token not in last_tokens:
                written[row].append(token)
            text = model.text.decode(written[row])
            stopped = stop is not None and stop in text
            texts[row] = text.split(stop)[0] if stop is not None and stopped else text
            full = beginning.length + len(prompts[row]) + len(written[row]) >= model.context
            if token not in last_tokens and not stopped and not full:
                going[place // each].append(place)
        kept = [copy for copy, places in enumerate(going) if places]
        if not kept:
            break
        places, own = _even([going[copy] for copy in kept])
        if places != list(range(len(rows))):
            past = {name: np.ascontiguousarray(array[places]) for name, array in past.items()}
        if len(kept) < count:
            copied, count = {name: array[kept] for name, array in copied.items()}, len(kept)
        rows = np.where(own, rows[places], -1)
        mask = np.concatenate([batch.mask[places], np.ones((len(places), 1), np.int64)], axis=1)
        batch = Padded(tokens[places][:, None], mask, batch.positions[places].max(axis=1, keepdims=True) + 1)
    return [(written[row], texts[row].strip()) for row in range(len(prompts))]


def _even(groups: Sequence[list[int]]) -> tuple[list[int], list[bool]]:
    """Groups filled up to one size by their own first members, group after group, and which of them only fill up: False."""
    most = max(map(len, groups))
    filled = [[*group, *[group[0]] * (most - len(group))] for group in groups]
    return [number for group in filled for number in group], [place < len(group) for group in groups for place in range(most)]


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
