"""What a model writes by itself: kept beside what it is to learn, it stays as it was."""

from itertools import islice

from edgezo.runtime import noise
from edgezo.runtime.batch_generate import continue_batch
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.scoring import BATCH_TOKENS, Pair
from edgezo.runtime.text import TextError

TEXTS, TOKENS = 48, 24  # 1,152 tokens at most


def own_texts(model: EdgeModel, seed: int, batch_tokens: int = BATCH_TOKENS) -> list[Pair]:
    """Greedy continuations of words of the vocabulary, every other of them the reply to such a word where the model has a chat template.

    Args:
        model: at its present weights and adapter.
        seed: of the words.
        batch_tokens: as for `continue_batch`.

    Returns:
        Token ids of prompt and continuation; none where no token is a word.

    Raises:
        NonFiniteLossError: the model gives no finite logits.
    """
    texts = (model.text.decode([token]).strip() for token in noise.permutation(seed, model.manifest.origin.vocab_size, 0).tolist())
    words = islice((text for text in texts if text.isalpha()), TEXTS)
    prompts = [model.text.encode(_opened(model, word) if place % 2 else word) for place, word in enumerate(words)]
    prompts = [prompt for prompt in prompts if 0 < len(prompt) < model.context - TOKENS]
    found = continue_batch(model, prompts, TOKENS, batch_tokens=batch_tokens) if prompts else []
    return [(prompt, tokens) for prompt, (tokens, _) in zip(prompts, found, strict=True) if tokens]


def _opened(model: EdgeModel, word: str) -> str:
    if model.text.facts.chat_template is None:
        return word
    try:
        return model.text.chat([{"role": "user", "content": word}], reply=True)
    except TextError:  # a template may want more than one message
        return word
