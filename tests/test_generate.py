"""Generated text is that of the source model, piece by piece, and stops where it should."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from edgezo.errors import ConfigError, DataError, EdgezoError
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.generate import Sampling, generate
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.text import TextCodec

PROMPTS = ["the film is", "a", "Question: what is the capital of France?", "é€😀", "<|im_start|>user\nuser<|im_end|>\n"]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def network() -> Any:
    """The source model of tests/conftest.py in PyTorch: the same seed."""
    return tiny.make_model("llama")


def greedy_tokens(network: Any, tokens: list[int], count: int) -> list[int]:
    """Tokens that transformers' own greedy generation adds."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        found = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return [int(token) for token in found[0, len(tokens) :]]


def set_chain(model: EdgeModel, chain: Sequence[int]) -> None:
    """Make every token of `chain` be followed by the next with certainty: embeddings alone decide, each beats the one before."""
    for layer in (0, 1):
        model.weights[f"model.layers.{layer}.self_attn.o_proj.weight"][...] = 0
        model.weights[f"model.layers.{layer}.mlp.down_proj.weight"][...] = 0
    model.weights["model.norm.weight"][...] = 1
    embedding = model.weights[EMBEDDING]
    embedding[...] = 0
    scale = 0.0
    for place, token in enumerate(chain):
        embedding[token, place] = 1
        if place:
            embedding[token, place - 1] = scale
        scale = 1.1 * (scale**2 + 1)


def chained(exported_dir: Path, text: str, *after: int) -> EdgeModel:
    """A model that continues the first token of `text` with the others, then with the tokens `after`."""
    model = EdgeModel(exported_dir, threads=1)
    set_chain(model, [*model.text.encode(text), *after])
    return model


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_that_of_transformers(model: EdgeModel, network: Any, prompt: str) -> None:
    tokens = model.text.encode(prompt)
    expected = greedy_tokens(network, tokens, 16)
    assert len(expected) == 16
    assert model.generate(prompt, 16) == model.text.decode(expected)


def test_greedy_follows_weights_that_were_changed(model: EdgeModel) -> None:
    before = model.generate("the film is", 8)
    model.weights[EMBEDDING][...] = model.weights[EMBEDDING][::-1].copy()
    assert model.generate("the film is", 8) != before


def test_generation_stops_at_the_end_of_text_which_is_not_shown(exported_dir: Path) -> None:
    model = chained(exported_dir, "x<|end|>")
    assert model.generate("x", 10) == ""
    model = chained(exported_dir, "xyz<|end|>")
    assert list(generate(model, "x", 10)) == ["y", "z"]


def test_every_end_of_text_token_stops(exported_dir: Path) -> None:
    model = chained(exported_dir, "xy<|im_end|>z")
    assert model.generate("x", 4) == "yzz"
    facts = model.manifest.tokenizer.model_copy(update={"eos_token_ids": [1, 3]})
    model.manifest = model.manifest.model_copy(update={"tokenizer": facts})
    assert model.generate("x", 4) == "y"


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_no_more_than_max_tokens_are_written(exported_dir: Path, count: int) -> None:
    assert chained(exported_dir, "xy").generate("x", count) == "y" * count


def test_a_character_of_several_tokens_comes_whole(exported_dir: Path) -> None:
    model = chained(exported_dir, "x€y<|end|>")
    assert len(model.text.encode("€")) == 3
    assert list(generate(model, "x", 10)) == ["€", "y"]


def test_a_character_that_stays_incomplete_is_shown_at_the_end(exported_dir: Path) -> None:
    model = chained(exported_dir, "x€y<|end|>")
    assert "".join(generate(model, "x", 2)) == "\ufffd"


def test_bytes_that_are_no_text_do_not_hold_back_what_follows(exported_dir: Path) -> None:
    model = EdgeModel(exported_dir, threads=1)
    first = model.text.encode("€")[0]
    set_chain(model, [*model.text.encode("x"), first, *model.text.encode("yz"), 1])
    assert list(generate(model, "x", 10)) == ["\ufffdy", "z"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_together_are_the_text_of_all_tokens(model: EdgeModel, network: Any, prompt: str) -> None:
    expected = greedy_tokens(network, model.text.encode(prompt), 40)
    assert "".join(generate(model, prompt, 40)) == model.text.decode(expected)


@pytest.mark.parametrize("seed", range(5))
def test_a_shorter_text_of_the_same_seed_is_a_beginning_of_the_longer_one(model: EdgeModel, seed: int) -> None:
    sampling = Sampling(temperature=1.5, seed=seed)
    whole = model.generate("a", 60, sampling)
    assert whole
    for count in (1, 7, 30):  # apart from a character cut at the end
        assert whole.startswith(model.generate("a", count, sampling).rstrip("\ufffd"))


def test_a_prompt_may_be_empty_when_there_is_a_beginning_of_text(model: EdgeModel, network: Any) -> None:
    assert model.generate("", 8) == model.text.decode(greedy_tokens(network, [0], 8))


def test_an_empty_prompt_without_beginning_of_text_is_refused(exported_dir: Path) -> None:
    model = EdgeModel(exported_dir, threads=1)
    facts = model.manifest.tokenizer.model_copy(update={"bos_token_id": None})
    model.manifest = model.manifest.model_copy(update={"tokenizer": facts})
    with pytest.raises(DataError) as caught:
        model.generate("", 4)
    assert str(caught.value) == "the prompt is empty and this model has no beginning-of-text token; give some text"


@pytest.mark.parametrize("count", [128, 129, 500])
def test_a_prompt_that_fills_the_context_is_refused(model: EdgeModel, count: int) -> None:
    with pytest.raises(DataError) as caught:
        model.generate("x" * count, 4)
    assert str(caught.value) == f"the prompt has {count} tokens, the model's context is 128; shorten it"


def test_generation_ends_where_the_context_does(exported_dir: Path) -> None:
    model = chained(exported_dir, "xy")
    assert model.generate("x" * 120, 64) == "y" * 8
    assert model.generate("x" * 127, 64) == "y"


def test_sampling_is_a_function_of_its_seed(model: EdgeModel) -> None:
    texts = [model.generate("the film", 12, Sampling(seed=seed)) for seed in range(8)]
    assert texts == [model.generate("the film", 12, Sampling(seed=seed)) for seed in range(8)]
    assert len(set(texts)) == 8


def test_sampling_does_not_depend_on_the_global_generator(model: EdgeModel) -> None:
    first = model.generate("the film", 12, Sampling(seed=3))
    np.random.seed(1)
    torch.manual_seed(99)
    assert model.generate("the film", 12, Sampling(seed=3)) == first


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1, seed=1),
        Sampling(top_p=1e-9, seed=2),
        Sampling(temperature=1e-6, seed=3),
        Sampling(temperature=5.0, top_k=1, top_p=0.5, seed=4),
        Sampling(temperature=1e-310, seed=5),
    ],
)
@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_sampling_of_one_choice_is_greedy(model: EdgeModel, sampling: Sampling, prompt: str) -> None:
    assert model.generate(prompt, 16, sampling) == model.generate(prompt, 16)


def test_top_k_keeps_the_most_likely(model: EdgeModel) -> None:
    tokens = model.text.encode("the film is")
    network = tiny.make_model("llama")
    with torch.no_grad():
        best = network(torch.tensor([tokens])).logits[0, -1].topk(3).indices.tolist()
    found = {model.generate("the film is", 1, Sampling(temperature=4.0, top_k=3, seed=seed)) for seed in range(60)}
    assert found == {model.text.decode([token]) for token in best}


def test_top_p_keeps_the_smallest_head_that_holds_the_mass(model: EdgeModel) -> None:
    tokens = model.text.encode("the film is")
    with torch.no_grad():
        logits = tiny.make_model("llama")(torch.tensor([tokens])).logits[0, -1].double()
    probability, order = torch.softmax(logits / 4, -1).sort(descending=True)
    mass = float(probability[:3].sum() + probability[3] / 2)  # three are too few, four enough
    found = {model.generate("the film is", 1, Sampling(temperature=4.0, top_p=mass, seed=seed)) for seed in range(150)}
    assert found == {model.text.decode([token]) for token in order[:4].tolist()}


def test_tokens_are_drawn_with_their_probability(model: EdgeModel) -> None:
    tokens = model.text.encode("the film is")
    with torch.no_grad():
        logits = tiny.make_model("llama")(torch.tensor([tokens])).logits[0, -1].double()
    top = logits.topk(2)
    expected = float(torch.softmax(top.values / 3, -1)[0])
    best = model.text.decode([int(top.indices[0])])
    hits = sum(model.generate("the film is", 1, Sampling(temperature=3.0, top_k=2, seed=seed)) == best for seed in range(400))
    assert hits / 400 == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 400))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=-1.0),
        Sampling(temperature=float("nan")),
        Sampling(temperature=float("inf")),
        Sampling(top_k=-1),
        Sampling(top_p=0.0),
        Sampling(top_p=1.5),
        Sampling(top_p=float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(model: EdgeModel, sampling: Sampling) -> None:
    with pytest.raises(ConfigError) as caught:
        model.generate("a", 4, sampling)
    assert str(caught.value) == (
        f"temperature must be above 0 and finite, top-k at least 0 and top-p in (0, 1]; got {sampling.temperature}, {sampling.top_k}, {sampling.top_p}"
    )


def test_a_negative_seed_is_refused_as_a_setting(model: EdgeModel) -> None:
    with pytest.raises(EdgezoError, match="seed"):
        model.generate("a", 4, Sampling(seed=-1))


def test_the_text_codec_reads_what_it_wrote(exported_dir: Path) -> None:
    codec = TextCodec(exported_dir, read_manifest(exported_dir).tokenizer)
    for text in ["the film is great", " two  spaces\n\ttab", "é€😀 日本", "\x00 \x7f"]:
        assert codec.decode(codec.encode(text)) == text
