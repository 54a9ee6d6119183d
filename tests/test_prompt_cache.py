"""What prompts begin with is read once: the same scores and answers, fewer tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_adapters import ALPHA, RANK

import edgezo
from edgezo.config import Sampling
from edgezo.runtime import batch_generate, prompt_cache
from edgezo.runtime.batch_generate import continue_batch
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.prompt_cache import log_probs_after, make_batches, read_beginning
from edgezo.runtime.scoring import Pair, Sequences

SHOTS = [5, 9, 4, 7, 3, 8, 11, 6]
PAIRS: list[Pair] = [
    ([*SHOTS, 12, 13], [20]),
    ([*SHOTS, 12, 13], [21]),  # shares the forward row of the one above
    ([*SHOTS, 14], [20, 22, 23]),
    ([*SHOTS, 15, 16, 17, 18, 19], [22, 20]),
    ([*SHOTS, 14], [24]),
]
PROMPTS = [prompt for prompt, _ in PAIRS]
# positions fed or counted by the cache, learned or rotary, a window that ends within these prompts, and what may stand before a text
MODELS = [
    (name, adapter)
    for name, adapters in {
        "llama": (None, "lora", "prefix"),
        "mistral": (None,),
        "gemma3_text": (None, "prefix"),
        "gpt2": (None,),
    }.items()
    for adapter in adapters
]


@pytest.fixture(params=MODELS, ids=lambda model: "-".join(filter(None, model)))
def changed(request: pytest.FixtureRequest, export_tiny: Any) -> EdgeModel:
    """A model whose adapter does something."""
    name, adapter = request.param
    model = EdgeModel(export_tiny(name, **({"adapter": adapter} if adapter else {})), threads=1)
    if adapter == "lora":
        model.adapter = lora = Lora(model.manifest.adapter.targets, RANK, ALPHA)
        lora.initialise(seed=1)
        lora.b[...] = np.random.default_rng(0).normal(0, 0.2, lora.b.shape)
    return model


def read_tokens(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens, padding too, that each forward of a graph is fed."""
    counts: list[int] = []
    for session in (model.generation, model.scoring):
        run = session.run

        def counted(outputs: list[str], feeds: Any, run: Any = run) -> Any:
            counts.append(int(feeds["input_ids"].size))
            return run(outputs, feeds)

        monkeypatch.setattr(session, "run", counted)
    return counts


def alone(model: EdgeModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of every prompt, the whole text read anew for each."""
    texts = [list(prompt) for prompt in prompts]
    for text in texts:
        for _ in range(count):
            (scores,) = (np.concatenate(Sequences(model).log_probs([(text, [token]) for token in range(320)])),)
            text.append(int(np.argmax(scores)))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize("batch_tokens", [1, 30, 2048])
def test_scores_are_those_of_the_whole_texts(changed: EdgeModel, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 8)
    whole = Sequences(changed).log_probs(PAIRS)
    counts = read_tokens(changed, monkeypatch)
    found = log_probs_after(Sequences(changed, batch_tokens), PAIRS)
    assert [len(part) for part in found] == [1, 1, 3, 2, 1]
    assert np.concatenate(found) == pytest.approx(np.concatenate(whole), abs=2e-5)
    # the four texts after the beginning have 6, 3, 2 and 1 tokens
    assert counts == ([8, 24] if batch_tokens == 2048 else [8, 12, 4] if batch_tokens == 30 else [8, 6, 3, 2, 1])


@pytest.mark.parametrize("worth", [8, 10**9])
def test_answers_are_those_of_the_prompts_alone(changed: EdgeModel, worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", worth)
    endless = changed.manifest.tokenizer.model_copy(update={"eos_token_ids": []})
    changed.manifest = changed.manifest.model_copy(update={"tokenizer": endless})
    expected = alone(changed, PROMPTS[1:], 7)
    assert len({tuple(tokens) for tokens in expected}) > 1
    counts = read_tokens(changed, monkeypatch)
    assert [tokens for tokens, _ in continue_batch(changed, PROMPTS[1:], 7)] == expected
    assert (counts[0] == 8) == (worth == 8)


def test_answers_are_drawn_by_their_own_seeds(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = continue_batch(model, PROMPTS, 7, sampling=Sampling(temperature=1.0, seed=3))
    assert whole != continue_batch(model, PROMPTS, 7)
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 8)
    assert continue_batch(model, PROMPTS, 7, sampling=Sampling(temperature=1.0, seed=3)) == whole


def test_an_answer_ends_where_the_context_does(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 8)
    origin = model.manifest.origin.model_copy(update={"context_length": 15})
    model.manifest = model.manifest.model_copy(update={"origin": origin})
    lengths = [len(tokens) for tokens, _ in continue_batch(model, PROMPTS, 20)]
    assert lengths == [15 - len(prompt) for prompt in PROMPTS]


def test_every_prompt_keeps_a_token_of_its_own(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 1)
    for prompts, length in (
        ([SHOTS, SHOTS], 7),
        ([SHOTS, SHOTS[:5], SHOTS[:6]], 4),
        ([[*SHOTS, 2], [*SHOTS[:3], 2], SHOTS], 3),
        ([SHOTS, [2, *SHOTS]], 0),
        ([SHOTS], 0),
        ([], 0),
    ):
        assert read_beginning(model, prompts, len(prompts)).length == length
    assert log_probs_after(Sequences(model), []) == continue_batch(model, [], 3) == []


def test_a_beginning_that_saves_little_is_read_with_each(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = read_tokens(model, monkeypatch)
    assert read_beginning(model, PROMPTS, len(PROMPTS)).length == 0
    assert np.concatenate(log_probs_after(Sequences(model), PAIRS)).tolist() == np.concatenate(Sequences(model).log_probs(PAIRS)).tolist()
    assert counts[0] == counts[1]
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 9)  # two labels of one row are one text, which reads its beginning once
    del counts[:]
    log_probs_after(Sequences(model), PAIRS[:2])
    assert counts == [10]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_completion_of_more_tokens_than_logits_may_have_rows_is_scored(
    model: EdgeModel, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 8)
    whole, sequences = np.concatenate(Sequences(model).log_probs(PAIRS)), Sequences(model)
    sequences.long_hidden = sequences.batch_hidden = most
    counts = read_tokens(model, monkeypatch)
    assert np.concatenate(log_probs_after(sequences, PAIRS)) == pytest.approx(whole, abs=1e-5)
    assert counts[0] == 8


def test_batches_hold_as_much_as_they_may() -> None:
    assert list(make_batches([3, 9, 5, 4], [1, 1, 1, 1], 10, 9)) == [[1], [2, 3], [0]]
    assert list(make_batches([3, 9, 5, 4], [1, 1, 1, 1], 100, 9)) == [[1, 2, 3, 0]]
    assert list(make_batches([3, 9, 5, 4], [2, 1, 3, 1], 100, 3)) == [[1], [2], [3, 0]]
    assert list(make_batches([3, 9, 5, 3], [1, 1, 1, 1], 100, 9, alike=True)) == [[1], [2], [0, 3]]
    assert list(make_batches([], [], 100, 3)) == []


def test_an_evaluation_with_shots_is_that_of_the_whole_prompts(
    exported_dir: Path, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"film {number} {'x' * number}", "label": number % 2} for number in range(12)]
    asked = [{"prompt": f"{row['text']}?", "answer": "good film"} for row in rows]
    every = prompt_cache.read_beginning
    for data, settings in ((rows, {"template": "{text} It was", "labels": "bad,good"}), (asked, {"metrics": ("f1",), "max_tokens": 6})):
        file, train = write_rows(data[:8], "asked.jsonl"), write_rows(data[8:], "train.jsonl")
        found, lengths = {}, {10**9: list[int](), 64: list[int]()}
        for worth, read in lengths.items():

            def reading(*given: Any, read: list[int] = read) -> Any:
                beginning = every(*given)
                read.append(beginning.length)
                return beginning

            monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", worth)
            for module in (prompt_cache, batch_generate):
                monkeypatch.setattr(module, "read_beginning", reading)
            found[worth] = edgezo.evaluate(exported_dir, file, train=train, shots=2, threads=1, **settings)
        assert found[64].shots == 2
        assert found[64].evaluation.loss == pytest.approx(found[10**9].evaluation.loss, abs=1e-5)
        assert found[64].evaluation.score()[0] == found[10**9].evaluation.score()[0]
        assert lengths[10**9] == [0] * len(lengths[64])
        assert min(lengths[64]) > 8
        assert len(lengths[64]) == (1 if data is rows else 2)
