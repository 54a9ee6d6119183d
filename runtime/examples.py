"""Rows to examples: which token sequences are scored, and which of them is right.

A row becomes one or more (prompt, completion) pairs. Where it has candidates (label words, choices, a chosen and a rejected answer) there is
a pair for each; prompt/completion and question/answer rows, chat messages and plain text have one. The loss never covers the prompt.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.config import TuneConfig
from edgezo.errors import DataError
from edgezo.runtime.data import Row
from edgezo.runtime.masked import class_candidates, mask_place, masked_candidates
from edgezo.runtime.scoring import Candidate, Classified, Masked, Pair
from edgezo.runtime.tasks import Task, fill_parts, is_word, label_of, template_fields, text_of
from edgezo.runtime.tasks import fill as fill_template
from edgezo.runtime.text import TextCodec, TextError


class Example(NamedTuple):
    """One row.

    pairs: of its candidates; with calibration as many again, the candidates after the neutral prompt.
    gold: index of the right candidate.
    fields: of the row, for a user's own objective.
    answers: the texts that are right, where an answer is generated.
    reference: log-probabilities of the candidates under the model that a preference is relative to, in nats.
    offset: what is added to the scores of the candidates where a loss is measured, in nats (`Offsets`).
    """

    pairs: Sequence[Candidate]
    gold: int
    fields: Mapping[str, Any] = MappingProxyType({})
    answers: tuple[str, ...] = ()
    reference: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()


class Offsets(NamedTuple):
    """For training rows that an exact start has learned from: their scores by fits that had not seen them, less those by the fit of all.

    With them a loss falls where the start generalises better, not where it knows its own rows still better.

    rows: int64 [n], places among the training examples. values: float32 [n, candidates], in nats.
    """

    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


class Examples(NamedTuple):
    """The examples of one file, and how many rows were cut to fit."""

    examples: list[Example]
    truncated: int


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
        answers = tuple(_answers(row, task.answer_field)) if task.kind == "answer" else ()
        examples.append(Example(kept, gold_of(row, task), row.fields, answers))
        truncated += cut
    return Examples(examples, truncated)


def make_candidates(row: Row, task: Task, text: TextCodec, max_length: int) -> tuple[Sequence[Candidate], bool]:
    """The candidates of one row, and whether they were cut to fit. Classification: one for every label word.

    Raises:
        DataError: the row lacks a field, or its completion does not fit (file and line).
    """
    if task.family != "causal":
        return _encoder_candidates(row, task, text, max_length)
    try:
        pairs = _pairs(row, task, text)
    except TextError as error:
        raise DataError(f"{row.place}: {error}") from None
    longest = max(len(completion) for _, completion in pairs)  # candidates are compared after the same prompt
    longest = max(longest, min(task.room, max_length // 2))  # else a cut prompt would tell the length of the right answer
    kept = [_fit(pair, longest, row, task, text, max_length) for pair in pairs]
    return kept, any(len(new[0]) + len(new[1]) < len(old[0]) + len(old[1]) for new, old in zip(kept, pairs, strict=True))


def make_prompt(row: Row, task: Task, text: TextCodec, max_length: int) -> tuple[list[int], bool]:
    """Token ids of the prompt of a row whose answer is to be generated, so that `task.room` tokens fit after it, and whether it was cut for that.

    Raises:
        DataError: the row lacks a field, or its prompt is empty (file and line).
    """
    try:
        tokens = text.encode(task.prompt(row))
    except TextError as error:
        raise DataError(f"{row.place}: {error}") from None
    if not tokens:
        raise DataError(f"{row.place}: the prompt is empty; give a --template with some text, or rows with a prompt")
    kept = _cut_prompt(tokens, max_length - min(task.room, max_length // 2), text)
    return kept, len(kept) < len(tokens)


def _encoder_candidates(row: Row, task: Task, text: TextCodec, max_length: int) -> tuple[Sequence[Masked] | Sequence[Classified], bool]:
    filled = fill_parts(task.template, row, task.replace, task.family)
    try:
        if task.family == "classifier":
            return class_candidates(filled[0], len(task.words), text, max_length)
        return masked_candidates(filled, task.words, mask_place(task.template), text, max_length)
    except TextError as error:
        raise DataError(f"{row.place}: {error}") from None


def gold_of(row: Row, task: Task) -> int:
    """Index of the right candidate; 0 where there is one only.

    Raises:
        DataError: the row's label or answer is none of the candidates (file and line).
    """
    return {"classification": _gold_label, "choice": _gold_choice}.get(task.kind, _first)(row, task)


def worked_text(row: Row, task: Task) -> str:
    """The prompt of a row and its right candidate or answer, as one text.

    Raises:
        DataError: the row lacks a field, or its label is none of the candidates (file and line).
    """
    prompt = task.prompt(row)
    if task.kind in {"classification", "choice"}:
        return prompt + _spaced(prompt, candidate_texts(row, task)[gold_of(row, task)])
    return prompt + _completions(row, task)[0]


def _pairs(row: Row, task: Task, text: TextCodec) -> list[Pair]:
    if task.kind in {"classification", "choice"}:
        prompts = [task.prompt(row), *([task.prefix + task.calibrate] if task.calibrate is not None else [])]
        if not all(prompt.strip() for prompt in prompts):
            raise DataError(f"{row.place}: the prompt is empty; give a --template with some text, or rows with a prompt")
        return [_scored(prompt, _spaced(prompt, word), row, text) for prompt in prompts for word in candidate_texts(row, task)]
    if task.kind in {"completion", "answer", "preference"}:
        prompt = task.prompt(row)
        return [_completed(prompt, completion, row, task, text) for completion in _completions(row, task)]
    if task.kind == "chat":
        messages = _messages(row)
        opened, whole = text.chat(messages[:-1], reply=True), text.chat(messages)
        if not whole.startswith(opened):
            raise DataError(
                f"{row.place}: the chat template renders the last message apart from its prompt; use prompt and completion instead"
            )
        return [_start(*text.split(opened, whole[len(opened) :], special=False), row, text)]
    tokens = text.encode(text_of(row, "text"))
    return [_start([], tokens, row, text)]


def _scored(prompt: str, word: str, row: Row, text: TextCodec) -> Pair:
    head, tail = text.split(prompt, word)
    if not head:
        raise DataError(
            f"{row.place}: the tokenizer joins the whole prompt with {word.strip()!r}, so that no token stands before it; give a --template with more text"
        )
    return head, tail


def candidate_texts(row: Row, task: Task) -> list[str]:
    """Label words, or the texts of the choices.

    Raises:
        DataError: the row lists no choices (file and line).
    """
    if task.kind == "classification":
        return task.words
    if task.choices:
        return [fill_template(choice, row, task.replace) for choice in task.choices]
    choices = row.fields.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{row.place}: field 'choices' must be a list of at least two texts")
    return choices


def _completions(row: Row, task: Task) -> list[str]:
    """What is learned after the prompt; the first of several right answers."""
    if task.kind == "preference":
        if text_of(row, "chosen").strip() == text_of(row, "rejected").strip():
            raise DataError(f"{row.place}: 'chosen' and 'rejected' are the same text; a preference needs two, mend or remove the row")
        return [_spaced(task.prompt(row), text_of(row, name)) for name in ("chosen", "rejected")]
    if task.kind == "answer":
        return [_spaced(task.prompt(row), _answers(row, task.answer_field)[0])]
    return [text_of(row, "completion")]


def _completed(prompt: str, completion: str, row: Row, task: Task, text: TextCodec) -> Pair:
    """A completion with what ends it: the stop text, or the end-of-text token."""
    head, tail = text.split(prompt, completion + (task.stop or ""))
    return _start(head, tail + ([] if task.stop else text.facts.eos_token_ids[:1]), row, text)


def _answers(row: Row, name: str) -> list[str]:
    """The right answers of a row: one text or a list of them; under text or spans where they stand with their places (SQuAD, DROP)."""
    value = row.fields.get(name)
    if isinstance(value, dict):
        value = value.get("text", value.get("spans"))
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(answer, str | int | float) and str(answer).strip() for answer in found):
        raise DataError(
            f"{row.place}: field {name!r} must be a text or a list of texts, the right answers, none empty; the row has {', '.join(map(repr, row.fields))} (--answer-field names it)"
        )
    return [str(answer) for answer in found]


def _spaced(prompt: str, word: str) -> str:
    """A candidate continues its prompt after one space, unless either has white space there."""
    return word if not prompt or prompt[-1].isspace() or word[:1].isspace() else f" {word}"


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
    if max_length - longest < (2 if _leads(prompt, text) else 1):
        raise DataError(
            f"{row.place}: the completion alone has {longest} tokens, at most {max_length} fit with its prompt; shorten it or raise --max-length"
        )
    return _cut_prompt(prompt, max_length - longest, text), completion


def _cut_prompt(prompt: list[int], most: int, text: TextCodec) -> list[int]:
    """At most so many tokens: the last ones, after a leading special token."""
    special = prompt[:1] if _leads(prompt, text) else []
    return prompt if len(prompt) <= most else special + prompt[len(prompt) - most + len(special) :]


def _leads(prompt: list[int], text: TextCodec) -> bool:
    return prompt[:1] == [text.facts.bos_token_id]


def _first(row: Row, task: Task) -> int:
    return 0


def _gold_label(row: Row, task: Task) -> int:
    label = label_of(row, task.label_field)
    word = task.labels.get(label, label)
    if word in task.words:
        return task.words.index(word)
    known = ", ".join(label if label == word else f"{label}={word}" for label, word in task.labels.items())
    shown = next(iter(task.labels))
    others = [
        name for name in row.fields if name not in {task.label_field, *template_fields(task.template)} and _has_label(row, name, task)
    ]
    elsewhere = f", or take the field that has one: --label-field {others[0]}" if others else ""
    raise DataError(
        f"{row.place}: label {label!r} is not among {known}; mend or remove the row, or give every label a word: --labels {shown}=word,...{elsewhere}"
    )


def _has_label(row: Row, name: str, task: Task) -> bool:
    """Whether a field has a known label; a number may count rows."""
    value = str(row.fields[name]).strip()
    return value in task.labels and (is_word(value) or name == TuneConfig.model_fields["label_field"].default)


def _gold_choice(row: Row, task: Task) -> int:
    """The right choice: its text, or its number from 0."""
    candidates, value = candidate_texts(row, task), row.fields.get(task.answer_field)
    answer = "" if value is None or isinstance(value, bool | list | dict) else str(value).strip()
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(candidates):
        return value  # a number is a place, even where the choices are numbers
    if answer in candidates:
        return candidates.index(answer)
    if answer.isdecimal() and int(answer) < len(candidates):
        return int(answer)
    found = f"is {answer!r}" if answer else "is missing or no text"
    raise DataError(
        f"{row.place}: field {task.answer_field!r} {found}, which is neither one of the {len(candidates)} choices nor a number from 0 to {len(candidates) - 1} (--answer-field names it)"
    )


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        found = f"has {len(messages)}" if isinstance(messages, list) else f"is {type(messages).__name__}"
        raise DataError(f"{row.place}: field 'messages' {found}; it must be a list of at least two messages, the last from the assistant")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            found = ", ".join(map(repr, message)) if isinstance(message, dict) else repr(message)[:40]
            raise DataError(f"{row.place}: every message needs a 'role' and a 'content' of text, one has {found}")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{row.place}: the last message is from {messages[-1]['role']!r}; it must be the assistant's, which is learned")
    return messages
