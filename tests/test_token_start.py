"""The exact start of texts: what the fit says is what the changed model gives."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command

import edgezo
from edgezo.config import make_config
from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.manifest import Manifest
from edgezo.runtime import own_text, token_start
from edgezo.runtime.batch_generate import continue_batch
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.head_rows import HeadRows
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.own_text import own_texts
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.softmax_fit import fit_softmax, mean_loss, read_out
from edgezo.runtime.token_start import read_positions, token_fits

FEW: dict[str, Any] = {"steps": 0, "lr": 0.1, "eps": 0.01, "threads": 1}
ANSWERS = {"good": " it was great", "fine": " it was great fun", "bad": " it was terrible", "poor": " what a terrible film"}
ROWS = [{"prompt": f"a {word} film:", "completion": ANSWERS[word], "answer": ANSWERS[word].strip()} for word in ANSWERS] * 6
KINDS: dict[str, list[dict[str, Any]]] = {
    "completion": [{name: row[name] for name in ("prompt", "completion")} for row in ROWS],
    "answer": [{name: row[name] for name in ("prompt", "answer")} for row in ROWS],
    "choice": [
        {"prompt": row["prompt"], "choices": sorted(text.strip() for text in ANSWERS.values()), "answer": row["answer"]} for row in ROWS
    ],
    "text": [{"text": row["prompt"] + row["completion"]} for row in ROWS],
}


@pytest.fixture
def lora_dir(export_tiny: Callable[..., Path]) -> Path:
    return export_tiny("llama", adapter="lora")


@pytest.fixture
def rows(write_rows: Callable[..., str]) -> str:
    return write_rows(KINDS["completion"])


def opened(directory: Path, rows: str) -> tuple[EdgeModel, Objective, list[Any]]:
    model = EdgeModel(directory, threads=1)
    dataset = read_dataset(model, make_config(None, {"data": rows, "steps": 0}))
    return model, Objective(Sequences(model), dataset.task, dataset.config), dataset.train.examples


def completions(examples: list[Any]) -> list[Any]:
    return [example.pairs[0] for example in examples]


def test_states_and_log_probabilities_are_those_of_every_token(lora_dir: Path, rows: str) -> None:
    model, objective, examples = opened(lora_dir, rows)
    pairs, tokens = completions(examples), np.array([5, 9, 11])
    found = objective.sequences.token_states(pairs, tokens)
    assert objective.sequences.forward_rows == len({(*prompt, *completion[:-1]) for prompt, completion in pairs})
    before = [prompt + completion[:place] for prompt, completion in pairs for place in range(len(completion))]
    assert found.tokens.tolist() == [token for _, completion in pairs for token in completion]
    assert np.abs(found.hidden - objective.sequences.hidden_states(before)).max() < 1e-4
    alone = Sequences(model).log_probs([(text, [int(token)]) for text in before for token in tokens])
    assert np.abs(found.log_probs.ravel() - np.concatenate(alone)).max() < 1e-4


@pytest.mark.parametrize("tokens", [3, 64])
def test_the_fit_tells_the_loss_of_the_changed_model(lora_dir: Path, rows: str, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """With rows for few of the tokens that are written, or for all of them."""
    monkeypatch.setattr(token_start, "TOKENS", tokens)
    model, objective, examples = opened(lora_dir, rows)
    before = objective.loss(examples)
    chosen, found = read_positions(objective, examples)
    written = {token for _, completion in completions(examples) for token in completion}
    assert len(chosen) == min(tokens, len(written))
    assert (len(chosen) in found.gold) == (tokens == 3)
    assert np.allclose(np.exp(found.scores).sum(axis=1), 1)
    (fit,) = token_fits(objective, examples, np.inf)
    model.head = fit.make()
    assert model.head.tokens.tolist() == chosen.tolist()
    changed = np.hstack([model.head.rows, np.zeros((len(model.head.rows), 1))])
    promised = mean_loss(found.scores + read_out(found.states, changed), found.gold) - mean_loss(found.scores, found.gold)
    assert promised < -0.5
    assert objective.loss(examples) - before == pytest.approx(promised, abs=1e-3)


def test_the_tokens_chosen_are_those_most_wrong(lora_dir: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_start, "TOKENS", 2)
    _, objective, examples = opened(lora_dir, rows)
    pairs = completions(examples)
    every = np.unique([token for _, completion in pairs for token in completion])
    found = objective.sequences.token_states(pairs, every)
    wrong = np.abs(np.exp(found.log_probs) - (found.tokens[:, None] == every)).sum(axis=0)
    assert read_positions(objective, examples)[0].tolist() == sorted(every[np.argsort(-wrong)[:2]].tolist())


def test_tokens_of_held_out_texts_alone_are_no_knowledge_of_them() -> None:
    """Twelve texts of one token each, all different: that they are among the tokens chosen says nothing of a thirteenth."""
    gold = np.arange(12)
    scores = np.log(np.tile([*[1e-3] * 12, 1 - 12e-3], (12, 1)))
    states = np.ones((12, 1))
    told = fit_softmax(states, scores, gold)
    assert told.held_out.loss < told.before - 2
    fit = fit_softmax(states, scores, gold, rest=True)
    assert fit.held_out.loss > fit.before - 0.01


def test_texts_are_held_out_whole(lora_dir: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of one text that were in several folds would tell of each other."""
    folds: list[Any] = []
    every = token_start.fit_softmax
    monkeypatch.setattr(token_start, "fit_softmax", lambda *given, fold, rest: (folds.append(fold), every(*given, fold=fold, rest=rest))[1])
    _, objective, examples = opened(lora_dir, rows)
    list(token_fits(objective, examples, np.inf))
    lengths = [len(completion) for _, completion in completions(examples)]
    of_rows = np.split(folds[0][: sum(lengths)], np.cumsum(lengths)[:-1])
    assert [set(part.tolist()) for part in of_rows] == [{place % 3} for place in range(len(lengths))]


def test_own_texts_are_what_the_model_writes(lora_dir: Path) -> None:
    model = EdgeModel(lora_dir, threads=1)
    found = own_texts(model, seed=3)
    assert 1 < len(found) <= own_text.TEXTS
    assert found == own_texts(model, seed=3) != own_texts(model, seed=4)
    for prompt, tokens in found[:4]:
        (written,) = continue_batch(model, [prompt], own_text.TOKENS)
        assert tokens == written[0]
    opened = [model.text.decode(prompt) for prompt, _ in found]
    assert all(text.strip().isalpha() for text in opened[::2])


def test_what_the_model_writes_by_itself_stays_likely(lora_dir: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its own texts beside them the rows of the head do there as they like."""
    model, objective, examples = opened(lora_dir, rows)
    own = own_texts(model, objective.config.seed)
    untuned = model.head

    def loss_of_own() -> float:
        return -float(np.concatenate(objective.sequences.log_probs(own)).mean())

    losses = [loss_of_own()]
    for given in (own, []):
        monkeypatch.setattr(token_start, "own_texts", lambda *arguments, given=given: given)
        (fit,) = token_fits(objective, examples, np.inf)
        model.head = fit.make()
        losses.append(loss_of_own())
        model.head = untuned
    assert losses[1] < losses[0] + 0.1
    assert losses[2] > losses[1] + 0.5


def test_no_more_texts_are_read_than_there_is_time_and_room_for(lora_dir: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_start, "CHUNK", 5)
    _, objective, examples = opened(lora_dir, rows)
    assert set(read_positions(objective, examples, seconds=0)[1].texts) == set(range(5))
    lengths = np.cumsum([len(completion) for _, completion in completions(examples)])
    room = int(lengths[-1]) - 30
    monkeypatch.setattr(token_start, "POSITIONS", room)
    needed = int(np.searchsorted(lengths, room)) + 1
    assert needed < len(lengths)
    assert np.unique(read_positions(objective, examples)[1].texts).tolist() == list(range(needed))


def test_one_long_text_leaves_room_for_others(lora_dir: Path, write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_start, "POSITIONS", 30)
    _, objective, examples = opened(lora_dir, write_rows([{"prompt": "so:", "completion": " it was great" * 12}, *KINDS["completion"]]))
    found = read_positions(objective, examples)[1]
    assert np.bincount(found.texts)[0] == 10
    assert len(found.texts) >= 30


def test_a_model_without_finite_scores_is_refused(lora_dir: Path, rows: str) -> None:
    model, objective, examples = opened(lora_dir, rows)
    model.head = HeadRows(np.array([5]), np.full((model.manifest.origin.hidden_size, 1), np.nan, np.float32))
    with pytest.raises(NonFiniteLossError, match=r"^the model gives no finite log-probabilities or hidden states; export the model again$"):
        read_positions(objective, examples)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_it_by_default(
    invoke: Command, lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str], kind: str
) -> None:
    """It lowers the loss, is kept in the journal, has steps below it and is rebuilt bit for bit."""
    data, notices = write_rows(KINDS[kind]), []
    reporter = edgezo.Reporter(notice=notices.append)
    result = edgezo.tune(lora_dir, tmp_path / "run", data=data, valid=data, reporter=reporter, **{**FEW, "steps": 3, "lr": 1e-3})
    assert result.before is not None
    assert result.start is not None
    assert result.start.loss < 0.8 * result.before.loss
    (told,) = [text for text in notices if text.startswith("exact start")]
    assert told.startswith("exact start: rows of the head for ")
    assert f"loss {result.before.loss:.3f} -> {result.start.loss:.3f}" in told
    head = read_journal(tmp_path / "run" / "journal.bin").heads[0]
    assert head.rows.shape == (EdgeModel(lora_dir).manifest.origin.hidden_size, len(head.tokens))
    assert invoke("verify", str(tmp_path / "run"), "--base", str(lora_dir), "--every", "1", "--threads", "1").code == 0


def test_the_merged_model_writes_what_the_run_writes(invoke: Command, lora_dir: Path, tmp_path: Path, rows: str) -> None:
    edgezo.tune(lora_dir, tmp_path / "run", data=rows, **FEW)
    assert (
        invoke("merge", str(lora_dir), str(tmp_path / "run"), "-o", str(tmp_path / "merged"), "--format", "edge", "--step", "0").code == 0
    )
    untuned, tuned = EdgeModel(lora_dir, threads=1), EdgeModel(lora_dir, run=tmp_path / "run", step=0, threads=1)
    merged, prompt = EdgeModel(tmp_path / "merged", threads=1), ROWS[0]["prompt"]
    assert merged.generate(prompt, 4) == tuned.generate(prompt, 4) != untuned.generate(prompt, 4)


def test_a_solution_that_does_not_help_the_validation_rows_is_left(lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str]) -> None:
    rows, others = (
        [{"prompt": f"a {word} film:", "completion": end} for word in ANSWERS] * 4 for end in (" it was great", " what bad plot")
    )
    notices: list[str] = []
    reporter, valid = edgezo.Reporter(notice=notices.append), write_rows(others, "valid.jsonl")
    result = edgezo.tune(lora_dir, tmp_path / "run", data=write_rows(rows), valid=valid, reporter=reporter, **FEW)
    assert result.start is None
    assert read_journal(tmp_path / "run" / "journal.bin").heads == {}
    (told,) = [text for text in notices if text.startswith("exact start")]
    losses = r"loss ([0-9.]+) -> ([0-9.]+)"
    assert (
        found := re.fullmatch(
            rf"exact start: what the training rows teach does not help the validation rows \(validation {losses}\); the run starts from the model as it is",
            told,
        )
    )
    assert float(found[1]) < float(found[2])


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        ("choice", {}, "it makes right texts likelier, and without validation rows nothing tells whether that helps here, give --valid"),
        (
            "answer",
            {"objective": "f1"},
            "it makes right texts likelier, and without validation rows nothing tells whether that helps here, give --valid",
        ),
    ],
)
def test_rows_that_are_compared_have_none_without_validation_rows(
    lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str], kind: str, settings: dict[str, Any], problem: str
) -> None:
    data, notices = write_rows(KINDS[kind]), list[str]()
    with pytest.raises(ConfigError, match=f"^{re.escape(f'--start exact: {problem}; or give --start none')}$"):
        edgezo.tune(lora_dir, tmp_path / "run", data=data, start="exact", **FEW, **settings)
    edgezo.tune(lora_dir, tmp_path / "run", data=data, reporter=edgezo.Reporter(notice=notices.append), **FEW, **settings)
    assert f"no exact start: {problem}" in notices
    assert read_journal(tmp_path / "run" / "journal.bin").heads == {}


def test_one_text_cannot_be_held_out(lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str]) -> None:
    notices: list[str] = []
    data, reporter = write_rows(KINDS["completion"][:1]), edgezo.Reporter(notice=notices.append)
    edgezo.tune(lora_dir, tmp_path / "run", data=data, reporter=reporter, **FEW)
    assert "no exact start: it is chosen by rows held out, and there is one row, give more" in notices


def test_an_edge_model_without_inputs_for_it_says_so(lora_dir: Path, tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "takes_head_rows", False)
    notices: list[str] = []
    edgezo.tune(lora_dir, tmp_path / "run", data=rows, reporter=edgezo.Reporter(notice=notices.append), **FEW)
    assert f"no exact start: {lora_dir} was exported without inputs for rows of the head, export it again" in notices
