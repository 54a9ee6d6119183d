"""Rows from JSONL, JSON, CSV and TSV files, each with its place for error messages."""

import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from edgezo.config import ROW_FORMATS, ROW_SUFFIXES
from edgezo.errors import DataError

LINE_LIMIT = 1 << 24  # characters
WANTED = f"use {ROW_FORMATS}; tune and eval read plain text too, .txt and .md"


class Row(NamedTuple):
    """One example as read: `fields` by name, and `place` as file:line, in an array as file: row."""

    fields: dict[str, Any]
    place: str


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Read a data file; the suffix tells the format (.jsonl, .json with one object a line or an array of them, .csv, .tsv).

    Raises:
        DataError: missing, empty, of another suffix, or a malformed line or row (file and number).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {_no_file(path)}")
    readers = dict(zip(ROW_SUFFIXES, (_read_jsonl, _read_json, _read_table, _read_table), strict=True))
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown data format {path.suffix or '(no suffix)'!r}; {WANTED}")
    try:
        rows = list(reader(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {_first_bad_byte(path)}); save it as UTF-8") from None
    if not rows:
        raise DataError(f"{path}: no rows in it")
    return rows


def _no_file(path: Path) -> str:
    if path.is_dir():
        return f"a folder, not a data file; {WANTED}"
    if path.exists():
        return "a pipe or a device, which is read only once; save the rows in a file"
    return f"no such data file{'' if path.is_absolute() else f' {where(path)}'}; check the path"


def where(path: str | Path) -> str:
    """Where a path is looked for, in words after "not": in the working directory if it is relative."""
    return "there" if Path(path).is_absolute() else f"in {Path.cwd()}"


def _first_bad_byte(path: Path) -> int:
    """Position in the file; the reader's own error counts from its buffer."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        number, blank = 0, 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > LINE_LIMIT:
                raise DataError(f"{place}: line longer than {LINE_LIMIT} characters")
            if not line.strip():
                blank = blank or number
                continue
            if blank:  # at the end there may be some
                raise DataError(f"{path}:{blank}: empty line; remove it")
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", type(error).__name__)
                raise DataError(f"{place}: not a JSON object ({reason}); {_expected(path)}") from None
            if not isinstance(fields, dict):
                raise DataError(f"{place}: a JSON {type(fields).__name__}; {_expected(path)}")
            yield Row(fields, place)


def _expected(path: Path) -> str:
    return f"one object a line{', or an array of objects,' if path.suffix.lower() == '.json' else ''} is expected"


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects, or one object a line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not a JSON array of objects ({error.msg}); mend this line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise DataError(f"{path}: not a JSON array of objects ({type(error).__name__}); give one object a line") from None
    for number, fields in enumerate(found, 1):
        place = f"{path}: row {number}"
        if not isinstance(fields, dict):
            raise DataError(f"{place}: a JSON {type(fields).__name__}; mend or remove it, an object is expected")
        yield Row(fields, place)


def _delimiter(file: TextIO) -> str:
    """The first of comma, semicolon (of spreadsheets where numbers have a decimal comma) and tab that the header has."""
    header = re.sub(r'"[^"]*"', "", file.readline(LINE_LIMIT))  # a name in quotes may hold either
    file.seek(0)
    return next((mark for mark in ",;\t" if mark in header), ",")


def _read_table(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(LINE_LIMIT, sys.maxsize))
    tab = path.suffix.lower() == ".tsv"
    with open(path, encoding="utf-8-sig", newline="") as file:
        # quotes are ordinary characters in the TSV files of the field (GLUE and others)
        reader = (
            csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(file, delimiter=_delimiter(file), strict=True)
        )
        hint = "" if tab else ", a cell that holds the separator stands in double quotes"
        first = 1  # line a row begins at; a quoted cell may hold line breaks
        try:
            header = next(reader, None)
            if header == []:
                raise DataError(f"{path}:1: empty line; remove it")
            if header is None:
                return
            header = [name.strip() for name in header]
            if len(set(header)) != len(header) or not all(header):
                raise DataError(f"{path}:1: the header needs a distinct name for every column, found {header}")
            first = reader.line_num + 1
            blank = 0
            for cells in reader:
                place = f"{path}:{first}"
                if not cells:
                    blank, first = blank or first, reader.line_num + 1
                    continue
                if blank:  # at the end there may be some
                    raise DataError(f"{path}:{blank}: empty line; remove it")
                if len(cells) != len(header):
                    raise DataError(f"{place}: {len(cells)} cells, the header has {len(header)}; mend the row{hint}")
                yield Row(dict(zip(header, cells, strict=True)), place)
                first = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{first}: malformed ({error})") from None
