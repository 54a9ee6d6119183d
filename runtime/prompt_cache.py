"""What many texts begin with is read once: their tokens after it run through the generation graph, over its keys and values."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.scoring import LOGITS_BYTES, Pair, Scores, Sequences, lay_out

# Reading the beginning is a forward of its own, of one row: tokens that are then not read again must be more than that costs. A forward
# of one token takes as long as one of about 30 (SmolLM2-135M, two cores), and small models have little to win
WORTH_TOKENS = 256


class Beginning(NamedTuple):
    """Tokens that texts begin with, as the model holds them.

    Attributes:
        length: how many; 0 where nothing worth it is common.
        past: their keys and values by graph input, after a prefix's own, float32 [1, heads, prefix + length, head_dim].
        fed: what every run is fed beside, of the adapter and the head.
    """

    length: int
    past: dict[str, Array]
    fed: dict[str, Array]

    def repeated(self, rows: int) -> dict[str, Array]:
        """The past of a batch."""
        return {name: np.repeat(array, rows, axis=0) for name, array in self.past.items()}


class Padded(NamedTuple):
    """Texts of a batch, padded on the left, so that all go on at one place; int64 [rows, width], the mask over what was read before, too."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


def read_beginning(model: EdgeModel, prompts: Sequence[list[int]]) -> Beginning:
    """Read what all of `prompts` begin with, at most all but the last token of each, at the present weights and adapter."""
    past, adapter = model.generation_facts.past, model.adapter
    if isinstance(adapter, Prefix):
        first, fed = dict(zip([state.input for state in past], adapter.past(), strict=True)), model.head_feeds()
    else:
        first, fed = {state.input: np.zeros((1, state.heads, 0, state.head_dim), np.float32) for state in past}, model.feeds()
    empty, tokens = Beginning(0, first, fed), _common(prompts)
    if len(tokens) * (len(prompts) - 1) < WORTH_TOKENS:
        return empty
    _, present = forward(model, pad([tokens], model, empty), first, fed, np.array([len(tokens) - 1]))
    return Beginning(len(tokens), present, fed)


def _common(prompts: Sequence[list[int]]) -> list[int]:
    lowest, highest = min(prompts), max(prompts)  # by their first different token, so all others share what these do
    most = min(map(len, prompts)) - 1
    return lowest[: next((place for place in range(most) if lowest[place] != highest[place]), most)]


def pad(texts: Sequence[Sequence[int]], model: EdgeModel, beginning: Beginning) -> Padded:
    """The tokens of texts after their beginning."""
    before = (model.adapter.prefix_tokens if model.adapter is not None else 0) + beginning.length
    width = max(map(len, texts))
    ids = np.full((len(texts), width), model.manifest.tokenizer.pad_token_id, np.int64)
    mask = np.zeros((len(texts), before + width), np.int64)
    mask[:, :before] = 1
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], mask[row, before + width - len(text) :] = text, 1
    return Padded(ids, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, before:])


def forward(
    model: EdgeModel, batch: Padded, past: dict[str, Array], fed: dict[str, Array], hidden_rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], dict[str, Array]]:
    """Logits [hidden rows, vocabulary], and the grown cache.

    Args:
        hidden_rows: row * width + position of each row of logits.

    Raises:
        NonFiniteLossError: the model gives no finite logits.
    """
    graph = model.generation_facts
    feeds = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions, "hidden_rows": hidden_rows}
    outputs = ["logits", *(state.output for state in graph.past)]
    logits, *present = model.generation.run(outputs, {**{name: feeds[name] for name in graph.inputs}, **past, **fed})
    if not np.isfinite(logits.max()):  # NaN passes through max
        raise NonFiniteLossError(f"the model's logits are NaN or infinite; {model.remedy}, or tune with a smaller --lr")
    return logits, {state.input: value for state, value in zip(graph.past, present, strict=True)}


def make_batches(lengths: Sequence[int], hidden: Sequence[int], batch_tokens: int, most_hidden: int) -> Iterator[list[int]]:
    """Numbers of texts, longest first, as many as the cache and the logits of one forward may hold, or one.

    Args:
        lengths: tokens of each, beginning and answer included.
        hidden: rows of logits of each.
        batch_tokens: padded tokens in the cache at most.
        most_hidden: rows of logits at most.
    """
    held: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        too_many = sum(hidden[other] for other in (*held, row)) > most_hidden
        if held and (too_many or (len(held) + 1) * lengths[held[0]] > batch_tokens):
            yield held
            held = []
        held.append(row)
    if held:
        yield held


def log_probs_after(sequences: Sequences, pairs: Sequence[Pair]) -> Scores:
    """log p of every completion token given all before it, as `Sequences.log_probs` up to rounding, for prompts that begin alike.

    Args:
        sequences: of a causal model; reads them where nothing is to win, or a completion has too many tokens for this.
        pairs: prompt and completion token ids, neither empty.

    Raises:
        NonFiniteLossError: the model gives no finite logits.
    """
    model = sequences.model
    most_hidden = logit_rows(model)
    beginning = read_beginning(model, [prompt for prompt, _ in pairs])
    layout = lay_out([(prompt[beginning.length :], completion) for prompt, completion in pairs])
    own: list[list[tuple[int, int]]] = [[] for _ in layout.sequences]  # number and position of the hidden rows of each
    for number, (sequence, position) in enumerate(layout.hidden):
        own[sequence].append((number, position))
    if not beginning.length or max(map(len, own)) > most_hidden:
        return sequences.log_probs(pairs)
    targets: list[list[tuple[int, int]]] = [[] for _ in layout.hidden]  # place of the score and token of each
    for place, (number, token) in enumerate(layout.scored):
        targets[number].append((place, token))
    scores = np.empty(len(layout.scored))
    lengths = [beginning.length + len(tokens) for tokens in layout.sequences]
    for rows in make_batches(lengths, [len(hidden) for hidden in own], sequences.batch_tokens, most_hidden):
        texts = [layout.sequences[row] for row in rows]
        batch = pad(texts, model, beginning)
        width = batch.ids.shape[1]
        flat = [(row + 1) * width - len(text) + position for row, text in enumerate(texts) for _, position in own[rows[row]]]
        logits, _ = forward(model, batch, beginning.repeated(len(rows)), beginning.fed, np.array(flat, np.int64))
        for scaled, number in zip(logits, (number for row in rows for number, _ in own[row]), strict=True):
            largest = float(scaled.max())
            total = largest + math.log(np.exp(scaled - largest).sum(dtype=np.float64))
            for place, token in targets[number]:
                scores[place] = float(scaled[token]) - total
    return np.split(scores, np.cumsum([len(completion) for _, completion in pairs])[:-1])


def logit_rows(model: EdgeModel) -> int:
    """Rows of logits that one forward may hold."""
    return LOGITS_BYTES // (4 * model.manifest.origin.vocab_size)
