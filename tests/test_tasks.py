"""Rows become prompts and completions as documented: kinds, templates, labels, seams, chat, truncation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import edgezo
from edgezo.errors import DataError
from edgezo.manifest import TokenizerFacts
from edgezo.runtime.data import Row
from edgezo.runtime.examples import Example, make_examples
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.tasks import Task, find_task
from edgezo.runtime.text import TextCodec

BEGIN, END, IM_START, IM_END = range(4)  # special tokens of tests/tiny.py
WORDS = {"0": "terrible", "1": "great"}


@pytest.fixture(scope="module")
def text(exported_dir: Path) -> TextCodec:
    """The tiny tokenizer, with its chat template."""
    return EdgeModel(exported_dir, threads=1).text


def make_rows(*fields: dict[str, Any]) -> list[Row]:
    """Rows as read from a file called rows.jsonl."""
    return [Row(entry, f"rows.jsonl:{number}") for number, entry in enumerate(fields, 1)]


def task_of(*fields: dict[str, Any], template: str | None = None, labels: dict[str, str] | None = None, label_field: str = "label") -> Task:
    """The task that is found for these rows."""
    return find_task(make_rows(*fields), template, labels, label_field)


def classified(
    text: TextCodec, fields: dict[str, Any], template: str = "{text} It was", labels: dict[str, str] = WORDS, limit: int = 128
) -> Example:
    """One row of classification as an example."""
    rows = make_rows(fields)
    return make_examples(rows, find_task(rows, template, labels, "label"), text, limit).examples[0]


def only(text: TextCodec, fields: dict[str, Any], limit: int = 128) -> tuple[list[int], list[int]]:
    """The one pair of a row without candidates."""
    rows = make_rows(fields)
    (example,) = make_examples(rows, find_task(rows, None, None, "label"), text, limit).examples
    (pair,) = example.pairs
    assert example.gold == 0
    return pair


def refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The message of the DataError that the call raises, which is one line."""
    with pytest.raises(DataError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


CHAT = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "great"}]


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


@pytest.mark.parametrize(
    ("fields", "longest"), [({"text": "a", "label": 0}, "text"), ({"id": "7", "body": "a film", "label": "good"}, "body")]
)
def test_rows_with_a_label_and_no_template_are_told_of_one(fields: dict[str, Any], longest: str) -> None:
    assert refusal(task_of, fields) == (
        f"rows.jsonl:1: has a 'label', and a label is learned after a prompt; give --template '{{{longest}}} It was' or the like, and --labels where labels are numbers"
    )


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


@pytest.mark.parametrize("value", ["", "  \n", None, ["a"], {"a": 1}])
def test_an_empty_field_is_refused_by_its_place(text: TextCodec, value: Any) -> None:
    expected = "rows.jsonl:1: field 'text': it is empty or no text; every row needs it"
    assert refusal(classified, text, {"text": value, "label": 0}) == expected
    assert refusal(only, text, {"text": value}) == expected


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


def test_completion_rows_learn_the_completion_and_the_end_of_text(text: TextCodec) -> None:
    prompt, completion = only(text, {"prompt": "the film is", "completion": " great"})
    assert prompt == text.encode("the film is")
    assert completion == [*text.encode(" great"), END]


@pytest.mark.parametrize("field", ["prompt", "completion"])
@pytest.mark.parametrize("value", ["", " ", None])
def test_an_empty_prompt_or_completion_is_refused(text: TextCodec, field: str, value: Any) -> None:
    row = {"prompt": "a", "completion": "b", field: value}
    assert refusal(only, text, row) == f"rows.jsonl:1: field {field!r}: it is empty or no text; every row needs it"


def test_tokens_that_merge_at_the_seam_are_those_of_running_text(text: TextCodec) -> None:
    whole = text.encode("the film is great")
    assert text.encode("the f") + text.encode("ilm is great") != whole
    prompt, completion = text.split("the f", "ilm is great")
    assert prompt + completion == whole
    assert prompt == text.encode("the")
    assert text.decode(completion) == " film is great"


def test_the_completion_keeps_a_token_when_it_merges_into_the_prompt(text: TextCodec) -> None:
    prompt, completion = text.split("the fil", "m")
    assert prompt + completion == text.encode("the film")
    assert text.decode(completion) == "lm"


def test_a_prompt_that_merges_whole_starts_from_the_beginning_of_text(text: TextCodec) -> None:
    assert text.encode("the") == [264]
    assert only(text, {"prompt": "th", "completion": "e"}) == ([BEGIN], [264, END])


def test_plain_text_learns_every_token_after_the_beginning_of_text(text: TextCodec) -> None:
    assert only(text, {"text": "the film is"}) == ([BEGIN], text.encode("the film is"))


def test_plain_text_with_its_own_beginning_of_text_gets_no_second_one(text: TextCodec) -> None:
    assert only(text, {"text": "<|begin|>the film is"}) == ([BEGIN], text.encode("the film is"))


def without_begin(exported_dir: Path) -> TextCodec:
    """The tiny tokenizer as of a model without a beginning-of-text token."""
    facts = EdgeModel(exported_dir, threads=1).manifest.tokenizer
    return TextCodec(exported_dir, facts.model_copy(update={"bos_token_id": None}))


def test_plain_text_of_a_model_without_beginning_of_text_learns_from_the_second_token(exported_dir: Path) -> None:
    codec = without_begin(exported_dir)
    tokens = codec.encode("the film is")
    assert only(codec, {"text": "the film is"}) == (tokens[:1], tokens[1:])


def test_one_token_of_text_alone_is_refused_without_beginning_of_text(exported_dir: Path) -> None:
    expected = "rows.jsonl:1: nothing to learn, the text or completion is empty"
    assert refusal(only, without_begin(exported_dir), {"text": "the"}) == expected


def test_chat_learns_exactly_the_last_assistant_message_with_its_closing_marker(text: TextCodec) -> None:
    messages = [*CHAT, {"role": "user", "content": "and the plot"}, {"role": "assistant", "content": "terrible"}]
    prompt, completion = only(text, {"messages": messages})
    opened = "<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\ngreat<|im_end|>\n<|im_start|>user\nand the plot<|im_end|>\n"
    assert prompt == text.encode(opened + "<|im_start|>assistant\n", special=False)
    assert completion == text.encode("terrible<|im_end|>\n", special=False)
    assert completion.count(IM_END) == 1


def test_a_chat_may_start_with_a_system_message(text: TextCodec) -> None:
    prompt, _ = only(text, {"messages": [{"role": "system", "content": "user"}, *CHAT]})
    assert prompt[0] == IM_START
    assert text.decode(prompt).startswith("system\nuser\nuser\na film\nassistant")


@pytest.fixture
def opening(exported_dir: Path, tmp_path: Path) -> TextCodec:
    """The tiny tokenizer, made to put the beginning-of-text token before every text by itself, as that of Llama does."""
    tokenizer = Tokenizer.from_file(str(exported_dir / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(exported_dir / "chat_template.jinja", tmp_path)
    return TextCodec(tmp_path, EdgeModel(exported_dir, threads=1).manifest.tokenizer)


def test_a_tokenizer_that_opens_texts_itself_does_so_once(opening: TextCodec) -> None:
    words = opening.encode("the film", special=False)
    assert only(opening, {"text": "the film"}) == ([BEGIN], words)
    assert only(opening, {"prompt": "the film", "completion": " great"})[0] == [BEGIN, *words]
    assert [prompt for prompt, _ in classified(opening, {"text": "the film", "label": 0}, "{text}").pairs] == [[BEGIN, *words]] * 2


def test_a_chat_has_the_special_tokens_of_its_template_alone(opening: TextCodec, text: TextCodec) -> None:
    assert only(opening, {"messages": CHAT}) == only(text, {"messages": CHAT})


def test_a_cut_prompt_keeps_the_token_that_the_tokenizer_put_first(opening: TextCodec) -> None:
    prompt, completion = only(opening, {"prompt": "the film is great and the plot is", "completion": " terrible"})
    assert only(opening, {"prompt": "the film is great and the plot is", "completion": " terrible"}, 8) == (
        [BEGIN, *prompt[-3:]],
        completion,
    )


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


@pytest.mark.parametrize(
    ("messages", "found"), [("text", "is str"), (None, "is NoneType"), ({"role": "user"}, "is dict"), ([], "has 0"), (CHAT[1:], "has 1")]
)
def test_messages_that_are_no_list_of_two_are_refused(text: TextCodec, messages: Any, found: str) -> None:
    expected = f"rows.jsonl:1: field 'messages' {found}; it must be a list of at least two messages, the last from the assistant"
    assert refusal(only, text, {"messages": messages}) == expected


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("text", "'text'"),
        ({"from": "user", "value": "a"}, "'from', 'value'"),
        ({"content": "a"}, "'content'"),
        ({"role": "user", "content": None}, "'role', 'content'"),
        ({"role": 1, "content": "a"}, "'role', 'content'"),
    ],
)
def test_a_message_without_role_or_content_is_refused(text: TextCodec, message: Any, found: str) -> None:
    expected = f"rows.jsonl:1: every message needs a 'role' and a 'content' of text, one has {found}"
    assert refusal(only, text, {"messages": [message, CHAT[1]]}) == expected


def test_a_chat_that_does_not_end_with_the_assistant_is_refused(text: TextCodec) -> None:
    expected = "rows.jsonl:1: the last message is from 'user'; it must be the assistant's, which is learned"
    assert refusal(only, text, {"messages": [*CHAT, CHAT[0]]}) == expected


def codec_with(exported_dir: Path, tmp_path: Path, template: str | None) -> TextCodec:
    """The tiny tokenizer with another chat template."""
    (tmp_path / "tokenizer.json").write_bytes((exported_dir / "tokenizer.json").read_bytes())
    if template is not None:
        (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    return TextCodec(
        tmp_path,
        TokenizerFacts(file="tokenizer.json", bos_token_id=BEGIN, eos_token_ids=[END], chat_template="chat.jinja" if template else None),
    )


def test_a_model_without_chat_template_refuses_messages(exported_dir: Path, tmp_path: Path) -> None:
    expected = "this model has no chat template, so rows of messages cannot be used; use prompt and completion"
    assert refusal(only, codec_with(exported_dir, tmp_path, None), {"messages": CHAT}) == expected


def test_a_template_that_renders_the_answer_apart_from_its_prompt_is_refused(exported_dir: Path, tmp_path: Path) -> None:
    codec = codec_with(exported_dir, tmp_path, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    expected = "rows.jsonl:1: the chat template renders the last message apart from its prompt; use prompt and completion instead"
    assert refusal(only, codec, {"messages": CHAT}) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content.x }}", "no element 9"),
        ("{% for m in messages %}\n{{ m.content", "unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ],
)
def test_a_template_that_fails_is_one_line_with_its_reason_and_place(
    exported_dir: Path, tmp_path: Path, template: str, reason: str
) -> None:
    message = refusal(only, codec_with(exported_dir, tmp_path, template), {"messages": CHAT})
    assert reason in message
    assert "chat template" in message


def test_a_row_that_the_chat_template_refuses_is_named_by_its_place(exported_dir: Path, tmp_path: Path) -> None:
    codec = codec_with(exported_dir, tmp_path, "{{ raise_exception('roles must alternate') }}")
    assert refusal(only, codec, {"messages": CHAT}).startswith("rows.jsonl:1: ")


def test_a_chat_template_cannot_reach_python(exported_dir: Path, tmp_path: Path) -> None:
    codec = codec_with(exported_dir, tmp_path, "{{ messages.__class__.__mro__ }}")
    assert "unsafe" in refusal(only, codec, {"messages": CHAT})


@pytest.mark.parametrize("fields", [{"text": "a \ud800"}, {"prompt": "a", "completion": "\udfff"}])
def test_half_a_surrogate_pair_is_refused_by_its_place(text: TextCodec, fields: dict[str, Any]) -> None:
    escaped = json.loads(json.dumps(fields))  # JSON can hold what UTF-8 cannot
    assert refusal(only, text, escaped).startswith("rows.jsonl:1: ")


def test_a_longer_prompt_loses_its_first_tokens(text: TextCodec) -> None:
    row = {"prompt": "the film is great and the plot is", "completion": " terrible"}
    prompt, completion = only(text, row)
    assert only(text, row, len(prompt) + len(completion)) == (prompt, completion)
    assert only(text, row, len(prompt) + len(completion) - 3) == (prompt[3:], completion)


def test_a_leading_beginning_of_text_token_stays(text: TextCodec) -> None:
    row = {"prompt": "<|begin|>the film is great and the plot is", "completion": " terrible"}
    prompt, completion = only(text, row)
    assert prompt[0] == BEGIN
    assert only(text, row, len(prompt) + len(completion) - 3) == ([BEGIN, *prompt[4:]], completion)


def test_plain_text_loses_its_last_tokens(text: TextCodec) -> None:
    tokens = text.encode("the film is great")
    assert only(text, {"text": "the film is great"}, 4) == ([BEGIN], tokens[:3])


def test_label_words_are_never_cut(text: TextCodec) -> None:
    whole = classified(text, {"text": "the film is great and the plot is terrible", "label": 0})
    cut = classified(text, {"text": "the film is great and the plot is terrible", "label": 0}, limit=9)
    assert [completion for _, completion in cut.pairs] == [completion for _, completion in whole.pairs]
    assert max(len(prompt) + len(completion) for prompt, completion in cut.pairs) == 9


def test_candidates_of_a_cut_row_are_compared_after_the_same_prompt(text: TextCodec) -> None:
    cut = classified(text, {"text": "the film is great and the plot is terrible", "label": 0}, limit=9)
    assert cut.pairs[0][0] == cut.pairs[1][0]


def test_rows_that_were_cut_are_counted(text: TextCodec) -> None:
    rows = make_rows(*({"text": word, "label": 0} for word in ("a", "the film is great and the plot is terrible", "b", "the film " * 9)))
    task = find_task(rows, "{text}", WORDS, "label")
    assert make_examples(rows, task, text, 128).truncated == 0
    assert make_examples(rows, task, text, 8).truncated == 2


def test_a_completion_that_does_not_fit_alone_is_refused(text: TextCodec) -> None:
    rows = make_rows({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " great" * 4})
    message = refusal(make_examples, rows, find_task(rows, None, None, "label"), text, 8)
    assert message == "rows.jsonl:2: the completion alone has 9 tokens, at most 8 fit with its prompt; shorten it or raise --max-length"


def test_a_completion_fits_when_one_token_of_its_prompt_does(text: TextCodec) -> None:
    row = {"prompt": "the film", "completion": " great" * 4}
    prompt, completion = only(text, row)
    assert len(completion) == 9
    assert only(text, row, 10) == (prompt[-1:], completion)


def test_a_completion_that_leaves_room_for_the_beginning_of_text_alone_is_refused(text: TextCodec) -> None:
    row = {"prompt": "<|begin|>the film", "completion": " great" * 4}
    assert refusal(only, text, row, 10).startswith("rows.jsonl:1: the completion alone has 9 tokens, at most 10 fit with its prompt")
    assert only(text, row, 11) == ([BEGIN, text.encode("the film")[-1]], only(text, row)[1])


def test_without_max_length_the_context_of_the_model_is_the_limit(exported_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x" * 130}) + "\n" + json.dumps({"text": "x" * 127}) + "\n", encoding="utf-8")
    found = edgezo.evaluate(exported_dir, path, threads=1)
    assert found.truncated == 1


def test_max_length_above_the_context_changes_nothing(exported_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x" * 130}) + "\n", encoding="utf-8")
    assert edgezo.evaluate(exported_dir, path, threads=1, max_length=1000) == edgezo.evaluate(exported_dir, path, threads=1)
