"""Text from the generation graph, token by token with a KV cache."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.config import MAX_TOKENS, Sampling
from edgezo.errors import DataError, NonFiniteLossError
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.sampling import make_pick


class Cache:
    """What the engine has read: a text that begins with the same tokens need feed only the rest.

    It belongs to one model with the weights and the adapter of that moment; clear it when they change.

    Attributes:
        read: token ids, and by graph input their keys and values, [1, heads, prefix + ids, head_dim]; replaced as one, so that
            an interrupt leaves the two in step.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget it."""
        self.read: tuple[list[int], dict[str, npt.NDArray[Any]]] = ([], {})

    def shared(self, tokens: list[int]) -> int:
        """How many tokens at the beginning were read already; never all, since the engine must be fed one to tell the next."""
        pairs = zip(self.read[0], tokens, strict=False)
        return next((place for place, (old, new) in enumerate(pairs) if old != new), min(len(self.read[0]), len(tokens) - 1))


def generate(
    model: EdgeModel,
    prompt: str,
    max_tokens: int = MAX_TOKENS,
    sampling: Sampling | None = None,
    *,
    special: bool = True,
    cache: Cache | None = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece, until an end-of-text token, `max_tokens`, or the model's context is full.

    Args:
        model: the edge model, at its present weights.
        prompt: text to continue.
        max_tokens: tokens to write at most.
        sampling: how to draw; None is greedy, the most likely token, the first of equals.
        special: whether the tokenizer puts its special tokens around the prompt; False for a rendered chat, which has them.
        cache: what was read of an earlier text, read on and written; None keeps nothing.

    Raises:
        DataError: the prompt is empty or fills the context.
        ConfigError: a sampling setting is out of range.
        NonFiniteLossError: the model gives no finite logits.
    """
    pick = make_pick(sampling)
    facts, graph, context = model.manifest.tokenizer, model.generation_facts, model.context
    tokens = model.text.encode(prompt, special) or ([facts.bos_token_id] if facts.bos_token_id is not None else [])
    if not tokens:
        raise DataError("the prompt is empty and this model has no beginning-of-text token; give some text")
    if len(tokens) >= context:
        raise DataError(f"the prompt has {len(tokens)} tokens, the model's context is {context}; shorten it")
    outputs = ["logits", *(state.output for state in graph.past)]
    adapter = model.adapter
    if isinstance(adapter, Prefix):
        fed, past = model.head_feeds(), dict(zip([state.input for state in graph.past], adapter.past(), strict=True))
    else:
        fed = model.feeds()
        past = {state.input: np.zeros((1, state.heads, 0, state.head_dim), np.float32) for state in graph.past}
    cache, first = cache or Cache(), adapter.prefix_tokens if adapter is not None else 0
    if kept := cache.shared(tokens):
        past = {name: np.ascontiguousarray(array[:, :, : first + kept]) for name, array in cache.read[1].items()}
    new, seen, written = tokens[kept:], first + kept, list[int]()
    # tokens up to `shown` were yielded; they are decoded from `before` on, since a tokenizer may treat a first token apart
    before = shown = 0

    def rest() -> str:
        return model.text.decode(written[before:])[len(model.text.decode(written[before:shown])) :]

    while len(written) < max_tokens and seen + len(new) < first + context:
        feeds = {
            "input_ids": np.array([new], np.int64),
            "attention_mask": np.ones((1, seen + len(new)), np.int64),
            "position_ids": np.arange(seen, seen + len(new), dtype=np.int64)[None],
            "hidden_rows": np.array([len(new) - 1], np.int64),
        }
        logits, *present = model.generation.run(outputs, {**{name: feeds[name] for name in graph.inputs}, **past, **fed})
        if not np.isfinite(logits[0].max()):  # NaN passes through max
            raise NonFiniteLossError(f"the model's logits are NaN or infinite; {model.remedy}, or tune with a smaller --lr")
        token = pick(logits[0])
        past = {state.input: value for state, value in zip(graph.past, present, strict=True)}
        cache.read = ([*tokens, *written], past)
        if token in facts.eos_token_ids:
            break
        seen, new = seen + len(new), [token]
        written.append(token)
        piece = rest()
        # a character of several tokens shows as U+FFFD until it is whole
        if not piece.endswith("\ufffd"):
            yield piece
            before, shown = shown, len(written)
    if piece := rest():
        yield piece


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """The pieces of a text up to, and without, `stop`; what may be its beginning is held back."""
    held = ""
    for piece in pieces:
        held += piece
        if stop in held:
            yield held.split(stop)[0]
            return
        kept = next(size for size in range(min(len(stop) - 1, len(held)), -1, -1) if held.endswith(stop[:size]))
        if ready := held[: len(held) - kept]:
            yield ready
        held = held[len(ready) :]
    if held:
        yield held
