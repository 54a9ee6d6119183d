"""What many texts begin with is read once: their tokens after it run through the generation graph, over its keys and values."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.packing import packed
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.scoring import Pair, Scores, Sequences, lay_out
from edgezo.runtime.weights import MutableWeights

# Tokens that are not read again must be so many: the beginning is a forward of its own, of one row, which takes as long as one of 30
# tokens or so however few it has (SmolLM2-135M, two cores)
WORTH_TOKENS = 256


class Beginning(NamedTuple):
    """What texts begin with, as the model holds it.

    Attributes:
        length: tokens of it; 0 where nothing worth it is common.
        before: places of the cache that it takes, those of a prefix with it.
        past: keys and values by graph input, float32 [copies, heads, before, head_dim].
        fed: what every run is fed beside, of the adapter and the head.
        copied: of an adapter, what differs by copy, [copies, ...]; in place of what `fed` has of that name.
    """

    length: int
    before: int
    past: dict[str, Array]
    fed: dict[str, Array]
    copied: dict[str, Array]

    def repeated(self, rows: int) -> dict[str, Array]:
        """The past of a batch, `rows` of each copy after each other."""
        return {name: np.repeat(array, rows, axis=0) for name, array in self.past.items()}


class Padded(NamedTuple):
    """Texts of a batch after their beginning: ids and positions int64 [rows, width], mask int64 [rows, before + width]."""

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


def read_beginning(model: EdgeModel, prompts: Sequence[list[int]], runs: int) -> Beginning:
    """Read what all of `prompts` begin with, at most all but the last token of each.

    Args:
        model: a causal one, at its present weights and adapter.
        prompts: token ids, none empty.
        runs: how many texts would read it otherwise.

    Raises:
        NonFiniteLossError: the model gives no finite logits.
    """
    past, adapter = model.generation_facts.past, model.adapter
    if isinstance(adapter, Prefix):
        first, fed = dict(zip([state.input for state in past], adapter.past(), strict=True)), model.head_feeds()
    else:
        first, fed = {state.input: np.zeros((1, state.heads, 0, state.head_dim), np.float32) for state in past}, model.feeds()
    nothing = Beginning(0, adapter.prefix_tokens if adapter is not None else 0, first, fed, {})
    tokens = _common(prompts)
    if len(tokens) * (runs - 1) < WORTH_TOKENS:
        return nothing
    _, present = forward(model, pad([tokens], model, nothing, "right"), first, fed, np.array([len(tokens) - 1]))
    return Beginning(len(tokens), nothing.before + len(tokens), present, fed, {})


def perturbed_beginning(
    model: EdgeModel, theta: MutableWeights, directions: Sequence[Direction], sides: Sequence[int], eps: float
) -> Beginning:
    """Nothing read yet, under copies theta + side * eps * z of the adapter: direction after direction, its sides after each other."""
    states, adapter = model.generation_facts.past, model.adapter
    if isinstance(adapter, Prefix):
        past = dict(zip([state.input for state in states], adapter.stacked_past(theta, directions, sides, eps), strict=True))
        return Beginning(0, adapter.prefix_tokens, past, model.head_feeds(), {})
    assert isinstance(adapter, Lora)
    copies = len(directions) * len(sides)
    empty = {state.input: np.zeros((copies, state.heads, 0, state.head_dim), np.float32) for state in states}
    return Beginning(0, 0, empty, model.feeds(), adapter.whole_copies(theta, directions, sides, eps))


def _common(prompts: Sequence[list[int]]) -> list[int]:
    if len(prompts) < 2:
        return []
    lowest, highest = min(prompts), max(prompts)  # by their first different token, so all others share what these do
    most = min(map(len, prompts)) - 1
    return lowest[: next((place for place in range(most) if lowest[place] != highest[place]), most)]


def pad(texts: Sequence[Sequence[int]], model: EdgeModel, beginning: Beginning, side: Literal["left", "right"]) -> Padded:
    """A batch of texts, each without the beginning that was read.

    Padding on the left parts a text from its beginning. Only positions that are fed close the gap, and not for a layer with a window, which
    counts places of the cache: with something before, padding on the left is for texts of one length.
    """
    before, width = beginning.before, max(map(len, texts))
    ids = np.full((len(texts), width), model.manifest.tokenizer.pad_token_id, np.int64)
    mask = np.ones((len(texts), before + width), np.int64)
    for row, text in enumerate(texts):
        first = width - len(text) if side == "left" else 0
        ids[row, first : first + len(text)] = text
        mask[row, before : before + first] = mask[row, before + first + len(text) :] = 0
    return Padded(ids, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, before:])


def forward(
    model: EdgeModel, batch: Padded, past: dict[str, Array], fed: dict[str, Array], hidden_rows: npt.NDArray[np.int64], *, grow: bool = True
) -> tuple[npt.NDArray[np.float32], dict[str, Array]]:
    """Logits float32 [hidden rows, vocabulary], and the grown cache by graph input.

    Args:
        model: a causal one, at its present weights.
        batch: what is new.
        past: keys and values of what was read before.
        fed: the adapter, of one copy or of as many as there are equal groups of rows, and the head.
        hidden_rows: row * width + position of each row of logits.
        grow: whether the grown cache is wanted; it is empty otherwise.

    Raises:
        NonFiniteLossError: the model gives no finite logits.
    """
    graph = model.generation_facts
    feeds = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions, "hidden_rows": hidden_rows}
    states = graph.past if grow else []
    outputs = ["logits", *(state.output for state in states)]
    logits, *present = model.generation.run(outputs, {**{name: feeds[name] for name in graph.inputs}, **past, **fed})
    if not np.isfinite(logits.max()):  # NaN passes through max
        raise NonFiniteLossError(f"the model's logits are NaN or infinite; {model.remedy}, or tune with a smaller --lr")
    return logits, {state.input: value for state, value in zip(states, present, strict=True)}


def make_batches(
    lengths: Sequence[int], hidden: Sequence[int], batch_tokens: int, most_hidden: int, *, alike: bool = False
) -> Iterator[list[int]]:
    """Numbers of texts, longest first, as many as the cache and the logits of one forward may hold, or one.

    Args:
        lengths: tokens of each, beginning and answer included.
        hidden: rows of logits of each.
        batch_tokens: padded tokens in the cache at most.
        most_hidden: rows of logits at most.
        alike: whether those of a batch must have one length.
    """

    def fits(held: list[int]) -> bool:
        longest, last = lengths[held[0]], lengths[held[-1]]
        return sum(hidden[row] for row in held) <= most_hidden and len(held) * longest <= batch_tokens and (not alike or last == longest)

    return packed(sorted(range(len(lengths)), key=lambda row: -lengths[row]), fits)


def log_probs_after(sequences: Sequences, pairs: Sequence[Pair]) -> Scores:
    """log p of every completion token given all before it, as `Sequences.log_probs` up to rounding, for prompts that begin alike.

    Their rows of forward are not counted. Without a beginning that is worth it, `sequences` scores them; so it does a completion that has more
    tokens than logits may have rows.

    Args:
        sequences: of a causal model.
        pairs: prompt and completion token ids, neither empty.

    Raises:
        NonFiniteLossError: the model gives no finite logits.
    """
    fitting = [place for place, (_, completion) in enumerate(pairs) if len(completion) <= sequences.long_hidden]
    layout = lay_out([pairs[place] for place in fitting])
    beginning = read_beginning(sequences.model, [pairs[place][0] for place in fitting], len(layout.sequences))
    if not beginning.length:
        return sequences.log_probs(pairs)
    own: list[list[tuple[int, int]]] = [[] for _ in layout.sequences]  # number and position of the hidden rows of each
    for number, (sequence, position) in enumerate(layout.hidden):
        own[sequence].append((number, position - beginning.length))
    targets: list[list[tuple[int, int]]] = [[] for _ in layout.hidden]  # place of the score and token of each
    for place, (number, token) in enumerate(layout.scored):
        targets[number].append((place, token))
    scores = np.empty(len(layout.scored))
    counts = [len(hidden) for hidden in own]
    for rows in make_batches([len(tokens) for tokens in layout.sequences], counts, sequences.batch_tokens, sequences.batch_hidden):
        batch = pad([layout.sequences[row][beginning.length :] for row in rows], sequences.model, beginning, "right")
        flat = [row * batch.ids.shape[1] + position for row, sequence in enumerate(rows) for _, position in own[sequence]]
        past = beginning.repeated(len(rows))
        logits, _ = forward(sequences.model, batch, past, beginning.fed, np.array(flat, np.int64), grow=False)
        for scaled, number in zip(logits, (number for row in rows for number, _ in own[row]), strict=True):
            largest = float(scaled.max())
            total = largest + math.log(np.exp(scaled - largest).sum(dtype=np.float64))
            for place, token in targets[number]:
                scores[place] = float(scaled[token]) - total
    found = iter(np.split(scores, np.cumsum([len(pairs[place][1]) for place in fitting])[:-1]))
    long = iter(sequences.log_probs([pair for pair in pairs if len(pair[1]) > sequences.long_hidden]))
    return [next(found if len(pair[1]) <= sequences.long_hidden else long) for pair in pairs]
