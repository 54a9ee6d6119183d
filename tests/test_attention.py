"""The attention that models are traced with, against the one they have."""

from typing import Any

import pytest
import tiny
import torch

from edgezo.export.attention import NAME, grouped_attention, traced_attention


def reference(query: Any, key: Any, value: Any, mask: Any, scaling: float, softcap: float | None) -> Any:
    """Heads repeated, in float64."""
    query, key, value = (part.double() for part in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = torch.einsum("bhtd,bhkd->bhtk", query, key) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return torch.einsum("bhtk,bhkd->bthd", (scores + mask).softmax(-1), value)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("scaling", "softcap"), [(None, None), (0.3, 2.0)])
@pytest.mark.parametrize("value_dim", [8, 6])
def test_it_is_attention(key_heads: int, scaling: float | None, softcap: float | None, value_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, heads, tokens, 8, generator=generator) for heads, tokens in ((4, 5), (key_heads, 7)))
    value = torch.randn(3, key_heads, 7, value_dim, generator=generator)
    mask = torch.where(torch.rand(3, 1, 5, 9, generator=generator) < 0.3, torch.finfo(torch.float32).min, 0.0)
    found, weights = grouped_attention(None, query, key, value, mask, scaling=scaling, softcap=softcap)
    expected = reference(query, key, value, mask[..., :7].double(), 8**-0.5 if scaling is None else scaling, softcap)
    assert weights is None
    assert (found - expected).abs().max() < 1e-5


def test_sinks_are_refused() -> None:
    part = torch.zeros(1, 1, 1, 4)
    with pytest.raises(NotImplementedError, match="attention sinks are not exported"):
        grouped_attention(None, part, part, part, None, s_aux=torch.zeros(1))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt", "gemma3_text"])
def test_a_traced_model_uses_it_and_is_afterwards_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model(name)
    tokens, before = torch.arange(12).reshape(2, 6), model.config._attn_implementation
    with torch.no_grad():
        expected = model(tokens).logits
        with traced_attention(model):
            assert model.config._attn_implementation == NAME
            found = model(tokens).logits
            monkeypatch.setattr(torch, "softmax", lambda scores, dim: torch.zeros_like(scores))
            assert not torch.allclose(model(tokens).logits, found), "it is this attention that runs"
            monkeypatch.undo()
        assert torch.equal(model(tokens).logits, expected)
    assert model.config._attn_implementation == before
    assert (found - expected).abs().max() < 1e-4


def test_a_model_without_the_interface_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llama")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    before = model.config._attn_implementation
    with traced_attention(model):
        assert model.config._attn_implementation == before
