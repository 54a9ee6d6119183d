"""Rows become prompts and completions as documented: seams, the beginning of text, chat, truncation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from row_examples import BEGIN, CHAT, END, IM_END, IM_START, WORDS, classified, make_rows, only, refusal
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import edgezo
from edgezo.manifest import TokenizerFacts
from edgezo.runtime.examples import make_examples
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.tasks import find_task
from edgezo.runtime.text import TextCodec


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


def test_a_prompt_is_encoded_once_for_all_its_candidates(exported_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, alone = EdgeModel(exported_dir, threads=1).text, EdgeModel(exported_dir, threads=1).text
    asked, encode = list[str](), text.encode
    monkeypatch.setattr(text, "encode", lambda given, special=True: (asked.append(given), encode(given, special))[1])
    places = [("the f", "ilm", True), ("the f", "ilm is great", True), ("the f", "ilm", False), ("the plot", " is", False)]
    found = [text.split(*place) for place in places]
    assert asked == ["the f", "the film", "the film is great", "the f", "the film", "the plot", "the plot is"]
    alone_each = []
    for place in reversed(places):
        alone.split("another prompt", "")
        alone_each.append(alone.split(*place))
    assert found == alone_each[::-1]


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
