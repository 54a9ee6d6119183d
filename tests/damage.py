"""Damage an edge model's manifest, and the refusal that it meets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgezo.errors import EdgeModelError
from edgezo.runtime.model import EdgeModel

Raw = dict[str, Any]


def refusal(directory: Path) -> str:
    """The message with which an edge model is refused: one line that begins with the place."""
    with pytest.raises(EdgeModelError) as caught:
        EdgeModel(directory, threads=1)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert len(message.splitlines()) == 1
    return message.removeprefix(str(directory))


def edit(directory: Path, change: Callable[[Raw], object]) -> None:
    """Change manifest.json as JSON."""
    path = directory / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")
