"""Rows written by hand, and the task or the examples that they become with the tiny tokenizer."""

from collections.abc import Callable
from typing import Any

import pytest

from edgezo.errors import DataError
from edgezo.runtime.data import Row
from edgezo.runtime.examples import Example, make_examples
from edgezo.runtime.tasks import Task, find_task
from edgezo.runtime.text import TextCodec

BEGIN, END, IM_START, IM_END = range(4)  # special tokens of tests/tiny.py
WORDS = {"0": "terrible", "1": "great"}


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
