"""Tiny classifiers with a head of their own, and the refusals that they meet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders

NAMES = {0: "bad", 1: "fair", 2: "good"}


def save(folder: Path, name: str = "bert", **more: Any) -> Path:
    """A source with a head of its own, of three classes unless told otherwise."""
    return tiny_encoders.save(folder, name, "SequenceClassification", **(more or {"id2label": NAMES}))


def refusal(kind: type[Exception], call: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message
