"""What tests of exact starts share: rows that tell their label, and short runs on them."""

from pathlib import Path
from typing import Any

import pytest

import edgezo
from edgezo.runtime import exact_start

PLACES = ["the film", "a plot", "the end", "a song", "this book", "the cat", "one meal", "my day", "the sea", "a hat", "the plan", "he"]
ROWS = [{"text": f"{place} is {('terrible', 'great')[label]}", "label": label} for place in PLACES for label in (0, 1)]
TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "threads": 1}
FEW: dict[str, Any] = {"steps": 3, "directions": 4, "batch": 2, "schedule": "constant", "eval_every": 2}


def tuned_run(directory: Path, run: Path, rows: str, **settings: Any) -> Any:
    return edgezo.tune(directory, run, data=rows, valid=rows, **{**TASK, **FEW, **settings})


def only(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Exact starts of one kind, whichever promises more."""
    every = exact_start.label_fits
    monkeypatch.setattr(exact_start, "label_fits", lambda *given: (fit for fit in every(*given) if fit.name.startswith(kind)))
