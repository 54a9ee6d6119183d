"""Commands that fail: one line each, nothing made or changed."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TASK
from conftest import Command
from filelock import FileLock

from edgezo.errors import DataError
from edgezo.manifest import StoredFile
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.journal_records import EVALUATION_BYTES, STEP_BYTES
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.run import read_run
from edgezo.storage import sha256_file


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change weights of an edge model by name and mend their file's hash in the manifest."""
    model = EdgeModel(directory, threads=1)
    change(model.weights)
    manifest = read_manifest(directory)
    data = bytearray((directory / "tunable.bin").read_bytes())
    for tensor in manifest.tensors:
        data[tensor.offset : tensor.offset + tensor.nbytes] = model.weights[tensor.name].tobytes()
    (directory / "tunable.bin").write_bytes(data)
    stored = StoredFile(bytes=len(data), sha256=sha256_file(directory / "tunable.bin"))
    manifest.model_copy(update={"files": {**manifest.files, "tunable.bin": stored}}).write(directory)


def put_nan(weights: dict[str, Any]) -> None:
    """One NaN in the last norm."""
    weights["model.norm.weight"][3] = np.nan


def test_a_file_is_no_edge_model(refusal: Callable[..., str]) -> None:
    expected = "rows.jsonl: a file, no edge model; give the folder that edgezo export MODEL -o FOLDER made"
    assert refusal("eval", "rows.jsonl", *TASK) == expected


@pytest.mark.parametrize(
    "arguments", [["tune", "none", "-o", "run", *TASK], ["eval", "none", *TASK], ["generate", "none", "--prompt", "a"]], ids=lambda a: a[0]
)
def test_a_missing_edge_model(refusal: Callable[..., str], arguments: list[str]) -> None:
    assert refusal(*arguments) == "none: no such directory; make an edge model with: edgezo export MODEL -o none"


def test_inspect_of_neither_model_nor_run(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal("inspect", "empty") == "empty: neither an edge model (manifest.json) nor a run (journal.bin) is in it"
    assert refusal("inspect", "none") == "none: no such directory; give an edge model or a run"


def test_a_folder_that_is_no_edge_model(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    expected = "empty: no manifest.json in it; an edge model is made by: edgezo export MODEL -o DIR"
    assert refusal("generate", "empty", "--prompt", "a") == expected


@pytest.mark.parametrize("name", ["tune", "eval", "generate", "inspect"])
def test_weights_that_were_changed(refusal: Callable[..., str], tmp_path: Path, name: str) -> None:
    with open(tmp_path / "edge" / "tunable.bin", "r+b") as file:
        file.write(b"\x01")
    options = {"tune": ["-o", "run", *TASK], "eval": TASK, "generate": ["--prompt", "a"], "inspect": []}[name]
    message = refusal(name, "edge", *options)
    assert re.fullmatch(r"edge/tunable.bin: SHA-256 \w{12}, manifest says \w{12}; the file was changed, copy or export it again", message)


@pytest.mark.parametrize("arguments", [["tune", "edge", "-o", "run"], ["eval", "edge"]], ids=lambda a: a[0])
def test_missing_data(refusal: Callable[..., str], arguments: list[str]) -> None:
    assert refusal(*arguments, "--data", "none.jsonl") == f"none.jsonl: no such data file in {Path.cwd()}; check the path"


def test_tune_without_data(refusal: Callable[..., str]) -> None:
    assert refusal("tune", "edge", "-o", "run") == "--data: not given; it is needed"


def test_missing_validation_data(refusal: Callable[..., str]) -> None:
    assert (
        refusal("tune", "edge", "-o", "run", *TASK, "--valid", "none.csv") == f"none.csv: no such data file in {Path.cwd()}; check the path"
    )


def test_a_run_that_exists(refusal: Callable[..., str], run: str) -> None:
    assert refusal("tune", "edge", "-o", run, *TASK) == "run: exists already; continue it with --resume or choose another directory"


def test_a_file_in_place_of_the_run(refusal: Callable[..., str]) -> None:
    assert refusal("tune", "edge", "-o", "rows.jsonl", *TASK).startswith("rows.jsonl: exists already; ")


def test_an_edge_model_in_place_of_the_run(refusal: Callable[..., str]) -> None:
    assert refusal("tune", "edge", "-o", "edge", *TASK) == "edge: exists already; it holds no run, choose another directory"


def test_a_run_directory_that_is_empty_is_used(command: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert command("tune", "edge", "-o", "run", *TASK, "--steps", "1").code == 0


@pytest.mark.parametrize("name", ["tune", "eval"])
def test_a_label_outside_the_list(refusal: Callable[..., str], write_rows: Callable[..., str], name: str) -> None:
    write_rows([{"text": "a", "label": 1}, {"text": "b", "label": 2}], "bad.jsonl")
    output = ["-o", "run"] if name == "tune" else []
    message = refusal(name, "edge", *output, *TASK, "--data", "bad.jsonl")
    assert (
        message
        == "bad.jsonl:2: label '2' is not among 0=terrible, 1=great; mend or remove the row, or give every label a word: --labels 0=word,..."
    )


def test_a_number_of_a_row_is_not_taken_for_its_label(refusal: Callable[..., str], write_rows: Callable[..., str]) -> None:
    write_rows([{"text": "great", "label": -1, "idx": 0}], "bad.jsonl")
    for labels in ("terrible,great", "bad=terrible,great=great"):
        assert "--label-field" not in refusal("eval", "edge", *TASK, "--data", "bad.jsonl", "--labels", labels)


def test_a_label_that_another_field_has(refusal: Callable[..., str], write_rows: Callable[..., str]) -> None:
    write_rows([{"text": "a", "label": 1, "label_text": "good"}], "bad.jsonl")
    message = refusal("eval", "edge", *TASK, "--data", "bad.jsonl", "--labels", "bad=terrible,good=great")
    assert (
        message
        == "bad.jsonl:1: label '1' is not among bad=terrible, good=great; mend or remove the row, or give every label a word: --labels bad=word,..., or take the field that has one: --label-field label_text"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{nope}", "--template '{nope}': field 'nope' does not exist; rows.jsonl:1 has 'text', 'label'"),
        ("{Texts}", "--template '{Texts}': field 'Texts' does not exist (did you mean 'text'?); rows.jsonl:1 has 'text', 'label'"),
        ("{text", "--template '{text': expected '}' before end of string; write a brace of the text as {{ or }}"),
        ("It was", "--template 'It was': names no field; write for example '{text} It was'"),
    ],
)
def test_a_bad_template(refusal: Callable[..., str], template: str, message: str) -> None:
    assert refusal("tune", "edge", "-o", "run", *TASK, "--template", template) == message
    assert refusal("eval", "edge", *TASK, "--template", template) == message


@pytest.mark.parametrize("arguments", [["tune", "edge", "-o", "run"], ["eval", "edge"]], ids=lambda a: a[0])
def test_a_completion_longer_than_the_context(refusal: Callable[..., str], write_rows: Callable[..., str], arguments: list[str]) -> None:
    write_rows([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "x" * 200}], "long.jsonl")
    message = refusal(*arguments, "--data", "long.jsonl")
    assert re.fullmatch(
        r"long.jsonl:2: the completion alone has 20\d tokens, at most 128 fit with its prompt; shorten it or raise --max-length", message
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "no such run directory; make one with: edgezo tune DIR --data FILE -o none"),
        ("empty", "no run in it (journal.bin is missing); make one with: edgezo tune DIR --data FILE -o empty"),
        ("edge", "an edge model, no run; give the run directory that edgezo tune edge --data FILE -o RUN made"),
        ("rows.jsonl", "a file; give a run directory, as edgezo tune DIR --data FILE -o RUN makes it"),
    ],
)
def test_resuming_what_is_no_run(refusal: Callable[..., str], tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    assert refusal("tune", "edge", "-o", name, "--resume") == f"{name}: {expected}"


@pytest.mark.parametrize("name", ["tune", "eval", "predict"])
def test_a_run_where_an_edge_model_is_asked_for(refusal: Callable[..., str], run: str, name: str) -> None:
    options = {"tune": ["-o", "new", *TASK], "eval": TASK, "predict": ["--text", "a", "--template", "{text} It", "--labels", "a,b"]}[name]
    takers = f"(eval, predict, generate, chat and rate take the run as --run {run})"
    expected = f"{run}: a run, no edge model; give the edge model that it was tuned from {takers}"
    assert refusal(name, run, *options) == expected


def test_resuming_with_a_configuration_file(refusal: Callable[..., str], run: str) -> None:
    message = refusal("tune", "edge", "-o", run, "--resume", "--config", "run/config.json")
    assert message == "--resume continues with the run's own settings; leave --config out and give what shall change as options"


@pytest.mark.parametrize("name", ["eval", "generate", "tune"])
def test_a_run_of_another_edge_model(refusal: Callable[..., str], run: str, tmp_path: Path, name: str) -> None:
    other = Path(shutil.copytree(tmp_path / "edge", tmp_path / "other"))
    rewrite(other, lambda weights: weights["model.norm.weight"].fill(2))
    options = {"eval": ["--data", "rows.jsonl", "--run", run], "generate": ["--prompt", "a", "--run", run], "tune": ["-o", run, "--resume"]}
    message = refusal(name, "other", *options[name])
    pattern = r"run: was tuned from another edge model \(base \w{12}\) than other \(\w{12}\); give the one it was tuned from"
    assert re.fullmatch(pattern, message)


@pytest.mark.parametrize("arguments", [["eval", "edge", *TASK], ["generate", "edge", "--prompt", "a"]], ids=lambda a: a[0])
def test_a_step_the_run_does_not_have(refusal: Callable[..., str], run: str, arguments: list[str]) -> None:
    assert refusal(*arguments, "--run", run, "--step", "5") == "run: step 5 was asked for, the run has steps 0 to 4"


@pytest.mark.parametrize("step", ["first", "-1", "1.5", "²", "9" * 5000])
def test_a_step_that_is_no_number(refusal: Callable[..., str], run: str, step: str) -> None:
    assert refusal("eval", "edge", *TASK, "--run", run, "--step", step) == f"--step {step!r}: a number, best or last is expected"


def test_a_step_without_a_run(refusal: Callable[..., str]) -> None:
    expected = "--step 3: says a step of a run, but no --run is given; add --run RUN or leave --step out"
    assert refusal("eval", "edge", *TASK, "--step", "3") == expected


def test_more_steps_of_a_resumed_run_hold_when_it_is_resumed_again(command: Command, tmp_path: Path, run: str) -> None:
    assert command("tune", "edge", "-o", run, "--resume", "--steps", "9").code == 0
    journal = tmp_path / run / "journal.bin"
    journal.write_bytes(journal.read_bytes()[: -EVALUATION_BYTES - 3 * STEP_BYTES])  # as if killed three steps before the end
    assert command("tune", "edge", "-o", run, "--resume").code == 0
    assert len(read_run(run).records) == 9


def test_a_run_that_another_process_tunes_is_refused(refusal: Callable[..., str], command: Command, tmp_path: Path, run: str) -> None:
    expected = "another process is tuning this run; wait until it ends or stop it"
    with FileLock(tmp_path / run / ".lock"):
        assert refusal("tune", "edge", "-o", run, "--resume", "--steps", "9") == f"{run}: {expected}"
    (tmp_path / "begun").mkdir()
    with FileLock(tmp_path / "begun" / ".lock"):
        assert refusal("tune", "edge", "-o", "begun", *TASK, "--steps", "1") == f"begun: {expected}"
    assert command("tune", "edge", "-o", run, "--resume", "--steps", "5").code == 0
    assert command("tune", "edge", "-o", "begun", *TASK, "--steps", "1").code == 0, "a lock that nobody holds is none"


def test_export_without_the_workstation_half_says_how_to_get_it(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "edgezo.export.trace", raising=False)
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    monkeypatch.setitem(sys.modules, "edgezo.export.pipeline", None)
    monkeypatch.delitem(sys.modules, "edgezo.export", raising=False)
    expected = "exporting needs the package 'edgezo.export.pipeline'; install the workstation half with: pip install 'edgezo[export]'"
    assert refusal("export", "anything", "-o", "other") == expected


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--noise", "uniform", "--noise 'uniform': input should be 'rademacher', 'gaussian' or 'sphere'"),
        ("--schedule", "step", "--schedule 'step': input should be 'constant', 'linear' or 'cosine'"),
        ("--lr", "0", "--lr 0.0: input should be greater than 0"),
        ("--lr", "nan", "--lr nan: input should be "),
        ("--steps", "-1", "--steps -1: input should be greater than or equal to 0"),
        ("--seed", str(1 << 64), f"--seed {1 << 64}: input should be less than {1 << 64}"),
        ("--labels", "a,a", "--labels 'a,a': every label needs one word of its own"),
        ("--config", "none.yaml", "none.yaml: no such configuration file"),
        ("--config", "rows.jsonl", "rows.jsonl: not readable as YAML "),
    ],
)
def test_a_setting_that_cannot_be_used(refusal: Callable[..., str], option: str, value: str, message: str) -> None:
    assert refusal("tune", "edge", "-o", "run", *TASK, option, value).startswith(message)


@pytest.mark.parametrize(
    "options",
    [["--temperature", "0"], ["--temperature", "-1"], ["--top-k", "-1"], ["--top-p", "0"], ["--top-p", "1.5"], ["--top-p", "nan"]],
)
def test_sampling_out_of_range(refusal: Callable[..., str], options: list[str]) -> None:
    message = refusal("generate", "edge", "--prompt", "a", *options)
    assert message.startswith("temperature must be above 0 and finite, top-k at least 0 and top-p in (0, 1]; got ")


def test_a_prompt_that_fills_the_context(refusal: Callable[..., str]) -> None:
    assert refusal("generate", "edge", "--prompt", "x" * 128) == "the prompt has 128 tokens, the model's context is 128; shorten it"


def test_a_prompt_that_is_not_utf8(refusal: Callable[..., str]) -> None:
    assert "UTF-8" in refusal("generate", "edge", "--prompt", "a \udcff")  # what the shell's byte 0xff becomes


def test_eps_below_the_resolution_of_the_weights(refusal: Callable[..., str]) -> None:
    message = refusal("tune", "edge", "-o", "run", *TASK, "--eps", "1e-9")
    assert message.startswith("eps 1e-09 is below the float32 resolution ")


def test_tuning_weights_with_nan(refusal: Callable[..., str], tmp_path: Path) -> None:
    rewrite(tmp_path / "edge", put_nan)
    assert refusal("tune", "edge", "-o", "run", *TASK) == "model.norm.weight: holds NaN or infinity; export the model again"


@pytest.mark.parametrize(
    "arguments",
    [["eval", "edge", *TASK], ["eval", "edge", *TASK, "--json"], ["generate", "edge", "--prompt", "a", "--temperature", "1"]],
    ids=["eval", "eval as json", "generate"],
)
def test_using_weights_with_nan(refusal: Callable[..., str], tmp_path: Path, arguments: list[str]) -> None:
    rewrite(tmp_path / "edge", put_nan)
    assert re.search(r"\bnan\b|not finite", refusal(*arguments), re.IGNORECASE)


def overflow(weights: dict[str, Any]) -> None:
    """Weights that are finite, whose products are not."""
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"):
        weights[f"model.layers.0.{name}.weight"][...] *= 1e9


def test_a_loss_that_overflows_is_one_line_and_no_traceback(command: Command, tmp_path: Path) -> None:
    rewrite(tmp_path / "edge", overflow)
    found = command("tune", "edge", "-o", "run", *TASK, "--eps", "1000")
    assert (found.code, found.out) == (1, "")
    expected = "error: the log-probabilities at theta are NaN or infinite before the first step; export the model again"
    assert [line for line in found.err.splitlines() if not line.startswith("  ")] == [expected]


def test_a_run_without_a_single_step_does_not_stand_in_the_way_of_the_next(command: Command, tmp_path: Path) -> None:
    """`try a smaller --eps` must be possible with the same command."""
    rewrite(tmp_path / "edge", overflow)
    assert command("tune", "edge", "-o", "run", *TASK, "--eps", "1000").code == 1
    assert "exists already" not in command("tune", "edge", "-o", "run", *TASK, "--eps", "2000").err


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder in which nobody can make anything; permissions do not bind root, /proc does."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/proc")
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    return folder


def test_a_run_in_a_read_only_place(refusal: Callable[..., str], read_only: Path) -> None:
    target = read_only / "edgezo-run"
    assert refusal("tune", "edge", "-o", str(target), *TASK, "--steps", "1").startswith(f"{target}: cannot be written (")
    assert not target.exists()


def test_a_run_below_a_file(refusal: Callable[..., str]) -> None:
    message = refusal("tune", "edge", "-o", "rows.jsonl/run", *TASK, "--steps", "1")
    assert message.startswith("rows.jsonl/run: cannot be written (Not a directory)")
    assert "--resume" not in message  # there is no run to go on with


def test_a_folder_in_place_of_the_data(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert refusal("eval", "edge", "--data", "folder.jsonl").startswith("folder.jsonl: ")


def test_debug_shows_the_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEZO_DEBUG", "1")
    with pytest.raises(DataError):
        command("eval", "edge", "--data", "none.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "predict needs either a text (--text) or a file of rows (--data), and not both"),
        (["--text", "a", "--data", "rows.jsonl"], "predict needs either a text (--text) or a file of rows (--data), and not both"),
        (["--text", "a"], "a text fills a template; give --template with --labels, --choices or --answer-field, or a --run or --task"),
        (
            ["--text", "a", "--template", "{a} is"],
            "--template '{a} is': what continues it is not said; give --labels of classes, --choices, or --answer-field for a generated answer",
        ),
        (
            ["--text", "a", "--template", "{a} {b}", "--labels", "x,y"],
            "--template '{a} {b}': has 2 fields, a text fills one; give a data file",
        ),
        (["--text", " ", "--template", "{a}", "--labels", "x,y"], "text 1: field 'a': it is empty or no text; every row needs it"),
    ],
)
def test_predict_refuses_in_one_line(refusal: Callable[..., str], arguments: list[str], message: str) -> None:
    assert refusal("predict", "edge", *arguments) == message
