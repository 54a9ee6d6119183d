"""Rows to examples: what is scored, and which of it is right.

A row becomes one or more (prompt, completion) pairs. Classification has a pair for every label word and learns the right one by
cross-entropy over the candidates' log-probabilities; prompt/completion rows, chat messages and plain text have one pair and learn
its tokens. The loss never covers the prompt.
"""

import string
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from edgezo.errors import DataError
from edgezo.runtime.data import Row
from edgezo.runtime.scoring import Pair
from edgezo.runtime.text import TextCodec, TextError

Kind = Literal["classification", "completion", "chat", "text"]


class Example(NamedTuple):
    """Candidates of one row; `gold` is the index of the right one."""

    pairs: list[Pair]
    gold: int


class Task(NamedTuple):
    """How rows are read. `labels` maps the label as written in the data to its label word; empty unless classification."""

    kind: Kind
    template: str = ""
    labels: Mapping[str, str] = MappingProxyType({})
    label_field: str = "label"

    @property
    def words(self) -> list[str]:
        """The label words, in order of the label."""
        return list(self.labels.values())


class Examples(NamedTuple):
    """The examples of one file, and how many rows were cut to fit."""

    examples: list[Example]
    truncated: int


def find_task(rows: Sequence[Row], template: str | None, labels: dict[str, str] | None, label_field: str) -> Task:
    """Tell the kind of data from the options and the first row's fields.

    Args:
        rows: of the training file; when `labels` is None its label strings are the label words.
        template: such as '{sentence} It was', or None.
        labels: label as written in the data to label word.

    Raises:
        DataError: the fields fit no kind, or the template names a field that does not exist.
    """
    first = rows[0]
    if template is not None:
        _check_template(template, first)
        labels = labels or {word: word for word in sorted({_label_word(row, label_field) for row in rows})}
        if len(labels) < 2:
            raise DataError(f"{first.place}: one label only ({', '.join(labels)}); classification needs two")
        return Task("classification", template, labels, label_field)
    if labels is not None:
        raise DataError("--labels needs a --template such as '{text} It was', which the label word continues")
    if "messages" in first.fields:
        return Task("chat")
    if "prompt" in first.fields and "completion" in first.fields:
        return Task("completion")
    if "text" in first.fields and label_field not in first.fields:
        return Task("text")
    raise DataError(
        f"{first.place}: fields {', '.join(map(repr, first.fields))} are neither prompt and completion, messages, nor text; for classification give --template '{{field}} ...' and --labels"
    )


def _label_word(row: Row, label_field: str) -> str:
    """The label of a row as a word of its own, where no --labels say otherwise."""
    label = _label(row, label_field)
    if label.lstrip("-").isdigit():
        raise DataError(
            f"{row.place}: label {label} in field {label_field!r} is a number; give the words of the labels with --labels word0,word1,..."
        )
    return label


def make_examples(rows: Sequence[Row], task: Task, text: TextCodec, max_length: int) -> Examples:
    """Tokenise rows.

    Args:
        max_length: tokens of prompt and completion together. A longer prompt loses its first tokens (a leading special token stays), a
            longer plain text its last; a label or completion is never cut.

    Raises:
        DataError: a row lacks a field, has a label outside the list, or a completion that does not fit (file and line).
    """
    examples, truncated = [], 0
    for row in rows:
        kept, cut = make_candidates(row, task, text, max_length)
        examples.append(Example(kept, _gold(row, task) if task.kind == "classification" else 0))
        truncated += cut
    return Examples(examples, truncated)


def make_candidates(row: Row, task: Task, text: TextCodec, max_length: int) -> tuple[list[Pair], bool]:
    """The (prompt, completion) pairs of one row, and whether they were cut to fit. Classification: one for every label word.

    Raises:
        DataError: the row lacks a field, or its completion does not fit (file and line).
    """
    try:
        pairs = _pairs(row, task, text)
    except TextError as error:
        raise DataError(f"{row.place}: {error}") from None
    longest = max(len(completion) for _, completion in pairs)  # candidates are compared after the same prompt
    kept = [_fit(pair, longest, row, task, text, max_length) for pair in pairs]
    return kept, any(len(new[0]) + len(new[1]) < len(old[0]) + len(old[1]) for new, old in zip(kept, pairs, strict=True))


def template_fields(template: str) -> list[str]:
    """The names of the fields in a template, each once."""
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))


def _pairs(row: Row, task: Task, text: TextCodec) -> list[Pair]:
    if task.kind == "classification":
        prompt = _fill(task.template, row)
        gap = "" if not prompt or prompt[-1].isspace() else " "
        return [text.split(prompt, gap + word) for word in task.words]
    if task.kind == "completion":
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        head, tail = text.split(prompt, completion)
        return [_start(head, tail + text.facts.eos_token_ids[:1], row, text)]
    if task.kind == "chat":
        messages = _messages(row)
        opened, whole = text.chat(messages[:-1], reply=True), text.chat(messages)
        if not whole.startswith(opened):
            raise DataError(
                f"{row.place}: the chat template renders the last message apart from its prompt; use prompt and completion instead"
            )
        return [_start(*text.split(opened, whole[len(opened) :], special=False), row, text)]
    tokens = text.encode(_string(row, "text"))
    return [_start([], tokens, row, text)]


def _start(prompt: list[int], completion: list[int], row: Row, text: TextCodec) -> Pair:
    """Every scored token needs one before it: an empty prompt becomes the beginning-of-text token or, without one, the first token."""
    if not prompt:
        if text.facts.bos_token_id is not None and completion[:1] != [text.facts.bos_token_id]:
            prompt = [text.facts.bos_token_id]
        else:
            prompt, completion = completion[:1], completion[1:]
    if not completion:
        raise DataError(f"{row.place}: nothing to learn, the text or completion is empty")
    return prompt, completion


def _fit(pair: Pair, longest: int, row: Row, task: Task, text: TextCodec, max_length: int) -> Pair:
    """Cut the prompt (of a plain text its end) so that it and `longest` completion tokens have `max_length` at most."""
    prompt, completion = pair
    if len(prompt) + longest <= max_length:
        return pair
    if task.kind == "text":
        return prompt, completion[: max_length - len(prompt)]
    special = prompt[:1] if prompt[:1] == [text.facts.bos_token_id] else []
    room = max_length - longest - len(special)
    if room < 1:
        raise DataError(
            f"{row.place}: the completion alone has {longest} tokens, at most {max_length} fit with its prompt; shorten it or raise --max-length"
        )
    return special + prompt[-room:], completion


def _gold(row: Row, task: Task) -> int:
    label = _label(row, task.label_field)
    if label in task.labels:
        return list(task.labels).index(label)
    if label in task.words:
        return task.words.index(label)
    raise DataError(f"{row.place}: label {label!r} is not in the list {', '.join(task.labels)}; add it with --labels or mend the row")


def _label(row: Row, label_field: str) -> str:
    """The label as written in the data."""
    if label_field not in row.fields:
        raise DataError(
            f"{row.place}: no field {label_field!r}; it has {', '.join(map(repr, row.fields))} (--label-field names the label's field)"
        )
    value = row.fields[label_field]
    label = "" if value is None else str(value).strip()
    if not label:
        raise DataError(f"{row.place}: field {label_field!r}: it is empty; every row needs a label")
    return label


def _check_template(template: str, first: Row) -> None:
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"--template {template!r}: {error}; write a brace of the text as {{{{ or }}}}") from None
    if not fields:
        raise DataError(f"--template {template!r}: names no field; write for example '{{{next(iter(first.fields), 'text')}}} It was'")
    for name, spec, conversion in fields:
        if spec or conversion:
            raise DataError(f"--template {template!r}: field {name!r} has a format; fields are put in as they are, write {{{name}}}")
        if name not in first.fields:
            raise DataError(
                f"--template {template!r}: field {name!r} does not exist; {first.place} has {', '.join(map(repr, first.fields))}"
            )


def _fill(template: str, row: Row) -> str:
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(_string(row, name))
    return "".join(parts)


def _string(row: Row, name: str) -> str:
    value: Any = row.fields.get(name)
    if value is None or isinstance(value, dict | list) or not str(value).strip():
        found = "no such field" if name not in row.fields else "it is empty or no text"
        raise DataError(f"{row.place}: field {name!r}: {found}; every row needs it")
    return str(value)


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{row.place}: field 'messages' must be a list of at least two messages, the last from the assistant")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"{row.place}: every message needs a 'role' and a 'content' of text")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{row.place}: the last message is from {messages[-1]['role']!r}; it must be the assistant's, which is learned")
    return messages
