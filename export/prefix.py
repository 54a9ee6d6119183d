"""The start of a prefix: keys and values of real tokens, so that the first step is taken from inside the model's own range."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgezo.adapters import PREFIX
from edgezo.errors import ConfigError, ExportError
from edgezo.export.decoder import Decoder, Weight
from edgezo.export.source import Source

TEXT = "Read the text below with care and then say what it is about, in one word that fits it best. "


def check_tokens(tokens: int, source: Source) -> None:
    """Refuse a prefix that leaves no room for text."""
    if not 0 < tokens < source.origin.context_length:
        raise ConfigError(f"--tokens {tokens}: a prefix has 1 to {source.origin.context_length - 1} tokens with this model; 5 is usual")


def prefix_weight(decoder: Decoder, tokens: int) -> Weight:
    """The prefix tensor [layers, 2, heads, tokens, head_dim], zeros until `fill_prefix`.

    Raises:
        ExportError: the layers of this model have caches of unlike shapes.
    """
    shapes = {tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)[1::2] for value in decoder.past_inputs}
    if len(shapes) != 1 or not all(next(iter(shapes))):
        raise ExportError(f"the key-value caches of this model have unlike or unknown shapes {sorted(shapes)[:3]}; use --adapter lora")
    ((heads, head_dim),) = shapes
    return Weight(PREFIX, np.zeros((len(decoder.past_inputs) // 2, 2, heads, tokens, head_dim), np.float32), True)


def fill_prefix(prefix: Weight, generation: Path, source: Source, inputs: list[str]) -> None:
    """Run the first tokens of a text through the generation graph and keep their keys and values."""
    import onnxruntime

    tokens = _text_tokens(source, prefix.array.shape[3])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(generation), options, providers=["CPUExecutionProvider"])
    layers, _, heads, count, head_dim = prefix.array.shape
    feeds = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
        "hidden_rows": np.array([0], np.int64),
    }
    past = {
        f"past_key_values.{layer}.{part}": np.zeros((1, heads, 0, head_dim), np.float32)
        for layer in range(layers)
        for part in ("key", "value")
    }
    names = [f"present.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    found = session.run(names, {**{name: feeds[name] for name in inputs}, **past})
    prefix.array[...] = np.stack([value[0] for value in found]).reshape(prefix.array.shape)


def _text_tokens(source: Source, count: int) -> npt.NDArray[np.int64]:
    tokens: list[int] = []
    while len(tokens) < count:
        piece = [token for token in source.tokenizer(TEXT)["input_ids"] if token < source.origin.vocab_size] or [0]
        tokens += piece
    return np.array(tokens[:count], np.int64)
