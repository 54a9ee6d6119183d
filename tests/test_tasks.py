"""Rows become tasks as documented: kinds, templates, labels."""

from typing import Any

import pytest
from row_examples import CHAT, WORDS, classified, make_rows, only, refusal, task_of

from edgezo.runtime.examples import make_examples
from edgezo.runtime.tasks import find_task
from edgezo.runtime.text import TextCodec


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"messages": CHAT}, "chat"),
        ({"messages": CHAT, "text": "a"}, "chat"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "completion"),
        ({"text": "a"}, "text"),
        ({"text": "a", "id": 5}, "text"),
    ],
)
def test_the_kind_is_found_from_the_fields(fields: dict[str, Any], kind: str) -> None:
    assert task_of(fields).kind == kind


def test_a_template_makes_it_classification() -> None:
    task = task_of({"text": "a", "label": 0}, template="{text} It was", labels=WORDS)
    assert (task.kind, task.words, task.label_field) == ("classification", ["terrible", "great"], "label")


@pytest.mark.parametrize("fields", [{"sentence": "a"}, {"prompt": "a"}, {"label": 0}])
def test_fields_of_no_kind_are_refused_with_what_is_known(fields: dict[str, Any]) -> None:
    assert refusal(task_of, fields) == (
        f"rows.jsonl:1: fields {', '.join(map(repr, fields))} are neither prompt and completion, prompt and choices, prompt and answer, prompt, chosen and rejected, messages, nor text; "
        "for other names give --template '{field} ...'"
    )


def test_a_row_without_fields_is_told() -> None:
    with_template = refusal(task_of, {}, template="{text} It was", labels=WORDS)
    assert with_template == "--template '{text} It was': field 'text' does not exist; rows.jsonl:1 has none"
    assert (
        refusal(task_of, {})
        == "rows.jsonl:1: a row without fields; give it a prompt and completion, text and label, or the like (docs/data.md)"
    )


@pytest.mark.parametrize(
    ("fields", "longest"), [({"text": "a", "label": 0}, "text"), ({"id": "7", "body": "a film", "label": "good"}, "body")]
)
def test_rows_with_a_label_and_no_template_are_told_of_one(fields: dict[str, Any], longest: str) -> None:
    assert refusal(task_of, fields) == (
        f"rows.jsonl:1: has a 'label', and a label is learned after a prompt; give --template '{{{longest}}} It was' or the like, and --labels where labels are numbers"
    )


@pytest.mark.parametrize("names", [("choice1", "choice2"), ("option_a", "option_b"), ("sol1", "sol2")])
def test_rows_with_a_label_and_choices_are_told_of_both(names: tuple[str, str]) -> None:
    one, two = names
    assert refusal(task_of, {"goal": "open it", one: "a", two: "b", "label": 1}) == (
        f"rows.jsonl:1: has a 'label' and the texts {one} and {two}; to choose between them give --template '{{field}} ...' for what they continue, --choices '{{{one}}}' --choices '{{{two}}}' and --answer-field label; for label words --template and --labels"
    )


def test_two_sentences_with_a_label_are_no_choices() -> None:
    told = refusal(task_of, {"sentence1": "a film", "sentence2": "b", "label": 1})
    assert told.startswith("rows.jsonl:1: has a 'label', and a label is learned after a prompt; give --template '{sentence1} It was'")


def test_labels_without_a_template_are_refused() -> None:
    expected = "--labels needs a --template such as '{text} It was', which the label word continues"
    assert refusal(task_of, {"text": "a", "label": 0}, labels=WORDS) == expected


def test_string_labels_of_the_data_are_their_own_words_in_sorted_order() -> None:
    task = task_of(
        {"text": "a", "label": "travel"}, {"text": "b", "label": " money "}, {"text": "c", "label": "travel"}, template="{text}:"
    )
    assert task.labels == {"money": "money", "travel": "travel"}


@pytest.mark.parametrize("label", [0, "1", -1])
def test_number_labels_without_words_are_refused(label: Any) -> None:
    message = refusal(task_of, {"text": "b", "label": "x"}, {"text": "a", "label": label}, template="{text}:")
    expected = f"label {label} in field 'label' is a number; give the words of the labels with --labels word0,word1,..."
    assert message == f"rows.jsonl:2: {expected}"


@pytest.mark.parametrize("label", ["", " ", None])
@pytest.mark.parametrize("labels", [None, WORDS])
def test_an_empty_label_is_refused_by_its_place(text: TextCodec, label: Any, labels: dict[str, str] | None) -> None:
    def make() -> None:
        rows = make_rows({"text": "a", "label": "great"}, {"text": "b", "label": label})
        make_examples(rows, find_task(rows, "{text}", labels, "label"), text, 128)

    assert refusal(make) == "rows.jsonl:2: field 'label': it is empty; every row needs a label"


def test_a_missing_label_is_refused_at_its_own_row() -> None:
    message = refusal(task_of, {"text": "a", "label": "x"}, {"text": "b", "label": "y"}, {"text": "c"}, template="{text}:")
    assert message.startswith("rows.jsonl:3: ")


def test_a_null_label_is_no_label_word() -> None:
    assert refusal(task_of, {"text": "a", "label": "x"}, {"text": "b", "label": None}, template="{text}:").startswith("rows.jsonl:2: ")


def test_one_label_alone_is_refused() -> None:
    expected = "rows.jsonl:1: one label only (good); classification needs two"
    assert refusal(task_of, {"text": "a", "label": "good"}, template="{text}:") == expected


@pytest.mark.parametrize(
    ("template", "decisive"),
    [
        ("{text", "--template '{text': expected '}' before end of string; write a brace of the text as {{ or }}"),
        ("text}", "--template 'text}': Single '}' encountered in format string; write a brace of the text as {{ or }}"),
        ("It was", "--template 'It was': names no field; write for example '{text} It was'"),
        ("{{text}}", "--template '{{text}}': names no field; write for example '{text} It was'"),
        ("{sentence} It was", "--template '{sentence} It was': field 'sentence' does not exist; rows.jsonl:1 has 'text', 'label'"),
        ("{}", "--template '{}': field '' does not exist; rows.jsonl:1 has 'text', 'label'"),
        ("{text!r}", "--template '{text!r}': field 'text' has a format; fields are put in as they are, write {text}"),
        ("{text:>9}", "--template '{text:>9}': field 'text' has a format; fields are put in as they are, write {text}"),
        ("{text.upper}", "--template '{text.upper}': field 'text.upper' does not exist; rows.jsonl:1 has 'text', 'label'"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, decisive: str) -> None:
    assert refusal(task_of, {"text": "a", "label": 0}, template=template, labels=WORDS) == decisive


def test_a_template_puts_several_fields_and_braces_into_the_prompt(text: TextCodec) -> None:
    example = classified(text, {"text": "a {film}", "n": 5, "label": 0}, "{{{n}}} {text}? {text}!")
    assert text.decode(example.pairs[0][0]) == "{5} a {film}? a {film}!"


def test_a_field_missing_in_a_later_row_is_refused_by_its_place(text: TextCodec) -> None:
    rows = make_rows({"text": "a", "label": 0}, {"sentence": "b", "label": 0})
    message = refusal(make_examples, rows, find_task(rows, "{text}", WORDS, "label"), text, 128)
    assert message == "rows.jsonl:2: field 'text': no such field; every row needs it"


@pytest.mark.parametrize("value", ["", "  \n", None, ["a"], float("nan")])
def test_an_empty_field_is_refused_by_its_place(text: TextCodec, value: Any) -> None:
    expected = "rows.jsonl:1: field 'text': it is empty or no text; every row needs it"
    assert refusal(classified, text, {"text": value, "label": 0}) == expected
    assert refusal(only, text, {"text": value}) == expected


def test_a_field_that_is_a_whole_column_is_told(text: TextCodec) -> None:
    expected = "rows.jsonl:1: field 'text': an object of 2 entries, no text; write a row a line, with a text each"
    assert refusal(only, text, {"text": {"0": "a", "1": "b"}}) == expected


@pytest.mark.parametrize(("label", "gold"), [(0, 0), ("1", 1), (" 1 ", 1), ("great", 1), ("terrible", 0)])
def test_a_label_is_found_by_number_or_word(text: TextCodec, label: Any, gold: int) -> None:
    assert classified(text, {"text": "a", "label": label}).gold == gold


def test_a_mapping_finds_labels_as_written_in_the_data(text: TextCodec) -> None:
    labels = {"neg": "terrible", "pos": "great"}
    assert classified(text, {"text": "a", "label": "pos"}, labels=labels).gold == 1
    assert classified(text, {"text": "a", "label": "neg"}, labels=labels).gold == 0


def test_a_label_that_is_another_label_s_word_keeps_its_own_meaning(text: TextCodec) -> None:
    assert classified(text, {"text": "a", "label": "1"}, labels={"1": "0", "0": "1"}).gold == 0


@pytest.mark.parametrize("label", [2, "Great"])
def test_a_label_outside_the_list_is_refused_by_its_place(text: TextCodec, label: Any) -> None:
    rows = make_rows({"text": "a", "label": 1}, {"text": "b", "label": label})
    message = refusal(make_examples, rows, find_task(rows, "{text}", WORDS, "label"), text, 128)
    shown = str(label)
    assert (
        message
        == f"rows.jsonl:2: label {shown!r} is not among 0=terrible, 1=great; mend or remove the row, or give every label a word: --labels 0=word,..."
    )


def test_a_row_without_the_label_field_is_refused_with_its_fields(text: TextCodec) -> None:
    assert refusal(classified, text, {"text": "a", "gold": 1}) == (
        "rows.jsonl:1: no field 'label'; it has 'text', 'gold' (--label-field names the label's field)"
    )


def test_the_label_field_may_have_another_name(text: TextCodec) -> None:
    rows = make_rows({"text": "a", "sentiment": 1})
    task = find_task(rows, "{text}", WORDS, "sentiment")
    assert make_examples(rows, task, text, 128).examples[0].gold == 1


def test_every_label_word_is_a_candidate_after_a_space(text: TextCodec) -> None:
    example = classified(text, {"text": "the film", "label": 0})
    prompt = text.encode("the film It was")
    assert example.pairs == [(prompt, text.encode(" terrible")), (prompt, text.encode(" great"))]
    assert [len(completion) for _, completion in example.pairs] == [3, 2]


@pytest.mark.parametrize("ending", ["\n", " ", "\t"])
def test_no_space_is_put_after_white_space(text: TextCodec, ending: str) -> None:
    example = classified(text, {"text": "the film", "label": 0}, "{text}" + ending)
    assert [text.decode(prompt + completion) for prompt, completion in example.pairs] == [
        f"the film{ending}terrible",
        f"the film{ending}great",
    ]


@pytest.mark.parametrize(
    ("fields", "template", "told"),
    [
        ({"text": "a film", "label": "good"}, "{text} is {label}", "label"),
        ({"text": "a film", "answer": "good"}, "{text} is {answer}", "answer"),
        ({"text": "a film", "choices": ["good", "bad"], "answer": 0}, "{text} is {answer}", "answer"),
    ],
)
def test_a_template_that_tells_what_is_to_be_found_is_refused(fields: dict[str, Any], template: str, told: str) -> None:
    message = refusal(task_of, fields, {**fields, "label": "bad"} if told == "label" else fields, template=template)
    assert message == f"--template {template!r}: has the field {told!r}, which is what the model is to find; take {{{told}}} out"
