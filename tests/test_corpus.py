"""Plain text: which files are read, how they are cut into rows, and what a run remembers of them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command

import edgezo
from edgezo.config import make_config
from edgezo.errors import DataError, RunError
from edgezo.runtime.check import check_run
from edgezo.runtime.corpus import WARNING, pack, read_data, sha256_data
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.examples import Example
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.run import read_run
from edgezo.runtime.tuned import write_tuned
from edgezo.storage import sha256_file

END = [1]  # of the tiny models
NOTES = {
    "b.md": "# Tuesday\n\nThe film is great and the plot is terrible.\n",
    "a.txt": "What is the capital of France? The capital is Paris.\n",
    "deep/er/c.MD": "It was a long film.",
}
SETTINGS: dict[str, Any] = {"batch": 2, "max_length": 12, "eval_every": 1, "threads": 1}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A folder of three documents."""
    for name, text in NOTES.items():
        put(tmp_path / "notes" / name, text)
    return tmp_path / "notes"


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def flat(examples: list[Example]) -> list[list[int]]:
    """The tokens of every row, prompt and completion."""
    return [[*example.pairs[0][0], *example.pairs[0][1]] for example in examples]


def joined(model: EdgeModel, *texts: str) -> list[int]:
    """Tokens of documents with the end-of-text token between them."""
    tokens = model.text.encode(texts[0])
    for text in texts[1:]:
        tokens += END + model.text.encode(text)
    return tokens


def refusal(call: Callable[[], Any]) -> str:
    """The text of the error, which is one line."""
    with pytest.raises(DataError) as caught:
        call()
    assert str(caught.value).splitlines() == [str(caught.value)]
    return str(caught.value)


# files


def test_a_folder_is_read_in_the_order_of_its_relative_paths(notes: Path) -> None:
    rows = read_data(notes)
    assert [row.place for row in rows] == [str(notes / name) for name in ("a.txt", "b.md", "deep/er/c.MD")]
    assert [row.fields for row in rows] == [{"text": NOTES[name]} for name in ("a.txt", "b.md", "deep/er/c.MD")]


def test_other_hidden_and_empty_files_are_left_out(notes: Path) -> None:
    expected = read_data(notes)
    for name in (".hidden.md", ".folder/in.md", "deep/.git/in.txt", "rows.jsonl", "page.html", "README", "md"):
        put(notes / name, "not to be read")
    put(notes / "blank.md", " \n\n")
    assert read_data(notes) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="making links needs a privilege")
def test_links_are_left_out_but_the_folder_given_may_be_one(notes: Path, tmp_path: Path) -> None:
    outside = put(tmp_path / "outside" / "secret.md", "not to be read")
    (notes / "link.md").symlink_to(outside)
    (notes / "linked").symlink_to(outside.parent, target_is_directory=True)
    (notes / "loop").symlink_to(notes, target_is_directory=True)
    (tmp_path / "diary").symlink_to(notes, target_is_directory=True)
    texts = [NOTES[name] for name in sorted(NOTES)]
    assert [row.fields["text"] for row in read_data(notes)] == texts
    assert [row.fields["text"] for row in read_data(tmp_path / "diary")] == texts
    assert sha256_data(tmp_path / "diary") == sha256_data(notes)


def test_line_ends_and_a_byte_order_mark_are_no_text(tmp_path: Path) -> None:
    path = put(tmp_path / "one.md", "\ufeffa\r\nb\rc\n")
    assert [row.fields["text"] for row in read_data(path)] == ["a\nb\nc\n"]


def test_what_holds_no_text_is_refused(tmp_path: Path, notes: Path) -> None:
    empty, blank = tmp_path / "empty", put(tmp_path / "blank" / "a.md", "\n").parent
    empty.mkdir()
    assert refusal(lambda: read_data(empty)) == (
        f"{empty}: no .txt or .md file in this folder; put plain text into it, or give rows in a .jsonl, .json, .csv or .tsv file"
    )
    assert refusal(lambda: read_data(blank)) == f"{blank}: no text in its .txt and .md files, 1 in all"
    assert refusal(lambda: read_data(blank / "a.md")) == f"{blank / 'a.md'}: no text in it"
    (notes / "b.md").write_bytes(b"caf\xe9 au lait")
    assert refusal(lambda: read_data(notes)) == (
        f"{notes / 'b.md'}: not UTF-8 text (invalid continuation byte at byte 3); save it as UTF-8"
    )
    missing = tmp_path / "missing.md"
    assert refusal(lambda: read_data(missing)) == f"{missing}: no such data file; check the path"


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="this user may read everything")
def test_a_folder_that_cannot_be_read_is_refused(notes: Path) -> None:
    (notes / "deep").chmod(0)
    try:
        message = refusal(lambda: read_data(notes))
    finally:
        (notes / "deep").chmod(0o755)
    assert message == f"{notes / 'deep'}: cannot be read (Permission denied); make it readable or take it out of the data"


# packing


@pytest.mark.parametrize("length", [2, 3, 7, 12, 64])
def test_rows_are_the_joined_documents_cut(model: EdgeModel, notes: Path, length: int) -> None:
    whole = joined(model, *(NOTES[name] for name in ("a.txt", "b.md", "deep/er/c.MD")))
    packed = pack(read_data(notes), model.text, length, model.context)
    rows = flat(packed.examples)
    kept = whole[:-1] if len(whole) % length == 1 else whole
    assert [token for row in rows for token in row] == kept
    assert {len(row) for row in rows[:-1]} <= {length}
    assert 2 <= len(rows[-1]) <= length
    assert all(len(example.pairs[0][0]) == 1 for example in packed.examples)
    assert (packed.files, packed.tokens) == (3, len(whole))


def test_a_last_row_of_one_token_is_dropped(model: EdgeModel, tmp_path: Path) -> None:
    path = put(tmp_path / "one.txt", "abcdefg")
    tokens = model.text.encode("abcdefg")
    assert flat(pack(read_data(path), model.text, len(tokens) - 1, model.context).examples) == [tokens[:-1]]
    assert flat(pack(read_data(path), model.text, len(tokens) - 2, model.context).examples) == [tokens[:-2], tokens[-2:]]


@pytest.mark.parametrize(
    ("tokens", "context", "directions", "length"),
    [(10_000, 8192, 1, 256), (10_000, 128, 1, 128), (1000, 8192, 16, 62), (100, 8192, 16, 16), (100, 8192, 1, 100), (9, 8192, 16, 9)],
)
def test_without_max_length_rows_are_short_enough_for_every_direction(
    model: EdgeModel, tmp_path: Path, tokens: int, context: int, directions: int, length: int
) -> None:
    path = put(tmp_path / "one.txt", "z" * tokens)
    assert len(model.text.encode("z" * tokens)) == tokens
    packed = pack(read_data(path), model.text, None, context, directions)
    assert packed.length == len(flat(packed.examples)[0]) == length
    assert pack(read_data(path), model.text, 1 << 20, context).length == min(context, tokens)


def test_one_token_is_no_row(model: EdgeModel, tmp_path: Path) -> None:
    path = put(tmp_path / "one.txt", "z")
    assert refusal(lambda: pack(read_data(path), model.text, None, 128)) == (
        f"{path}: 1 token in all; a row needs two, the first is given and the second learned"
    )


def test_validation_text_is_cut_alike_and_sampled_by_rows(model: EdgeModel, notes: Path, tmp_path: Path) -> None:
    valid, notices = put(tmp_path / "valid.md", "z" * 100), list[str]()
    config = make_config(None, {"data": str(notes), "valid": str(valid), "directions": 4, "eval_rows": 3})
    dataset = read_dataset(model, config, notices.append)
    tokens = len(joined(model, *NOTES.values()))
    length = tokens // 4
    assert dataset.config.max_length == length
    assert dataset.valid is not None
    assert [len(row) for row in flat(dataset.valid.examples)] == [length] * 3
    assert notices == [
        f"training text: 3 files, {tokens} tokens, {-(-(tokens - 1) // length)} rows of {length} tokens",
        f"validation text: 1 file, 100 tokens, {-(-99 // length)} rows of {length} tokens",
    ]


def test_rows_of_a_jsonl_file_stay_rows(model: EdgeModel, write_rows: Callable[..., str], notes: Path) -> None:
    data = write_rows([{"text": "the film is great"}, {"text": "a plot"}])
    dataset = read_dataset(model, make_config(None, {"data": data, "valid": str(notes), "max_length": 9}))
    bos = [0]
    assert flat(dataset.train.examples) == [bos + model.text.encode(text) for text in ("the film is great", "a plot")]
    assert dataset.valid is not None
    assert {len(row) for row in flat(dataset.valid.examples)[:-1]} == {9}


def test_text_fits_no_template_and_more_directions_need_more_rows(
    model: EdgeModel, notes: Path, reviews: str, write_rows: Callable[..., str]
) -> None:
    def refused(**settings: Any) -> str:
        return refusal(lambda: read_dataset(model, make_config(None, {"data": str(notes), **settings})))

    first = notes / "a.txt"
    assert refused(template="{sentence} It was") == f"--template '{{sentence}} It was': field 'sentence' does not exist; {first} has 'text'"
    assert refused(max_length=40, directions=9) == (
        f"--directions 9: more than the 2 rows of {notes}, each direction needs rows of its own; give at most 2, or a smaller --max-length"
    )
    assert refused(data=reviews, template="{text} It was", labels="bad,good", valid=str(notes)) == (
        f"{first}: no field 'label'; it has 'text' (--label-field names the label's field)"
    )


# what a run remembers


def test_the_hash_is_of_names_and_contents(notes: Path, tmp_path: Path) -> None:
    seen = {sha256_data(notes)}
    assert sha256_data(notes / "a.txt") == sha256_file(notes / "a.txt")
    put(notes / "page.html", "no text file")
    put(notes / ".hidden.md", "not read")
    assert sha256_data(notes) in seen

    def differs() -> None:
        assert sha256_data(notes) not in seen
        seen.add(sha256_data(notes))

    put(notes / "b.md", NOTES["b.md"] + "More.\n")
    differs()
    (notes / "b.md").rename(notes / "d.md")
    differs()
    put(notes / "new.md", "")
    differs()
    (notes / "new.md").unlink()
    (notes / "a.txt").unlink()
    differs()
    notes.rename(tmp_path / "moved")
    assert sha256_data(tmp_path / "moved") in seen


@pytest.fixture
def run(exported_dir: Path, notes: Path, tmp_path: Path) -> Path:
    """Two steps on the folder, which is also the validation text."""
    edgezo.tune(exported_dir, tmp_path / "run", data=str(notes), valid=str(notes), steps=2, lr=1e-4, **SETTINGS)
    return tmp_path / "run"


@pytest.mark.parametrize("change", ["changed", "renamed", "added"])
def test_a_run_goes_on_with_the_same_text_alone(exported_dir: Path, notes: Path, run: Path, change: str) -> None:
    recorded = sha256_data(notes)
    if change == "changed":
        put(notes / "a.txt", "Other words of about the same length.\n")
    elif change == "renamed":
        (notes / "a.txt").rename(notes / "z.txt")
    else:
        put(notes / "z.txt", "One more.\n")
    before = (run / "journal.bin").read_bytes()
    with pytest.raises(RunError) as caught:
        edgezo.tune(exported_dir, run, resume=True, steps=3, threads=1)
    assert str(caught.value) == (
        f"{notes}: is not the data the run was started with (SHA-256 {sha256_data(notes)[:12]}, the run has {recorded[:12]}); "
        "give the same or start a new run"
    )
    assert (run / "journal.bin").read_bytes() == before
    assert check_run(run).files == [(name, str(notes), "changed") for name in ("data", "valid")]


def test_a_resumed_run_is_the_run_that_was_not_stopped(exported_dir: Path, notes: Path, run: Path, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, run, resume=True, steps=4, threads=1)
    settings = {**SETTINGS, "schedule": "constant", "lr": 1e-4, "data": str(notes), "valid": str(notes)}
    edgezo.tune(exported_dir, tmp_path / "half", steps=2, **settings)
    edgezo.tune(exported_dir, tmp_path / "half", resume=True, steps=4, threads=1)
    edgezo.tune(exported_dir, tmp_path / "whole", steps=4, **settings)
    assert read_run(tmp_path / "half").records == read_run(tmp_path / "whole").records
    found = check_run(run, EdgeModel(exported_dir, threads=1), every=1)
    assert (found.steps, found.derived, found.problems) == (4, 4, [])
    assert found.files == [(name, str(notes), "as recorded") for name in ("data", "valid")]


def test_a_replayed_run_is_the_tuned_model(exported_dir: Path, run: Path, tmp_path: Path) -> None:
    write_tuned(exported_dir, [run], [1.0], "last", tmp_path / "out", threads=1)
    tuned, written = EdgeModel(exported_dir, run=run, step="last", threads=1), EdgeModel(tmp_path / "out", threads=1)
    assert all(np.array_equal(array, written.weights[name]) for name, array in tuned.weights.items())


def test_perplexity_is_told_before_and_after(
    invoke: Command, exported_dir: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", "notes", "--threads", "1"]
    settings = ["--batch", "2", "--lr", "1e-4", "--eval-every", "1", "--steps", "2", "--valid", "notes/b.md"]
    done = invoke("tune", str(exported_dir), "-o", "run", *data, *settings)
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    shown = f"before  loss {summary['before']['loss']:.4f}, perplexity {summary['before']['perplexity']:.2f} (1 row)"
    assert done.out.splitlines()[1] == shown
    assert summary["before"]["perplexity"] == pytest.approx(np.exp(summary["before"]["loss"]))
    assert summary["best"]["perplexity"] <= summary["before"]["perplexity"]
    assert done.err.count(WARNING) == 1
    assert WARNING not in invoke("tune", str(exported_dir), "-o", "run", "--resume", "--steps", "3", "--threads", "1").err
    found = invoke("eval", str(exported_dir), *data, "--run", "run", "--step", "0", "--json")
    own = edgezo.evaluate(exported_dir, notes, threads=1, max_length=read_run(tmp_path / "run").config.max_length).evaluation
    assert json.loads(found.out)["perplexity"] == pytest.approx(own.perplexity, rel=1e-5)


def test_an_empty_folder_is_one_line_and_no_run(
    invoke: Command, exported_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    expected = (
        "error: empty: no .txt or .md file in this folder; put plain text into it, or give rows in a .jsonl, .json, .csv or .tsv file"
    )
    done = invoke("tune", str(exported_dir), "-o", "run", "--data", "empty", "--threads", "1")
    assert (done.code, done.out, done.err) == (1, "", f"  reading data\n{expected}\n")
    assert not (tmp_path / "run").exists()
    done = invoke("eval", str(exported_dir), "--data", "empty")
    assert (done.code, done.out, done.err) == (1, "", f"{expected}\n")
