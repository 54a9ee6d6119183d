"""Rows come out of JSONL, CSV and TSV files as they were written, or one line says what is wrong and where."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgezo.errors import DataError
from edgezo.runtime import data
from edgezo.runtime.data import Row, read_rows

Write = Callable[[str, bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of these bytes; returns its path."""

    def to(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return to


def fields(path: Path) -> list[dict[str, Any]]:
    """The fields of all rows."""
    return [row.fields for row in read_rows(path)]


def lines(path: Path) -> list[int]:
    """The line numbers of all rows; each place starts with the path as given."""
    places = [row.place for row in read_rows(path)]
    assert all(place.startswith(f"{path}:") for place in places)
    return [int(place.removeprefix(f"{path}:")) for place in places]


def refusal(path: Path) -> str:
    """The message of the error, which is one line."""
    with pytest.raises(DataError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def test_jsonl_rows_keep_types_and_order(write: Write) -> None:
    path = write("rows.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": 0.5, "more": [null, true]}\n')
    assert fields(path) == [{"text": "a", "label": 1}, {"text": "b", "label": 0.5, "more": [None, True]}]
    assert lines(path) == [1, 2]


def test_a_json_suffix_means_one_object_a_line_too(write: Write) -> None:
    assert fields(write("rows.json", b'{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("content", [b'[{"a": 1}, {"a": 2}]', b'\xef\xbb\xbf \n[\n  {"a": 1},\n  {"a": 2}\n]\n'])
def test_a_json_file_may_be_an_array_of_objects(write: Write, content: bytes) -> None:
    path = write("rows.json", content)
    assert read_rows(path) == [Row({"a": 1}, f"{path}: row 1"), Row({"a": 2}, f"{path}: row 2")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[]", ": no rows in it"),
        (b'[{"a": 1},\n {"a": 2]', ":2: not a JSON array of objects (Expecting ',' delimiter); mend this line"),
        (b'[{"a": 1}, "b"]', ": row 2: a JSON str; mend or remove it, an object is expected"),
        (b'[{"a": 1}]\n[{"a": 2}]', ":2: not a JSON array of objects (Extra data); mend this line"),
        (b"[" * 100_000, ": not a JSON array of objects (RecursionError); give one object a line"),
        (b'[{"a":\n%s}]' % (b"1" * 5000), ": not a JSON array of objects (ValueError); give one object a line"),
        (
            b'{\n  "a": 1\n}',
            ":1: not a JSON object (Expecting property name enclosed in double quotes); one object a line, or an array of objects, is expected",
        ),
    ],
)
def test_an_array_that_is_not_one_of_objects_is_refused(write: Write, content: bytes, told: str) -> None:
    path = write("rows.json", content)
    assert refusal(path) == f"{path}{told}"


def test_the_suffix_may_be_in_capitals(write: Write) -> None:
    assert fields(write("ROWS.JSONL", b'{"a": 1}\n')) == [{"a": 1}]
    assert fields(write("ROWS.TSV", b'a\n"x\n')) == [{"a": '"x'}]


def test_a_last_line_without_a_line_break_is_a_row(write: Write) -> None:
    assert fields(write("rows.jsonl", b'{"a": 1}\n{"a": 2}')) == [{"a": 1}, {"a": 2}]
    assert fields(write("rows.csv", b"a,b\n1,2")) == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize(("name", "content"), [("r.jsonl", '{"é": "€ 😀"}\n'), ("r.csv", "é\n€ 😀\n"), ("r.tsv", "é\n€ 😀\n")])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_unicode_is_read_with_and_without_byte_order_mark(write: Write, name: str, content: str, mark: str) -> None:
    assert fields(write(name, (mark + content).encode())) == [{"é": "€ 😀"}]


@pytest.mark.parametrize(
    ("name", "content"), [("r.jsonl", b'{"a": "1"}\r\n{"a": "2"}\r\n'), ("r.csv", b"a\r\n1\r\n2\r\n"), ("r.tsv", b"a\r\n1\r\n2\r\n")]
)
def test_windows_line_ends_are_no_part_of_a_row(write: Write, name: str, content: bytes) -> None:
    assert fields(write(name, content)) == [{"a": "1"}, {"a": "2"}]


def test_unicode_line_separators_do_not_end_a_jsonl_line(write: Write) -> None:
    path = write("rows.jsonl", '{"a": "x\u2028y\u0085z"}\n{"a": "w"}\n'.encode())
    assert fields(path) == [{"a": "x\u2028y\u0085z"}, {"a": "w"}]
    assert lines(path) == [1, 2]


def test_csv_cells_hold_commas_quotes_and_line_breaks(write: Write) -> None:
    path = write("rows.csv", b'text,label\n"said ""no"", twice","1"\n"one\ntwo\n\nfour",0\n')
    assert fields(path) == [{"text": 'said "no", twice', "label": "1"}, {"text": "one\ntwo\n\nfour", "label": "0"}]


def test_csv_cells_keep_the_kind_of_their_line_breaks(write: Write) -> None:
    assert fields(write("rows.csv", b'a,b\r\n"one\r\ntwo\nthree",1\r\n')) == [{"a": "one\r\ntwo\nthree", "b": "1"}]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_of_spreadsheets_with_semicolons(write: Write, mark: bytes) -> None:
    assert fields(write("rows.csv", mark + b'a;"b c"\n1,5;"x;y"\n')) == [{"a": "1,5", "b c": "x;y"}]
    assert fields(write("rows.csv", mark + b"a;b,c\n1,2\n")) == [{"a;b": "1", "c": "2"}]
    assert fields(write("rows.csv", mark + b'"text, long";label\na;b\n')) == [{"text, long": "a", "label": "b"}]
    assert fields(write("rows.csv", mark + b'"a;b"\n1\n')) == [{"a;b": "1"}]


def test_csv_with_tabs(write: Write) -> None:
    assert fields(write("rows.csv", b'a\tb\n1, 2\t"x\ty"\n')) == [{"a": "1, 2", "b": "x\ty"}]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_no_data_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    told = "a pipe or a device, which is read only once; save the rows in a file"
    assert refusal(tmp_path / "rows.jsonl") == f"{tmp_path / 'rows.jsonl'}: {told}"


def test_csv_header_names_may_be_quoted(write: Write) -> None:
    assert fields(write("rows.csv", b'"a, b","c"\n1,2\n')) == [{"a, b": "1", "c": "2"}]


def test_csv_cells_may_be_empty(write: Write) -> None:
    assert fields(write("rows.csv", b'a,b\n,\n"",x\n')) == [{"a": "", "b": ""}, {"a": "", "b": "x"}]


def test_csv_places_count_lines_of_the_file_not_rows(write: Write) -> None:
    path = write("rows.csv", b'a,b\n1,2\n"x\ny\nz",3\n4,5\n')
    found = lines(path)
    assert (found[0], found[2]) == (2, 6)
    assert 3 <= found[1] <= 5


def test_a_csv_error_after_a_cell_of_several_lines_names_the_right_line(write: Write) -> None:
    path = write("rows.csv", b'a,b\n1,"x\ny"\n2,3\n4\n')
    assert refusal(path) == f"{path}:5: 1 cells, the header has 2; mend the row, a cell that holds the separator stands in double quotes"


def test_tsv_quotes_are_ordinary_characters(write: Write) -> None:
    path = write("rows.tsv", b'text\tlabel\n"an open quote\t1\nit\'s "so" so"\t0\n""\t2\n')
    assert fields(path) == [
        {"text": '"an open quote', "label": "1"},
        {"text": 'it\'s "so" so"', "label": "0"},
        {"text": '""', "label": "2"},
    ]
    assert lines(path) == [2, 3, 4]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: no such data file; check the path"


def test_a_directory_is_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    assert (
        refusal(tmp_path / "rows.jsonl")
        == f"{tmp_path / 'rows.jsonl'}: a folder, not a data file; use .jsonl, .json, .csv or .tsv; tune and eval read plain text too, .txt and .md"
    )


@pytest.mark.parametrize(("name", "shown"), [("rows.parquet", "'.parquet'"), ("rows", "'(no suffix)'")])
def test_an_unknown_suffix_is_refused_with_the_known_ones(write: Write, name: str, shown: str) -> None:
    path = write(name, b"x")
    assert (
        refusal(path)
        == f"{path}: unknown data format {shown}; use .jsonl, .json, .csv or .tsv; tune and eval read plain text too, .txt and .md"
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(write: Write, name: str, content: bytes) -> None:
    path = write(name, content)
    assert refusal(path) == f"{path}: no rows in it"


@pytest.mark.parametrize(("name", "content"), [("rows.csv", b"a,b\n"), ("rows.tsv", b"a\tb")])
def test_a_header_without_rows_is_refused(write: Write, name: str, content: bytes) -> None:
    path = write(name, content)
    assert refusal(path) == f"{path}: no rows in it"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.jsonl", b'{"a": 1}\n\n{"a": 2}\n', 2),
        ("rows.jsonl", b'{"a": 1}\n   \n\n{"a": 2}\n\n', 2),
        ("rows.csv", b"a,b\n1,2\n\n3,4\n", 3),
        ("rows.csv", b"a\n\n1\n", 2),
        ("rows.tsv", b"a\tb\n1\t2\n\n3\t4\n", 3),
        ("rows.csv", b"\na,b\n1,2\n", 1),
    ],
)
def test_an_empty_line_is_refused_by_its_number(write: Write, name: str, content: bytes, line: int) -> None:
    path = write(name, content)
    assert refusal(path) == f"{path}:{line}: empty line; remove it"


@pytest.mark.parametrize(
    ("name", "content"), [("rows.jsonl", b'{"a": "1"}\n\n  \n'), ("rows.csv", b"a\n1\n\n\n"), ("rows.tsv", b"a\n1\n\n")]
)
def test_empty_lines_at_the_end_are_passed_over(write: Write, name: str, content: bytes) -> None:
    path = write(name, content)
    assert read_rows(path) == [Row({"a": "1"}, f"{path}:{1 if name == 'rows.jsonl' else 2}")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "Expecting value"),
        (b'{"a": 1} {"a": 2}', "Extra data"),
        (b"{'a': 1}", "Expecting property name enclosed in double quotes"),
        (b"text", "Expecting value"),
        (b'{"a": "\x01"}', "Invalid control character at"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"a": ' + b"9" * 5000 + b"}", "ValueError"),
    ],
)
def test_malformed_json_is_refused_with_its_line_and_reason(write: Write, line: bytes, reason: str) -> None:
    path = write("rows.jsonl", b'{"a": 1}\n' + line + b"\n")
    assert refusal(path) == f"{path}:2: not a JSON object ({reason}); one object a line is expected"


@pytest.mark.parametrize(("line", "kind"), [(b'["a", "b"]', "list"), (b'"text"', "str"), (b"5", "int")])
def test_a_json_line_that_is_no_object_is_refused(write: Write, line: bytes, kind: str) -> None:
    path = write("rows.jsonl", line + b"\n")
    assert refusal(path) == f"{path}:1: a JSON {kind}; one object a line is expected"


@pytest.mark.parametrize(
    ("name", "row", "cells"), [("rows.csv", b"1", 1), ("rows.csv", b"1,2,3", 3), ("rows.csv", b"1,2,", 3), ("rows.tsv", b"1", 1)]
)
def test_a_ragged_row_is_refused_by_its_number(write: Write, name: str, row: bytes, cells: int) -> None:
    header = b"a\tb\n1\t2\n" if name.endswith(".tsv") else b"a,b\n1,2\n"
    path = write(name, header + row + b"\n")
    hint = ", a cell that holds the separator stands in double quotes" if name.endswith(".csv") else ""
    assert refusal(path) == f"{path}:3: {cells} cells, the header has 2; mend the row{hint}"


@pytest.mark.parametrize(
    ("header", "shown"), [(b"a,b,a", "['a', 'b', 'a']"), (b"a,", "['a', '']"), (b"a, ", "['a', '']"), (b"a, a ", "['a', 'a']")]
)
def test_a_header_with_equal_or_empty_names_is_refused(write: Write, header: bytes, shown: str) -> None:
    path = write("rows.csv", header + b"\n1,2,3\n")
    assert refusal(path) == f"{path}:1: the header needs a distinct name for every column, found {shown}"


def test_names_of_a_header_are_without_white_space_around_them(write: Write) -> None:
    assert [row.fields for row in read_rows(write("rows.csv", b" a; b\n 1 ;2\n"))] == [{"a": " 1 ", "b": "2"}]


def test_text_behind_a_closing_quote_is_refused(write: Write) -> None:
    path = write("rows.csv", b'a,b\n1,2\n"x"y,3\n')
    assert refusal(path) == f"{path}:3: malformed (',' expected after '\"')"


def test_a_quote_that_is_never_closed_is_refused_at_the_row_that_opens_it(write: Write) -> None:
    path = write("rows.csv", b'a,b\n1,2\n"x,3\n' + b"4,5\n" * 100)
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert "unexpected end of data" in message


@pytest.mark.parametrize(("name", "start"), [("rows.jsonl", b'{"a": "'), ("rows.csv", b"a\n"), ("rows.tsv", b"a\n")])
def test_text_that_is_not_utf8_is_refused(write: Write, name: str, start: bytes) -> None:
    path = write(name, start + "é".encode("latin-1") + b'"}\n')
    message = refusal(path)
    assert message.startswith(f"{path}: not UTF-8 text (")
    assert message.endswith("; save it as UTF-8")


def test_utf16_is_refused(write: Write) -> None:
    path = write("rows.jsonl", '{"a": 1}\n'.encode("utf-16"))
    assert refusal(path) == f"{path}: not UTF-8 text (invalid start byte at byte 0); save it as UTF-8"


def test_the_byte_that_is_not_utf8_is_counted_from_the_start_of_the_file(write: Write) -> None:
    content = b'{"a": "some text"}\n' * 2000
    path = write("rows.jsonl", content + b"\xff\n")
    assert f"at byte {len(content)})" in refusal(path)


def test_a_line_at_the_limit_is_read_and_a_longer_one_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LINE_LIMIT", 20)
    assert fields(write("fits.jsonl", b'{"a": 1}\n{"a": "%s"}\n' % (b"x" * 10))) == [{"a": 1}, {"a": "x" * 10}]
    path = write("long.jsonl", b'{"a": 1}\n{"a": "%s"}\n' % (b"x" * 12))
    assert refusal(path) == f"{path}:2: line longer than 20 characters"


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_table_cell_longer_than_the_limit_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(data, "LINE_LIMIT", 20)
    path = write(name, b"a\n" + b"x" * 20 + b"\n" + b"x" * 21 + b"\n")
    assert refusal(path) == f"{path}:3: malformed (field larger than field limit (20))"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.text('{}[]":,\n\r\t a1\\\0é', max_size=80).map(str.encode)))
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_any_bytes_are_read_or_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    try:
        rows = read_rows(path)
    except DataError as error:
        assert str(error).startswith(str(path))
    else:
        assert rows
        assert all(isinstance(row.fields, dict) for row in rows)
