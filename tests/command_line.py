"""What tests of the commands share: the task they are given, and how their output is read."""

import json
import re
import sys
from pathlib import Path
from typing import Any

TASK = ["--data", "rows.jsonl", "--template", r"{text}\nIt was", "--labels", "terrible,great", "--threads", "1"]
PLAIN = [*TASK, "--start", "none"]
MEASURED = r"accuracy \d+\.\d %, macro F1 \d\.\d{3}, loss \d+\.\d{4} \(16 rows\)"
PEAK = "" if sys.platform == "win32" else r", peak memory [1-9]\d+ MB"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def matches(pattern: str, text: str) -> None:
    """Assert that the whole text is what the pattern says."""
    assert re.fullmatch(pattern, text), text


def one_object(text: str) -> dict[str, Any]:
    """The JSON object that is all of standard output, on one line."""
    assert text.count("\n") == 1
    assert text.endswith("\n")
    found: dict[str, Any] = json.loads(text)
    return found
