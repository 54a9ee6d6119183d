"""The linear probe reads the source's own hidden states, learns what is separable, chooses C as it says, and refuses in one line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Command
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

import edgezo
from edgezo.errors import ConfigError, DataError, EdgezoError, NonFiniteLossError
from edgezo.runtime import probe
from edgezo.runtime.examples import Example, Examples
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.scoring import Sequences

PROMPTS = [[264, 308, 288], [17], [*range(100, 220)], [5, 9, 200, 31], [264, 308, 288], [0, 264, 308, 288, 265, 309, 280]]
HIDDEN_TOLERANCE = 1e-5  # values are of size 1; float32 sums in another order differ by 1e-6
TASK = ["--template", "{text} It was", "--labels", "terrible,great", "--threads", "1"]
SETTINGS: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "threads": 1}


def texts(places: list[str]) -> list[dict[str, Any]]:
    """Rows that differ in a place, and in one word that tells their label."""
    return [{"text": f"{place} is {('terrible', 'great')[label]}", "label": label} for place in places for label in (0, 1)]


TRAIN = texts(
    ["the film", "a plot", "the end", "a song", "this book", "the cat", "one meal", "my day", "the sea", "a hat", "the plan", "he"]
)
TEST = texts(["the plot", "a film", "that end", "the song", "a book"])


@pytest.fixture
def rows(write_rows: Callable[..., str]) -> dict[str, str]:
    """Files of rows that a probe can tell apart."""
    files = {"train": TRAIN, "test": TEST, "valid": texts(["a sea", "the hat", "she"])}
    return {name: write_rows(part, f"{name}.jsonl") for name, part in files.items()}


def source_states(network: Any, prompts: list[list[int]]) -> Any:
    """What transformers returns as the last of its hidden states, one prompt a forward."""
    with torch.no_grad():
        return np.stack([network(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1].numpy() for ids in prompts])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_hidden_states_are_those_of_transformers(export_tiny: Callable[..., Path], name: str) -> None:
    found = Sequences(EdgeModel(export_tiny(name), threads=1)).hidden_states(PROMPTS)
    expected = source_states(tiny.make_model(name), PROMPTS)
    assert (found.shape, found.dtype) == ((len(PROMPTS), 32), np.float32)
    assert np.abs(expected).max() > 0.5
    assert np.abs(found - expected).max() < HIDDEN_TOLERANCE
    assert np.abs(found - source_states(tiny.make_model(name, seed=1), PROMPTS)).max() > 0.1


def test_hidden_states_do_not_depend_on_how_prompts_are_batched(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Sequences(model).hidden_states(PROMPTS)
    forwards: list[int] = []
    run = model.scoring.run
    monkeypatch.setattr(model.scoring, "run", lambda outputs, feeds: forwards.append(len(feeds["input_ids"])) or run(outputs, feeds))
    assert Sequences(model, batch_tokens=1).hidden_states(PROMPTS) == pytest.approx(whole, abs=HIDDEN_TOLERANCE)
    assert forwards == [1] * 5  # equal prompts run once
    assert whole[0].tolist() == whole[4].tolist()


def test_hidden_states_have_read_the_prefix(prefix_dir: Path) -> None:
    model = EdgeModel(prefix_dir, threads=1)
    before = Sequences(model).hidden_states(PROMPTS[:2])
    model.weights["prefix"][...] += 1.0
    assert np.abs(Sequences(model).hidden_states(PROMPTS[:2]) - before).max() > 1e-3


def test_a_probe_learns_what_the_label_words_do_not_tell(exported_dir: Path, rows: dict[str, str]) -> None:
    found = edgezo.probe(exported_dir, rows["train"], rows["test"], **SETTINGS)
    zero_shot = edgezo.evaluate(exported_dir, rows["test"], **SETTINGS).evaluation
    assert found.evaluation.accuracy is not None
    assert zero_shot.accuracy is not None
    assert found.evaluation.accuracy >= 0.9 > zero_shot.accuracy
    assert found.evaluation.loss < zero_shot.loss
    assert (found.train_rows, found.valid_rows, found.forward_rows, found.truncated) == (24, 0, 34, 0)
    assert 0 < found.forward_seconds < found.seconds


def test_rows_are_the_first_of_the_file(exported_dir: Path, rows: dict[str, str], write_rows: Callable[..., str]) -> None:
    flipped = write_rows(TRAIN[:16] + [{**row, "label": 1 - row["label"]} for row in TRAIN[16:]], "flipped.jsonl")
    first = edgezo.probe(exported_dir, rows["train"], rows["test"], rows=16, **SETTINGS)
    assert edgezo.probe(exported_dir, flipped, rows["test"], rows=16, **SETTINGS).evaluation == first.evaluation
    assert edgezo.probe(exported_dir, flipped, rows["test"], **SETTINGS).evaluation != first.evaluation
    assert (first.train_rows, first.forward_rows) == (16, 26)


def cloud(count: int, seed: int) -> probe.Labelled:
    """Three overlapping classes in twelve dimensions of unlike scale."""
    draw = np.random.default_rng(seed)
    gold = np.arange(count) % 3
    return probe.Labelled((draw.normal(size=(count, 12)) + 0.6 * np.eye(12)[gold]) * np.logspace(-2, 2, 12) + 5, gold)


def fitted(train: probe.Labelled, strength: float) -> Callable[[Any], Any]:
    """Probabilities by a classifier on features standardised by hand."""
    mean, deviation = train.features.mean(axis=0), train.features.std(axis=0)
    classifier = LogisticRegression(C=strength, max_iter=10_000).fit((train.features - mean) / deviation, train.gold)
    return lambda features: classifier.predict_proba((features - mean) / deviation)


@pytest.mark.parametrize("strength", [1e-5, 0.1, 10.0])
def test_held_out_rows_are_scored_by_fits_that_have_not_seen_them(strength: float) -> None:
    train, valid = cloud(60, 0), cloud(45, 1)
    by_valid = fitted(train, strength)(valid.features)
    found = probe.held_out(train, valid, strength)
    assert found.loss == pytest.approx(log_loss(valid.gold, by_valid), abs=1e-6)
    assert found.accuracy == pytest.approx(float((by_valid.argmax(axis=1) == valid.gold).mean()))
    assert found.macro_f1 == pytest.approx(f1_score(valid.gold, by_valid.argmax(axis=1), average="macro"))
    by_fold = np.empty((60, 3))
    for fold in np.split(np.arange(60), 5):  # classes alternate, so that stratified folds are runs of rows
        others = np.setdiff1d(np.arange(60), fold)
        by_fold[fold] = fitted(probe.Labelled(train.features[others], train.gold[others]), strength)(train.features[fold])
    assert probe.held_out(train, None, strength).loss == pytest.approx(log_loss(train.gold, by_fold), abs=1e-6)


@pytest.mark.parametrize("valid", [cloud(45, 1), None])
def test_c_is_the_best_on_held_out_rows(valid: probe.Labelled | None) -> None:
    held = {c: probe.held_out(cloud(60, 0), valid, c) for c in probe.STRENGTHS}
    best = max(held, key=lambda c: ((held[c].accuracy or 0), -held[c].loss))
    assert len({evaluation.loss for evaluation in held.values()}) == len(probe.STRENGTHS)
    assert probe.choose_strength(cloud(60, 0), valid) == (best, held[best])


def test_a_small_class_makes_fewer_folds() -> None:
    train = cloud(60, 0)
    kept = np.flatnonzero((train.gold != 2) | (np.arange(60) < 6))  # two rows of the third class
    found = probe.held_out(probe.Labelled(train.features[kept], train.gold[kept]), None, 0.1)
    assert found.rows == 42


def test_nan_in_the_hidden_states_is_refused(model: EdgeModel) -> None:
    model.weights["model.norm.weight"][3] = np.nan
    examples = Examples([Example([([5, 6], [7]), ([5, 6], [8])], gold) for gold in (0, 1)], 0)
    with pytest.raises(NonFiniteLossError, match=r"^the model gives no finite hidden states; export it again$"):
        probe.run_probe(Sequences(model), examples, examples, examples)


def test_scikit_learn_is_asked_for_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError) as caught:
        edgezo.probe(tmp_path / "none", "none.jsonl", "none.jsonl")
    assert str(caught.value) == "a probe needs scikit-learn, which is not installed; install it with: pip install scikit-learn"


def test_the_other_commands_do_not_load_scikit_learn() -> None:
    code = "import sys, edgezo.api, edgezo.runtime.probe; print([name for name in ('sklearn', 'scipy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def refused(exported_dir: Path, data: str, test: str, **settings: Any) -> str:
    with pytest.raises(EdgezoError) as caught:
        edgezo.probe(exported_dir, data, test, **settings)
    assert isinstance(caught.value, DataError)
    return str(caught.value)


def test_rows_without_labels_are_refused(exported_dir: Path, write_rows: Callable[..., str], rows: dict[str, str]) -> None:
    data = write_rows([{"prompt": "2 + 2 =", "completion": " 4"}])
    expected = "a probe learns the labels of a classification, this is completion; give --template and --labels"
    assert refused(exported_dir, data, rows["test"]) == expected


@pytest.mark.parametrize("count", [0, 25])
def test_more_rows_than_there_are_are_refused(exported_dir: Path, rows: dict[str, str], count: int) -> None:
    expected = f"--rows {count}: {rows['train']} has 24 rows; give 1 to 24"
    assert refused(exported_dir, rows["train"], rows["test"], rows=count, **SETTINGS) == expected


def test_a_label_without_training_rows_is_refused(exported_dir: Path, rows: dict[str, str]) -> None:
    expected = "label '1' has 0 of the 1 training rows, a probe learns from at least one; give more rows"
    assert refused(exported_dir, rows["train"], rows["test"], valid=rows["valid"], rows=1, **SETTINGS) == expected


def test_one_row_of_a_label_cannot_be_cross_validated(exported_dir: Path, rows: dict[str, str]) -> None:
    expected = "label '1' has 1 of the 3 training rows, cross-validation needs two; give --valid or more rows"
    assert refused(exported_dir, rows["train"], rows["test"], rows=3, **SETTINGS) == expected
    assert edgezo.probe(exported_dir, rows["train"], rows["test"], valid=rows["valid"], rows=3, **SETTINGS).train_rows == 3


MEASURED = r"accuracy \d+\.\d %, macro F1 \d\.\d{3}, loss \d+\.\d{4}"
CHOSEN = r"C      (?:1e-05|0\.0001|0\.001|0\.01|0\.1|1|10) of 1e-05 to 10, by"


@pytest.mark.parametrize("with_valid", [False, True])
def test_the_command_tells_the_probe_its_c_and_its_cost(
    invoke: Command, exported_dir: Path, rows: dict[str, str], with_valid: bool
) -> None:
    extra = ["--valid", rows["valid"]] if with_valid else []
    found = invoke("probe", str(exported_dir), "--data", rows["train"], "--test", rows["test"], "--rows", "20", *TASK, *extra)
    where, count, parts = ("the validation", 6, r"20 training, 6 validation") if with_valid else ("held-out training", 20, "20 training")
    expected = (
        rf"probe  {MEASURED} \(10 rows\)\n"
        rf"{CHOSEN} {where} rows: {MEASURED} \({count} rows\)\n"
        rf"rows   {parts} and 10 test rows, one forward each\n"
        r"took   \d+\.\d s, of these forwards \d+\.\d s\n"
    )
    assert re.fullmatch(expected, found.out), found.out
    stages = ["20 forwards of training rows", *(["6 forwards of validation rows"] if with_valid else [])]
    assert found.err == "".join(f"  {stage}\n" for stage in [*stages, "10 forwards of test rows", "fitting"])
    assert found.code == 0


def test_the_command_prints_one_json_object(invoke: Command, exported_dir: Path, rows: dict[str, str]) -> None:
    found = invoke("probe", str(exported_dir), "--data", rows["train"], "--test", rows["test"], "--max-length", "12", "--json", *TASK)
    shown = json.loads(found.out)
    direct = edgezo.probe(exported_dir, rows["train"], rows["test"], max_length=12, **SETTINGS)
    assert found.out.count("\n") == 1
    assert shown["evaluation"] == direct.evaluation.as_dict()
    assert shown["chosen_on"] == direct.chosen_on.as_dict()
    assert shown["strength"] == direct.strength
    assert shown.keys() == set(probe.ProbeResult._fields)
    assert shown["truncated"] == direct.truncated > 0
    assert found.err.endswith(f"{direct.truncated} of 34 rows were cut to fit\n")


def test_the_command_refuses_in_one_line(invoke: Command, exported_dir: Path, rows: dict[str, str]) -> None:
    found = invoke("probe", str(exported_dir), "--data", rows["train"], "--test", rows["test"], "--rows", "1", *TASK)
    assert found == (1, "", "error: label '0' has 1 of the 1 training rows, cross-validation needs two; give --valid or more rows\n")
