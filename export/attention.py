"""Attention as the engine should run it: key and value heads are not repeated for the queries that share them, and one mask serves all layers.

transformers' own forms repeat the heads of keys and values in memory and, as scaled_dot_product_attention traces, make each layer's mask
anew and look for rows without any allowed key. Here queries that share a head lie one after the other in one product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAME = "edgezo"


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling * Q K^T + mask) V.

    Args:
        module: the layer; unused.
        query: [batch, heads, tokens, head_dim].
        key: [batch, key_heads, keys, head_dim], key_heads a divisor of heads.
        value: as key.
        attention_mask: what is added to the scores, [batch, 1, tokens, at least keys].
        scaling: 1 / sqrt(head_dim) when None.
        dropout: 0, since nothing is trained here.
        softcap: scores are softcap * tanh(scores / softcap) when given.

    Raises:
        NotImplementedError: the layer has attention sinks.

    Returns:
        [batch, tokens, heads, head_dim], and None for the attention weights.
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not exported; choose a model without them")
    heads, head_dim, key_heads = query.shape[1], query.shape[3], key.shape[1]
    batch, tokens = query.shape[0], query.shape[2]
    grouped = query.reshape(batch, key_heads, -1, head_dim) if heads != key_heads else query
    scores = torch.matmul(grouped * (head_dim**-0.5 if scaling is None else scaling), key.transpose(2, 3))
    if heads != key_heads:
        scores = scores.reshape(batch, heads, tokens, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = torch.softmax(scores, dim=-1)
    if heads != key_heads:
        weights = weights.reshape(batch, key_heads, -1, key.shape[2])
    result = torch.matmul(weights, value)
    if heads != key_heads:
        result = result.reshape(batch, heads, tokens, value.shape[3])
    return result.transpose(1, 2), None


@contextmanager
def traced_attention(model: Any) -> Iterator[None]:
    """Inside, a model that takes attention functions uses this one, with the masks of its eager form; others stay as they are."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config
    if not getattr(model, "_supports_attention_backend", False):
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
