"""Choices, answers, preferences and objectives without a slope, against the source model's own numbers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from objective_rows import ANSWER_ROWS, CHOICE_ROWS, PREFERENCE_ROWS, objective_of
from reference import network_log_probs
from row_examples import make_rows

from edgezo.config import make_config
from edgezo.errors import ConfigError, DataError
from edgezo.runtime.dataset import task_of
from edgezo.runtime.examples import Example, make_examples
from edgezo.runtime.generate import generate, until
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import add_references
from edgezo.runtime.text_metrics import best_of, exact_match, f1, rouge_l


@pytest.fixture(scope="module")
def network() -> Any:
    """The source model of tests/conftest.py in PyTorch: the same seed."""
    return tiny.make_model("llama")


def candidate_sums(network: Any, examples: list[Example]) -> list[np.ndarray[Any, Any]]:
    return [network_log_probs(network, example.pairs) for example in examples]


def test_choices_learn_the_right_text_and_are_compared_by_the_mean_of_their_tokens(model: EdgeModel, network: Any) -> None:
    objective, examples = objective_of(model, CHOICE_ROWS)
    assert [example.gold for example in examples] == [0, 1, 2]
    sums = candidate_sums(network, examples)
    tokens = sum(len(example.pairs[example.gold][1]) for example in examples)
    nats = sum(float(row[example.gold]) for row, example in zip(sums, examples, strict=True))
    assert objective.loss(examples) == pytest.approx(-nats / tokens, abs=1e-4)
    means = [row / [len(pair[1]) for pair in example.pairs] for row, example in zip(sums, examples, strict=True)]
    right = [int(np.argmax(row)) == example.gold for row, example in zip(means, examples, strict=True)]
    found = objective.evaluate(examples)
    assert (found.accuracy, found.macro_f1) == (np.mean(right), None)
    assert objective_of(model, CHOICE_ROWS, objective="accuracy")[0].loss(examples) == pytest.approx(1 - np.mean(right))
    expected = np.mean([np.logaddexp.reduce(row) - row[example.gold] for row, example in zip(means, examples, strict=True)])
    assert objective_of(model, CHOICE_ROWS, objective="cross-entropy")[0].loss(examples) == pytest.approx(expected, abs=1e-4)


def test_calibration_takes_off_the_score_after_the_neutral_prompt(model: EdgeModel, network: Any) -> None:
    plain, calibrated = objective_of(model, CHOICE_ROWS)[1], objective_of(model, CHOICE_ROWS, calibrate="so it is")
    assert [len(example.pairs) for example in calibrated[1]] == [4, 4, 6]
    right = []
    for example in calibrated[1]:
        sums = network_log_probs(network, example.pairs)
        half = len(sums) // 2
        right.append(int(np.argmax(sums[:half] - sums[half:])) == example.gold)
    assert calibrated[0].evaluate(calibrated[1]).accuracy == np.mean(right)
    halves = [np.split(network_log_probs(network, example.pairs), 2) for example in calibrated[1]]
    scores = [own - neutral for own, neutral in halves]
    expected = np.mean([np.logaddexp.reduce(row) - row[example.gold] for row, example in zip(scores, plain, strict=True)])
    objective = objective_of(model, CHOICE_ROWS, calibrate="so it is", objective="cross-entropy")[0]
    assert objective.loss(calibrated[1]) == pytest.approx(expected, abs=1e-4)
    assert [example.pairs for example in plain] == [example.pairs[: len(example.pairs) // 2] for example in calibrated[1]]


def test_templates_of_choices_with_other_words_for_a_value(model: EdgeModel) -> None:
    rows = [
        {"premise": "the film was bad", "one": "no plot", "two": "a plot", "question": "cause", "label": 0},
        {"premise": "a good film", "one": "it is long", "two": "long", "question": "effect", "label": 1},
    ]
    settings = {
        "template": "{premise} {question}",
        "choices": ["{one}", "{two}"],
        "answer_field": "label",
        "replace": ["question:effect=so,cause=because"],
    }
    _, examples = objective_of(model, rows, **settings)
    texts = [model.text.decode([*example.pairs[0][0], *example.pairs[0][1]]) for example in examples]
    assert texts == [
        model.text.decode(model.text.encode(text)) for text in ("the film was bad because no plot", "a good film so it is long")
    ]
    assert [example.gold for example in examples] == [0, 1]
    with pytest.raises(DataError, match=r"^rows.jsonl:2: field 'question' is 'effect', replace has words for 'cause'$"):
        objective_of(model, rows, **{**settings, "replace": ["question:cause=because"]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 7}, "field 'answer' is '7', which is neither one of the 2 choices nor a number from 0 to 1 (--answer-field names it)"),
        ({"answer": None}, "field 'answer' is missing or no text, which is neither one of the 2 choices nor a number from 0 to 1"),
        ({"choices": ["one"]}, "field 'choices' must be a list of at least two texts"),
        ({"choices": "one"}, "field 'choices' must be a list of at least two texts"),
        ({"prompt": ""}, "field 'prompt': it is empty or no text; every row needs it"),
    ],
)
def test_bad_rows_of_choices_are_named(model: EdgeModel, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        objective_of(model, [CHOICE_ROWS[0], {**CHOICE_ROWS[0], **row}])
    assert str(caught.value).startswith(f"rows.jsonl:2: {message}")


def test_generated_answers_are_those_of_one_prompt_at_a_time(model: EdgeModel, lora_dir: Path, prefix_dir: Path) -> None:
    rows = [{"prompt": prompt, "answer": "x"} for prompt in ("it", "the film was a good", "a plot and a film", "no", "good good good")]
    for opened in (model, EdgeModel(lora_dir, threads=1), EdgeModel(prefix_dir, threads=1)):
        objective, examples = objective_of(opened, rows, max_tokens=12)
        expected = ["".join(generate(opened, row["prompt"], 12)).strip() for row in rows]
        assert objective._answers(examples) == expected
        assert len(set(expected)) > 1
        objective.sequences.batch_tokens = 1  # a row at a time
        assert objective._answers(examples) == expected


def test_a_stop_text_ends_an_answer_and_is_learned(model: EdgeModel) -> None:
    rows = [{"prompt": "the film was a good", "answer": "film"}]
    objective, examples = objective_of(model, rows, max_tokens=12)
    (whole,) = objective._answers(examples)
    stop = whole[3:5]
    stopping, stopped = objective_of(model, rows, max_tokens=12, stop=stop)
    assert stopping._answers(stopped) == [whole.split(stop)[0].strip()]
    prompt, completion = stopped[0].pairs[0]
    assert model.text.decode([*prompt, *completion]).endswith(f"film{stop}")
    assert examples[0].pairs[0][1][-1] == model.manifest.tokenizer.eos_token_ids[0]


def test_answers_are_measured_against_the_nearest_reference(model: EdgeModel) -> None:
    objective, examples = objective_of(model, ANSWER_ROWS, max_tokens=6, metrics="rouge-l,f1")
    texts = objective._answers(examples)
    found = objective.evaluate(examples)
    assert list(found.others) == ["rouge_l", "f1"]
    assert found.others["f1"] == np.mean([best_of(f1, text, example.answers) for text, example in zip(texts, examples, strict=True)])
    right = [{**row, "answer": text} for row, text in zip(ANSWER_ROWS, texts, strict=True)]
    for name in ("f1", "exact-match", "rouge-l"):
        objective, examples = objective_of(model, right, max_tokens=6, objective=name)
        assert objective.generates
        assert objective.loss(examples) == pytest.approx(0)
        assert next(iter(objective.evaluate(examples).others.items())) == (name.replace("-", "_"), pytest.approx(1))


def test_preferences_with_and_without_a_reference(model: EdgeModel, network: Any) -> None:
    objective, examples = objective_of(model, PREFERENCE_ROWS, beta=0.5)
    sums = candidate_sums(network, examples)
    margins = np.array([row[0] - row[1] for row in sums])
    assert objective.loss(examples) == pytest.approx(np.mean(np.log1p(np.exp(-0.5 * margins))), abs=1e-4)
    found = objective.evaluate(examples)
    assert dict(found.others) == {"preferred": np.mean(margins > 0), "margin": pytest.approx(margins.mean(), abs=1e-3)}
    assert found.perplexity is None
    relative, _ = objective_of(model, PREFERENCE_ROWS, objective="dpo", beta=0.5)
    referred = add_references(relative.sequences, examples)
    assert relative.loss(referred) == pytest.approx(math.log(2))  # nothing is tuned yet
    moved = [example._replace(reference=(example.reference[0] - 2, example.reference[1])) for example in referred]
    assert relative.loss(moved) == pytest.approx(math.log1p(math.exp(-1)))
    assert relative.evaluate(moved).others["margin"] == pytest.approx(2)


def test_answers_of_preferences_end_as_they_are_asked_to(model: EdgeModel) -> None:
    for stop in (None, " and"):
        _, examples = objective_of(model, PREFERENCE_ROWS, **({} if stop is None else {"stop": stop}))
        ends = [completion for example in examples for _, completion in example.pairs]
        assert all((completion[-1] in model.text.facts.eos_token_ids) == (stop is None) for completion in ends)
        assert stop is None or all(model.text.decode(completion).endswith(stop) for completion in ends)


# SQuAD's script, transcribed as a specification: https://rajpurkar.github.io/SQuAD-explorer (f1_score, exact_match_score)
@pytest.mark.parametrize(
    ("answer", "reference", "match", "score"),
    [
        ("The Denver Broncos!", "denver broncos", 1, 1),
        ("Denver Broncos won", "Denver Broncos", 0, 0.8),
        ("a a b", "a b b", 1 - 1, 2 * 1 / (1 + 2)),  # articles go
        ("", "gold", 0, 0),
        ("gold, gold", "gold", 0, 2 / 3),
        ("twenty-four", "twenty four", 0, 0),
    ],
)
def test_exact_match_and_f1_are_those_of_squad(answer: str, reference: str, match: float, score: float) -> None:
    assert exact_match(answer, reference) == match
    assert f1(answer, reference) == pytest.approx(score)


def test_rouge_l_is_of_the_longest_common_subsequence() -> None:
    # words in common in order: the, film, long: P 3/4, R 3/5
    assert rouge_l("the film was long", "the good film is long") == pytest.approx(2 * 0.75 * 0.6 / 1.35)


@pytest.mark.parametrize(
    ("rows", "name", "fitting"),
    [
        (CHOICE_ROWS, "f1", "likelihood, cross-entropy, accuracy"),
        (ANSWER_ROWS, "accuracy", "likelihood, f1, exact-match, rouge-l"),
        (PREFERENCE_ROWS, "likelihood", "preference, dpo"),
        ([{"text": "a film"}], "dpo", "likelihood"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused(model: EdgeModel, rows: list[dict[str, Any]], name: str, fitting: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--objective {name}: does not fit rows of kind \w+; give {fitting}, or package.module:function$"
    ):
        objective_of(model, rows, objective=name)


def test_a_prompt_is_cut_so_that_an_answer_of_any_length_fits(model: EdgeModel) -> None:
    rows = make_rows({"prompt": "a long film " * 30, "answer": "x"})
    for tokens in (3, 20):
        task = task_of(rows, make_config(None, {"data": "no file", "max_tokens": tokens}))
        (example,) = make_examples(rows, task, model.text, 64).examples
        assert len(example.pairs[0][0]) == 64 - max(tokens, len(example.pairs[0][1]))


@pytest.mark.parametrize(
    ("fields", "settings", "kind"),
    [
        ({"prompt": "a", "completion": "b", "answer": "c"}, {}, "completion"),
        ({"prompt": "a", "completion": "b", "answer": "c"}, {"answer_field": "answer"}, "answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "answer": "d"}, {}, "preference"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, {}, "choice"),
    ],
)
def test_the_kind_is_that_of_the_named_fields(fields: dict[str, Any], settings: dict[str, Any], kind: str) -> None:
    assert task_of(make_rows(fields), make_config(None, {"data": "no file", **settings})).kind == kind


def test_a_number_is_the_place_of_a_choice_even_among_numbers(model: EdgeModel) -> None:
    rows = [{"prompt": "2 + 2 is", "choices": ["4", "0", "2"], "answer": answer} for answer in (0, "0", 2, "2")]
    assert [example.gold for example in objective_of(model, rows)[1]] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"choices": ["{prompt}"]},
            "--choices: 1 given for rows of kind choice; give a template for each of at least two choices, and no --labels",
        ),
        (
            {"template": "{prompt}", "labels": "a,b", "choices": ["x", "y"]},
            "--choices: 2 given for rows of kind classification; give a template",
        ),
    ],
)
def test_choices_that_are_none_are_refused(model: EdgeModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        objective_of(model, [{**CHOICE_ROWS[0], "label": "0"}], **settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_text_in_pieces_ends_before_the_stop(size: int) -> None:
    text = "a fi\nlm##\n#\n\nand more\n\n"
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(until(pieces, "\n\n")) == "a fi\nlm##\n#"
    assert "".join(until(pieces, "none")) == text
    assert "".join(until(pieces, "a")) == ""


def test_a_preference_between_equal_texts_is_refused(model: EdgeModel) -> None:
    rows = [*PREFERENCE_ROWS, {"prompt": "it was", "chosen": "good", "rejected": " good"}]
    with pytest.raises(
        DataError, match=r"^rows.jsonl:3: 'chosen' and 'rejected' are the same text; a preference needs two, mend or remove the row$"
    ):
        objective_of(model, rows)
