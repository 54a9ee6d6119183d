"""What prompts begin with is read once: the same scores and answers, fewer tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_adapters import ALPHA, RANK

import edgezo
from edgezo.config import Sampling
from edgezo.runtime import prompt_cache
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
KINDS = ["base", "lora", "prefix"]


def open_changed(kind: str, exported_dir: Path, adapter_dirs: dict[str, Path]) -> EdgeModel:
    """A model whose adapter does something."""
    model = EdgeModel(exported_dir if kind == "base" else adapter_dirs[kind], threads=1)
    if kind == "lora":
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


@pytest.mark.parametrize("batch_tokens", [1, 30, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_without_it(
    kind: str, batch_tokens: int, exported_dir: Path, adapter_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 8)
    model = open_changed(kind, exported_dir, adapter_dirs)
    whole = Sequences(model).log_probs(PAIRS)
    base = Sequences(EdgeModel(exported_dir, threads=1)).log_probs(PAIRS)
    assert (np.concatenate(whole) == pytest.approx(np.concatenate(base), abs=1e-3)) == (kind == "base")
    counts = read_tokens(model, monkeypatch)
    found = log_probs_after(Sequences(model, batch_tokens), PAIRS)
    assert [len(part) for part in found] == [1, 1, 3, 2, 1]
    assert np.concatenate(found) == pytest.approx(np.concatenate(whole), abs=1e-5)
    # the four texts after the beginning have 6, 3, 2 and 1 tokens
    assert counts == ([8, 24] if batch_tokens == 2048 else [8, 12, 4] if batch_tokens == 30 else [8, 6, 3, 2, 1])


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, seed=3)])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_without_it(
    kind: str, sampling: Sampling | None, exported_dir: Path, adapter_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_changed(kind, exported_dir, adapter_dirs)
    alone = [continue_batch(model, [prompt], 7)[0] for prompt in PROMPTS]
    whole = continue_batch(model, PROMPTS, 7, sampling=sampling)
    assert (whole == alone) == (sampling is None)
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 8)
    counts = read_tokens(model, monkeypatch)
    assert continue_batch(model, PROMPTS, 7, sampling=sampling) == whole
    assert counts[:2] == [8, 5 * 5]


def test_an_answer_ends_where_the_context_does(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 8)
    origin = model.manifest.origin.model_copy(update={"context_length": 15})
    model.manifest = model.manifest.model_copy(update={"origin": origin})
    lengths = [len(tokens) for tokens, _ in continue_batch(model, PROMPTS, 20)]
    assert lengths == [15 - len(prompt) for prompt in PROMPTS]


def test_every_prompt_keeps_a_token_of_its_own(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 1)
    assert read_beginning(model, [SHOTS, SHOTS]).length == 7
    assert read_beginning(model, [SHOTS, SHOTS[:5], SHOTS[:6]]).length == 4
    assert read_beginning(model, [[*SHOTS, 2], [*SHOTS[:3], 2], SHOTS]).length == 3
    assert read_beginning(model, [SHOTS, [2, *SHOTS]]).length == 0
    assert read_beginning(model, [SHOTS]).length == 0


def test_a_beginning_that_saves_little_is_read_with_each(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = read_tokens(model, monkeypatch)
    assert read_beginning(model, PROMPTS).length == 0
    assert np.concatenate(log_probs_after(Sequences(model), PAIRS)).tolist() == np.concatenate(Sequences(model).log_probs(PAIRS)).tolist()
    assert counts[0] == counts[1]


def test_a_completion_of_more_tokens_than_the_logits_may_have_is_scored(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", 8)
    whole = np.concatenate(Sequences(model).log_probs(PAIRS))
    for rows in (1, 2, 3, 4):
        monkeypatch.setattr(prompt_cache, "logit_rows", lambda _, rows=rows: rows)
        assert np.concatenate(log_probs_after(Sequences(model), PAIRS)) == pytest.approx(whole, abs=1e-5)


def test_batches_hold_as_much_as_they_may() -> None:
    assert list(make_batches([3, 9, 5, 4], [1, 1, 1, 1], 10, 9)) == [[1], [2, 3], [0]]
    assert list(make_batches([3, 9, 5, 4], [1, 1, 1, 1], 100, 9)) == [[1, 2, 3, 0]]
    assert list(make_batches([3, 9, 5, 4], [2, 1, 3, 1], 100, 3)) == [[1], [2], [3, 0]]
    assert list(make_batches([], [], 100, 3)) == []


def test_an_evaluation_with_shots_is_that_of_the_whole_prompts(
    exported_dir: Path, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"film {number} {'x' * number}", "label": number % 2} for number in range(12)]
    asked = [{"prompt": f"{row['text']}?", "answer": "good film"} for row in rows]
    for data, settings in ((rows, {"template": "{text} It was", "labels": "bad,good"}), (asked, {"metrics": ("f1",), "max_tokens": 6})):
        file, train = write_rows(data[:8], "asked.jsonl"), write_rows(data[8:], "train.jsonl")
        found = {}
        for worth in (10**9, 64):
            monkeypatch.setattr(prompt_cache, "WORTH_TOKENS", worth)
            found[worth] = edgezo.evaluate(exported_dir, file, train=train, shots=2, threads=1, **settings)
        assert found[64].shots == 2
        assert found[64].evaluation.loss == pytest.approx(found[10**9].evaluation.loss, abs=1e-5)
        assert found[64].evaluation.score()[0] == found[10**9].evaluation.score()[0]
