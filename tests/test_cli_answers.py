"""What eval, generate and predict write: results on standard output, as lines or as one JSON object."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import MEASURED, TASK, matches, one_object
from conftest import Command
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import edgezo
from edgezo.manifest import StoredFile
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.run import read_run
from edgezo.storage import sha256_file


def test_eval_of_the_base_is_a_line_before_those_of_the_classes(command: Command) -> None:
    found = command("eval", "edge", *TASK)
    matches(rf"base  {MEASURED}\nclass .*\n0 .*\n1 .*\n", found.out)
    assert (found.code, found.err) == (0, "")


def test_eval_of_text_tells_loss_and_perplexity(command: Command, write_rows: Callable[..., str]) -> None:
    write_rows([{"text": "the film is great"}, {"text": "a plot"}], "text.jsonl")
    matches(r"base  loss \d+\.\d{4}, perplexity \d+\.\d\d \(2 rows\)\n", command("eval", "edge", "--data", "text.jsonl").out)


def test_eval_as_json_is_one_object(command: Command) -> None:
    code, out, err = command("eval", "edge", *TASK, "--json")
    found = one_object(out)
    expected = edgezo.evaluate("edge", "rows.jsonl", template="{text}\nIt was", labels="terrible,great", threads=1)
    classes = {label: counts.as_dict() for label, counts in expected.classes.items()}
    assert found == {**expected.evaluation.as_dict(), "classes": classes, "step": None, "truncated": 0}
    assert (code, err) == (0, "")


def test_predict_says_how_many_rows_were_cut(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, err = command("predict", "edge", *TASK, "--max-length", "8", "--json")
    assert err == "16 of 16 rows were cut to fit\n"
    assert all(prediction["truncated"] for prediction in one_object(out)["predictions"])
    monkeypatch.setattr("sys.stdin", io.StringIO("a long film\n" * 9))
    options = ["--template", "{text} It was", "--labels", "terrible,great", "--max-length", "8"]
    assert command("predict", "edge", "--text", "-", *options).err == "1 of 1 texts were cut to fit\n"


def test_eval_says_how_many_rows_were_cut(command: Command) -> None:
    code, out, err = command("eval", "edge", *TASK, "--max-length", "8", "--json")
    assert err == "16 of 16 rows were cut to fit\n"
    assert one_object(out)["truncated"] == 16
    assert code == 0


def test_eval_with_a_run_uses_its_template_labels_and_best_step(command: Command, run: str) -> None:
    found = one_object(command("eval", "edge", "--data", "rows.jsonl", "--run", run, "--json", "--threads", "1").out)
    state = read_run(run)
    assert found["step"] == state.best_step
    assert found["loss"] == pytest.approx(state.evaluations[state.best_step].loss, abs=1e-6)


@pytest.mark.parametrize(("step", "shown"), [("0", "step 0, the exact start"), ("3", "step 3"), ("last", "step 4")])
def test_eval_takes_a_step_of_the_run(command: Command, run: str, step: str, shown: str) -> None:
    assert command("eval", "edge", "--data", "rows.jsonl", "--run", run, "--step", step).out.startswith(f"{shown}  accuracy ")


def test_eval_tells_the_labels_that_it_found_in_the_rows(command: Command, write_rows: Callable[..., str]) -> None:
    write_rows([{"text": "a film", "label": label} for label in ("good", "bad", "long")], "three.jsonl")
    write_rows([{"text": "a film", "label": label} for label in ("good", "bad")], "two.jsonl")
    asked = ["eval", "edge", "--data", "two.jsonl", "--template", "{text} It was", "--threads", "1"]
    assert command(*asked).err == "the labels compared are those of the rows: bad, good; --labels names others\n"
    found = command(*asked, "--shots", "1", "--train", "three.jsonl")
    assert (found.code, found.err) == (0, "the labels compared are those of the rows: bad, good, long; --labels names others\n")
    assert command(*asked, "--labels", "bad=bad,good=good,long=long").err == ""


def test_eval_with_a_run_keeps_the_candidates_it_learned(command: Command, write_rows: Callable[..., str]) -> None:
    """Labels taken from the training data are the run's, though the file to evaluate on has fewer of them."""
    write_rows([{"text": "a film", "label": label} for label in ("good", "bad", "long")], "three.jsonl")
    write_rows([{"text": "a film", "label": label} for label in ("good", "bad")], "two.jsonl")
    assert command("tune", "edge", "-o", "run", "--data", "three.jsonl", "--template", "{text}:", "--steps", "1").code == 0
    taken = one_object(command("eval", "edge", "--run", "run", "--data", "two.jsonl", "--json").out)
    given = one_object(
        command("eval", "edge", "--run", "run", "--data", "two.jsonl", "--json", "--labels", "bad=bad,good=good,long=long").out
    )
    assert taken["loss"] == pytest.approx(given["loss"], abs=1e-6)


def test_generate_writes_the_text_and_a_line_break(command: Command) -> None:
    found = command("generate", "edge", "--prompt", "the film is", "--max-tokens", "6")
    assert found == (0, EdgeModel("edge", threads=1).generate("the film is", 6) + "\n", "")


def test_generate_as_json_is_one_object(command: Command) -> None:
    found = one_object(command("generate", "edge", "--prompt", "the film is", "--max-tokens", "6", "--json").out)
    assert found == {"prompt": "the film is", "text": EdgeModel("edge", threads=1).generate("the film is", 6), "step": None}


def test_generate_reads_its_prompt_from_standard_input(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the film\nis"))
    assert one_object(command("generate", "edge", "--prompt", "-", "--max-tokens", "2", "--json").out)["prompt"] == "the film\nis"


def test_json_shows_characters_as_they_are(command: Command) -> None:
    assert '"prompt": "é€😀"' in command("generate", "edge", "--prompt", "é€😀", "--max-tokens", "1", "--json").out


@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["text", "json"])
def test_generate_writes_to_a_pipe_that_cannot_take_every_character(command: Command, tmp_path: Path, extra: list[str]) -> None:
    assert not command("generate", "edge", "--prompt", "a", "--max-tokens", "9").out.isascii()
    found = subprocess.run(
        [sys.executable, "-m", "edgezo", "generate", "edge", "--prompt", "a", "--max-tokens", "9", *extra],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},  # as on Windows
    )
    assert (found.returncode, b"Traceback" in found.stderr) == (0, False)


def test_generate_puts_the_prompt_into_the_chat_template(command: Command) -> None:
    found = one_object(command("generate", "edge", "--prompt", "hello", "--chat", "--max-tokens", "2", "--json").out)
    assert found["prompt"] == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_gets_no_second_beginning_of_text(command: Command, tmp_path: Path) -> None:
    """The template writes the special tokens; a tokenizer that opens texts itself must not do so again."""
    path = tmp_path / "edge" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    expected = one_object(command("generate", "edge", "--prompt", "hello", "--chat", "--max-tokens", "5", "--json").out)
    tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.save(str(path))
    manifest = read_manifest(tmp_path / "edge")
    changed = StoredFile(bytes=path.stat().st_size, sha256=sha256_file(path))
    manifest.model_copy(update={"files": {**manifest.files, path.name: changed}}).write(tmp_path / "edge")
    assert one_object(command("generate", "edge", "--prompt", "hello", "--chat", "--max-tokens", "5", "--json").out) == expected
    plain = one_object(command("generate", "edge", "--prompt", expected["prompt"], "--max-tokens", "5", "--json").out)
    assert plain["text"] != expected["text"]


def test_generate_with_a_run_is_the_tuned_model(command: Command) -> None:
    assert command("tune", "edge", "-o", "run", *TASK, "--steps", "9", "--lr", "1e-2", "--seed", "3", "--start", "none").code == 0
    found = one_object(command("generate", "edge", "--run", "run", "--prompt", "the film is", "--max-tokens", "20", "--json").out)
    assert found["text"] == EdgeModel("edge", run="run", threads=1).generate("the film is", 20)
    assert found["text"] != EdgeModel("edge", threads=1).generate("the film is", 20)
    assert found["step"] == 9
    told = command("generate", "edge", "--run", "run", "--prompt", "the film is", "--max-tokens", "1").err
    use = "edgezo predict edge --run run --text '...'"
    assert told == f"note: this run learned to choose among labels, not to write text; for a label: {use}\n"


def test_generate_says_nothing_of_a_run_that_learned_to_write(command: Command, write_rows: Callable[..., str]) -> None:
    write_rows([{"prompt": "the film is", "completion": " great"}] * 4, "texts.jsonl")
    learned = {"labels": [*TASK, "--objective", "likelihood"], "texts": ["--data", "texts.jsonl", "--threads", "1"]}
    for name, options in learned.items():
        assert command("tune", "edge", "-o", name, *options, "--steps", "1", "--lr", "1e-3", "--eps", "1e-3", "--start", "none").code == 0
        assert command("generate", "edge", "--run", name, "--prompt", "the film is", "--max-tokens", "1").err == ""


def test_generate_samples_by_seed(command: Command) -> None:
    texts = [command("generate", "edge", "--prompt", "a", "--temperature", "1", "--seed", seed, "--max-tokens", "9").out for seed in "1122"]
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_predict_ranks_the_labels_of_the_run(command: Command, run: str) -> None:
    found = command("predict", "edge", "--run", run, "--text", "a great film", "--threads", "1")
    matches(r"(0|1) \d+\.\d %  (0|1) \d+\.\d %\n", found.out)
    assert (found.code, found.err) == (0, "")
    shown = one_object(command("predict", "edge", "--run", run, "--text", "a great film", "--threads", "1", "--json").out)["predictions"]
    assert shown[0]["label"] == found.out[0]
    assert sum(shown[0]["probabilities"].values()) == pytest.approx(1)


def test_predictions_of_a_file_are_those_eval_counts(command: Command, write_rows: Callable[..., str]) -> None:
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    write_rows([{"text": row["text"]} for row in rows], "unlabelled.jsonl")
    options = ["--template", r"{text}\nIt was", "--labels", "terrible,great", "--threads", "1", "--json"]
    predicted = one_object(command("predict", "edge", "--data", "unlabelled.jsonl", *options).out)["predictions"]
    right = [str(row["label"]) == prediction["label"] for row, prediction in zip(rows, predicted, strict=True)]
    evaluated = one_object(command("eval", "edge", "--data", "rows.jsonl", *options).out)
    assert evaluated["accuracy"] == pytest.approx(sum(right) / len(right))
