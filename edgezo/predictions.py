"""`edgezo predict -o FILE.jsonl`: the rows as they were read, each with its prediction in a field of its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgezo.errors import ConfigError, DataError
from edgezo.runtime.data import read_rows
from edgezo.runtime.predict import Prediction
from edgezo.storage import write_atomically

FIELD = "prediction"


def rows_to_write(output: Path, data: str | None) -> list[dict[str, Any]]:
    """The fields of all rows, before anything is predicted that could not be written.

    Raises:
        ConfigError: the file cannot be made, or there is no data file.
        DataError: the rows cannot be read, or one has a field of that name.
    """
    if data is None:
        raise ConfigError(f"-o {output}: writes rows with their predictions; give them with --data")
    if output.suffix != ".jsonl":
        raise ConfigError(f"-o {output}: rows are written as .jsonl; name the file so")
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output}: exists already; choose another file or remove it")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}; make it or choose another file")
    rows = read_rows(data)
    for row in rows:
        if FIELD in row.fields:
            raise DataError(f"{row.place}: has a field {FIELD!r}, which -o writes; rename it")
    return [row.fields for row in rows]


def write_predictions(output: Path, rows: Sequence[dict[str, Any]], predictions: Sequence[Prediction]) -> None:
    """One JSON object a line, written whole or not at all; ASCII, since a row may hold half a surrogate pair."""
    lines = [json.dumps({**row, FIELD: prediction.as_dict()}) for row, prediction in zip(rows, predictions, strict=True)]
    write_atomically(output, "".join(f"{line}\n" for line in lines).encode())
