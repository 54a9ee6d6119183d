"""The commands as a person meets them: results on standard output, one line for every failure, signals that lose nothing."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from filelock import FileLock
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import edgezo
from edgezo.config import TuneConfig, make_config
from edgezo.errors import DataError
from edgezo.inspection import unused_settings
from edgezo.manifest import StoredFile
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.journal_records import EVALUATION_BYTES, STEP_BYTES
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.run import read_run
from edgezo.storage import sha256_file

TASK = ["--data", "rows.jsonl", "--template", r"{text}\nIt was", "--labels", "terrible,great", "--threads", "1"]
PLAIN = [*TASK, "--start", "none"]
MEASURED = r"accuracy \d+\.\d %, macro F1 \d\.\d{3}, loss \d+\.\d{4} \(16 rows\)"
PEAK = "" if sys.platform == "win32" else r", peak memory [1-9]\d+ MB"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, invoke: Command, edge_dir: Path, reviews: str, tmp_path: Path) -> Command:
    """Run `edgezo ...` in a folder with the edge model `edge` and the data `rows.jsonl`."""
    assert (edge_dir, reviews) == (tmp_path / "edge", str(tmp_path / "rows.jsonl"))
    monkeypatch.chdir(tmp_path)
    return invoke


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refusal(command: Command, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail: code 1, nothing on standard output, one line of error, no file made or changed."""

    def call(*arguments: str) -> str:
        before = contents(tmp_path)
        code, out, err = command(*arguments)
        problems = [line for line in err.splitlines() if not line.startswith("  ")]  # progress is indented
        assert (code, out, len(problems)) == (1, "", 1), err
        assert problems[0].startswith("error: ")
        assert err.endswith(problems[0] + "\n")
        assert contents(tmp_path) == before
        return problems[0].removeprefix("error: ")

    return call


@pytest.fixture
def run(command: Command) -> str:
    """A short run with validation, called `run`."""
    assert (
        command("tune", "edge", "-o", "run", *TASK, "--valid", "rows.jsonl", "--steps", "4", "--eval-every", "2", "--lr", "1e-4").code == 0
    )
    return "run"


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


def matches(pattern: str, text: str) -> None:
    """Assert that the whole text is what the pattern says."""
    assert re.fullmatch(pattern, text), text


def one_object(text: str) -> dict[str, Any]:
    """The JSON object that is all of standard output, on one line."""
    assert text.count("\n") == 1
    assert text.endswith("\n")
    found: dict[str, Any] = json.loads(text)
    return found


# results


def test_tune_tells_before_after_and_what_to_do_next(command: Command) -> None:
    found = command("tune", "edge", "-o", "run", *PLAIN, "--valid", "rows.jsonl", "--steps", "4", "--eval-every", "2", "--lr", "1e-4")
    matches(
        rf"run     run, 4 steps, finished, \d+ s{PEAK}\n"
        rf"before  {MEASURED}\n"
        rf"step \d  {MEASURED}, kept as best\n"
        r"use it  edgezo predict edge --run run --text '\.\.\.'\n"
        r"go on   edgezo tune edge -o run --resume --steps MORE\n",
        found.out,
    )
    assert found.code == 0


def test_tune_shows_its_progress_on_standard_error(command: Command) -> None:
    found = command("tune", "edge", "-o", "run", *PLAIN, "--valid", "rows.jsonl", "--steps", "3", "--eval-every", "2", "--lr", "1e-4")
    step = r"training loss \d+\.\d{4}  \d+\.\d\d s/step  \d+:\d\d left\n"
    matches(
        r"  reading data\n  16 rows of kind classification, 16 for validation: (?:great 8, terrible 8|terrible 8, great 8)\n"
        r"  the first reads 'a great film\\nIt was' -> ' great'\n"
        r"  warning: --valid rows\.jsonl has the rows that are learned, and cannot tell .*\n"
        r"  checking that the engine sees changes of every tunable tensor\n  measuring the loss around the start\n"
        r"  eps \S+, measured on 16 rows: projected gradients there and at a quarter of it differ by \d+ %\n"
        rf"  step 0: {MEASURED}\n  step 1  {step}  step 2  {step}  step 2: {MEASURED}(?:  best so far)?\n"
        rf"  step 3  {step}  step 3: {MEASURED}(?:  best so far)?\n",
        found.err,
    )


def test_a_long_run_shows_about_twenty_lines_of_progress(command: Command) -> None:
    found = command("tune", "edge", "-o", "run", *TASK, "--steps", "101", "--batch", "1")
    assert 15 <= found.err.count(" s/step ") <= 21


def test_tune_without_validation_tells_only_the_run(command: Command) -> None:
    matches(
        rf"run     run, 2 steps, finished, \d+ s{PEAK}\nuse it  edgezo predict .*\ngo on   edgezo tune .*\n",
        command("tune", "edge", "-o", "run", *TASK, "--steps", "2").out,
    )


def test_tune_says_when_no_step_was_better_than_the_base(command: Command) -> None:
    found = command("tune", "edge", "-o", "run", *PLAIN, "--valid", "rows.jsonl", "--steps", "2", "--lr", "1e-12")
    expected = "best    step 0, the start: no evaluated step was better; --step last uses step 2"
    assert (found.code, found.out.splitlines()[2]) == (0, expected)


def test_tune_as_json_is_one_object(command: Command) -> None:
    found = one_object(command("tune", "edge", "-o", "run", *PLAIN, "--valid", "rows.jsonl", "--steps", "2", "--json").out)
    assert set(found) == {"directory", "steps", "ended", "best_step", "before", "start", "best", "forward_rows", "seconds", "peak_bytes"}
    assert (found["directory"], found["steps"], found["ended"]) == ("run", 2, "finished")
    assert set(found["before"]) == {"rows", "loss", "accuracy", "macro_f1"}
    assert found["before"]["rows"] == 16


def test_tune_says_how_many_rows_were_cut(command: Command) -> None:
    assert (
        "  16 of 16 training rows were cut to 8 tokens\n"
        in command("tune", "edge", "-o", "run", *TASK, "--steps", "1", "--max-length", "8").err
    )


def test_a_line_break_may_be_given_in_a_template(command: Command) -> None:
    assert command("tune", "edge", "-o", "run", *TASK, "--steps", "1").code == 0
    assert read_run("run").config.template == "{text}\nIt was"


def test_tune_leaves_the_edge_model_as_it_is(command: Command, tmp_path: Path) -> None:
    before = contents(tmp_path / "edge")
    assert command("tune", "edge", "-o", "run", *TASK, "--steps", "2").code == 0
    assert contents(tmp_path / "edge") == before


def test_resume_goes_on_to_more_steps(command: Command, run: str) -> None:
    found = command("tune", "edge", "-o", run, "--resume", "--steps", "6", "--threads", "1")
    assert found.out.startswith("run          run, 6 steps, finished, ")
    assert "  rebuilding step 4 from the journal\n" in found.err
    assert len(read_run(run).records) == 6


def test_resume_to_fewer_steps_than_made_is_refused(command: Command, run: str) -> None:
    expected = f"error: {run}: has 4 steps, --steps 2 asks for fewer; give more, or use --step 2 with eval and generate"
    found = command("tune", "edge", "-o", run, "--resume", "--steps", "2", "--threads", "1")
    assert (found.code, found.out, found.err.splitlines()[-1]) == (1, "", expected)
    assert len(read_run(run).records) == 4


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
    assert told == "note: this run learned to tell labels apart, not to write them; edgezo predict tells the label of a text\n"


def test_generate_samples_by_seed(command: Command) -> None:
    texts = [command("generate", "edge", "--prompt", "a", "--temperature", "1", "--seed", seed, "--max-tokens", "9").out for seed in "1122"]
    assert texts[0] == texts[1] != texts[2] == texts[3]


def facts(text: str) -> list[tuple[str, str]]:
    """Names and values of what inspect printed, which are aligned."""
    lines = [re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines()]
    assert len({len(line) - len(value) for line, (_, value) in zip(text.splitlines(), lines, strict=True)}) == 1
    return [(name, value) for name, value in lines]


def test_inspect_of_an_edge_model(command: Command) -> None:
    found = facts(command("inspect", "edge").out)
    size = sum(path.stat().st_size for path in Path("edge").iterdir() if path.name != "manifest.json")
    difference = read_manifest(Path("edge")).verification
    assert difference is not None
    assert found == [
        ("edge model", "edge"),
        ("model", "llama"),
        ("revision", "none"),
        ("license", "none"),
        ("architecture", "llama"),
        ("family", "causal"),
        ("classes", "none"),
        ("new head", "none"),
        ("pooling", "none"),
        ("context length", "128"),
        ("vocabulary", "320"),
        ("parameters", str(320 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32)),
        ("weights", "fp32"),
        ("adapter", "none"),
        ("tunable parameters", "25760"),
        ("tunable tensors", "20"),
        (
            "tunable kinds",
            "embed_tokens, input_layernorm, mlp.down_proj, mlp.gate_proj, mlp.up_proj, norm, post_attention_layernorm, "
            "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj",
        ),
        ("tied", "model.embed_tokens.weight = lm_head.weight"),
        ("layers", "2"),
        ("chat template", "yes"),
        ("tuned", "none"),
        ("bytes", str(size)),
        ("files intact", "6"),
        ("largest log prob difference", f"{difference.largest_log_prob_difference:.6g}"),
        ("made by", f"edgezo {edgezo.__version__}"),
    ]


def test_inspect_of_a_run(command: Command) -> None:
    options = ["--template", "{text} It was", "--valid", "rows.jsonl", "--minutes", "0.01", "--eval-every", "1", "--seed", "5"]
    assert command("tune", "edge", "-o", "run", *PLAIN, *options).code == 0
    state, journal = read_run("run"), Path("run/journal.bin")
    steps = len(state.records)
    valid = {
        step: f"rows 16, loss {e.loss:.6g}, accuracy {e.accuracy:.6g}, macro_f1 {e.macro_f1:.6g}" for step, e in state.evaluations.items()
    }
    assert facts(command("inspect", "run").out) == [
        ("run", "run"),
        ("steps", str(steps)),
        ("ended", "out of time"),
        ("best step", str(state.best_step)),
        ("seconds", str(round(state.seconds, 1))),
        ("base", state.header["base"]),
        ("journal bytes", str(journal.stat().st_size)),
        *((f"valid at step {step}", valid[step]) for step in dict.fromkeys([0, state.best_step, steps])),
        ("last loss", f"{state.records[-1].loss:.6g}"),
        ("data", "rows.jsonl"),
        ("valid", "rows.jsonl"),
        ("template", "{text} It was"),
        ("labels", "0=terrible, 1=great"),
        ("label field", "label"),
        ("minutes", "0.01"),
        ("lr", f"{state.config.lr:.6g}"),
        ("eps", f"{state.config.eps:.6g}"),
        ("directions", "1"),
        ("batch", "16"),
        ("estimator", "two-sided"),
        ("rule", "sgd"),
        ("sampler", "full"),
        ("rank", "8"),
        ("alpha", "16"),
        ("tune a", "no"),
        ("start", "none"),
        ("seed", "5"),
        ("noise", "rademacher"),
        ("schedule", "linear"),
        ("warmup", "0"),
        ("weight decay", "0"),
        ("eval every", "1"),
        ("eval rows", "256"),
    ]


def test_inspect_leaves_out_what_did_nothing_in_a_run(command: Command) -> None:
    assert command("tune", "edge", "-o", "run", *PLAIN, "--valid-share", "0", "--steps", "1", "--rule", "adam").code == 0
    shown = dict(facts(command("inspect", "run").out))
    assert (shown["rule"], shown["beta m"], shown["beta v"], shown["steps"]) == ("adam", "0.9", "0.99", "1")
    assert not shown.keys() & {
        "best step",
        "valid share",
        "eval every",
        "eval rows",
        "anchor every",
        "z rank",
        "share",
        "start rows",
        "beta",
    }


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"labels": "a,b", "start": "none"}, {"max_tokens", "beta", "start_rows"}),
        ({"valid": "v.jsonl", "start": "exact"}, {"label_field", "valid_share"}),
        ({"choices": ["{a}", "{b}"]}, {"label_field", "max_tokens"}),
        ({"objective": "f1"}, {"label_field", "beta"}),
        ({"objective": "module:function"}, {"label_field"}),
        ({"objective": "dpo", "rule": "svrg"}, {"label_field", "beta_m", "beta_v"}),
        ({"rule": "momentum"}, {"label_field", "beta_v", "anchor_every", "anchor_batches"}),
        ({"rule": "meazo"}, {"label_field", "beta_m", "anchor_every", "anchor_batches"}),
        ({"sampler": "lozo"}, {"label_field", "share"}),
        ({"sampler": "tezo"}, {"label_field", "share", "redraw_every"}),
        ({"sampler": "layers"}, {"label_field", "z_rank", "redraw_every"}),
    ],
)
def test_settings_that_did_nothing_follow_from_the_others(settings: dict[str, Any], unused: set[str]) -> None:
    found = unused_settings(make_config(None, {"data": "d.jsonl", "template": "{text}", **settings}), evaluated=True)
    others = {} if "rule" in settings else {"beta_m", "beta_v", "anchor_every", "anchor_batches"}
    others = {*others, *(() if "sampler" in settings else ("share", "z_rank", "redraw_every"))}
    assert found - others == unused
    assert found <= TuneConfig.model_fields.keys()
    assert unused_settings(make_config(None, {"data": "d.jsonl"}), evaluated=False) >= {
        "valid_share",
        "eval_every",
        "eval_rows",
        "patience",
    }


def test_inspect_as_json_is_one_object(command: Command, run: str) -> None:
    model, tuned = one_object(command("inspect", "edge", "--json").out), one_object(command("inspect", run, "--json").out)
    assert (model["parameters"], model["tunable_tensors"], model["files_intact"]) == (25760, 20, 6)
    assert (tuned["run"], tuned["steps"], tuned["labels"]) == ("run", 4, {"0": "terrible", "1": "great"})


def test_inspect_shows_a_template_with_a_line_break_on_one_line(command: Command, run: str) -> None:
    (shown,) = [line for line in command("inspect", run).out.splitlines() if "{text}" in line]
    assert shown.endswith("It was")


def test_inspect_shows_the_steps_that_were_made_not_those_that_were_asked_for(command: Command, tmp_path: Path, run: str) -> None:
    journal = tmp_path / run / "journal.bin"
    journal.write_bytes(journal.read_bytes()[: -EVALUATION_BYTES - STEP_BYTES])  # as if stopped before the last step
    assert one_object(command("inspect", run, "--json").out)["steps"] == 3


@pytest.mark.parametrize("name", ["run[b]", "run[/b]", ":smile:", "a run with spaces " * 6])
def test_names_are_shown_as_they_are_and_never_folded(command: Command, name: str) -> None:
    found = command("tune", "edge", "-o", name, *TASK, "--steps", "1")
    assert found.code == 0
    assert f"run     {name}, 1 steps, finished, " in found.out.splitlines()[0]
    assert re.fullmatch(rf"run +{re.escape(name)}", command("inspect", name).out.splitlines()[0])


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"edgezo {edgezo.__version__}\n", "")


def test_no_arguments_show_help(command: Command) -> None:
    found = command()
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith("Usage: edgezo [OPTIONS] COMMAND [ARGS]...\n")
    assert re.findall(r"^  ([a-z]+)  ", found.out, re.MULTILINE) == [
        *("export", "tune", "eval", "predict", "generate", "tasks", "inspect", "demo"),
        *("probe", "replay", "merge", "verify", "diff", "chat", "rate"),
    ]


@pytest.mark.parametrize("name", ["tune", "eval", "generate", "inspect"])
def test_a_command_with_nothing_to_work_on_says_what_is_missing(command: Command, name: str) -> None:
    found = command(name)
    assert (found.code, found.out) == (1, "")
    assert re.fullmatch(rf"error: Missing (argument|option) .*; see: edgezo {name} --help\n", found.err)


def test_an_interrupted_command_says_so(command: Command, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    def interrupt(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgezo.inspection.inspect_path", interrupt)
    assert command("inspect", "edge") == (130, "", "interrupted\n")
    monkeypatch.setattr("edgezo.api.tune", interrupt)
    found = command("tune", "edge", "-o", "other", *TASK)
    assert found == (130, "", "interrupted; nothing was kept, it was before the first step\n")
    assert command("tune", "edge", "-o", run, "--resume").err == "interrupted; whole steps are kept, go on with --resume\n"


def test_an_unknown_option_is_named(command: Command) -> None:
    found = command("eval", "edge", "--data", "rows.jsonl", "--labls", "a,b")
    assert found.code == 1
    assert re.fullmatch(r"error: No such option: --labls.*; see: edgezo eval --help\n", found.err)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--nope"], r"No such option: --nope; see: edgezo --help"),
        (["nothing"], r"No such command 'nothing'; see: edgezo --help"),
        (["tun"], r"No such command 'tun'(\. Did you mean 'tune'\?|;) see: edgezo --help"),  # typer 0.29 has an idea of what was meant
        (["tune", "edge", "-o", "run", "--steps", "abc"], r"Invalid value for '--steps': .*; see: edgezo tune --help"),
        (["tune", "edge", "-o", "run", "--steps"], r"Option '--steps' requires an argument.*"),
        (["inspect", "edge", "other"], r"Got unexpected extra argument.*; see: edgezo inspect --help"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(command: Command, arguments: list[str], told: str) -> None:
    found = command(*arguments)
    assert (found.code, found.out) == (1, "")
    assert re.fullmatch(rf"error: {told}\n", found.err)


def test_modules_run_as_a_command() -> None:
    found = subprocess.run([sys.executable, "-m", "edgezo", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"edgezo {edgezo.__version__}\n"


# failures: one line each, nothing made or changed


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
    assert (
        refusal(*arguments, "--data", "none.jsonl")
        == f"none.jsonl: no such data file in {Path.cwd()}; give the file with --data or --valid"
    )


def test_tune_without_data(refusal: Callable[..., str]) -> None:
    assert refusal("tune", "edge", "-o", "run") == "--data: not given; it is needed"


def test_missing_validation_data(refusal: Callable[..., str]) -> None:
    assert (
        refusal("tune", "edge", "-o", "run", *TASK, "--valid", "none.csv")
        == f"none.csv: no such data file in {Path.cwd()}; give the file with --data or --valid"
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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{nope}", "--template '{nope}': field 'nope' does not exist; rows.jsonl:1 has 'text', 'label'"),
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


@pytest.mark.parametrize("name", ["none", "edge", "rows.jsonl"])
def test_resuming_what_is_no_run(refusal: Callable[..., str], name: str) -> None:
    found = "no such run directory" if name == "none" else "no run in it (journal.bin is missing)"
    expected = f"{name}: {found}; make one with: edgezo tune DIR --data FILE -o {name}"
    assert refusal("tune", "edge", "-o", name, "--resume") == expected


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


# signals


def weights_hash(directory: str, run: str) -> str:
    """SHA-256 over the tuned weights of the last step."""
    model = EdgeModel(directory, run=run, step="last", threads=1)
    return hashlib.sha256(b"".join(array.tobytes() for array in model.weights.values())).hexdigest()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_an_interrupted_run_goes_on_to_the_weights_of_one_never_interrupted(command: Command, tmp_path: Path) -> None:
    options = [*PLAIN, "--valid", "rows.jsonl", "--steps", "600", "--batch", "2", "--eval-every", "200", "--lr", "1e-4"]
    tuning = [sys.executable, "-m", "edgezo", "tune", "edge", "-o", "parts", *options]
    with subprocess.Popen(tuning, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        assert any(" s/step " in line for line in process.stderr)  # the first step is made
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    matches(
        rf"run +parts, \d+ steps, interrupted, \d+ s{PEAK}\nbefore +{MEASURED}\n"
        rf"(step \d+ +{MEASURED}, kept as best|best +step 0, the start: .*)\n"
        r"use it +edgezo predict edge --run parts --text '\.\.\.'\ngo on +edgezo tune edge -o parts --resume\n",
        out,
    )
    made = len(read_run("parts").records)
    assert 0 < made < 600
    assert command("eval", "edge", "--data", "rows.jsonl", "--run", "parts", "--step", "last").out.startswith(f"step {made}  accuracy")
    assert " parts, 600 steps, finished, " in command("tune", "edge", "-o", "parts", "--resume", "--threads", "1").out
    assert command("tune", "edge", "-o", "whole", *options).code == 0
    assert weights_hash("edge", "parts") == weights_hash("edge", "whole")
    assert read_run("parts").records == read_run("whole").records


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_an_interrupted_run_as_json_is_one_object_and_code_130(command: Command, tmp_path: Path) -> None:
    tuning = [sys.executable, "-m", "edgezo", "tune", "edge", "-o", "run", *TASK, "--steps", "5000", "--json"]
    with subprocess.Popen(tuning, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        assert any(" s/step " in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    found = one_object(out)
    assert (process.returncode, found["ended"], found["steps"]) == (130, "interrupted", len(read_run("run").records))


# labels for new texts


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


def test_a_classification_without_validation_is_used_to_predict(command: Command) -> None:
    found = command("tune", "edge", "-o", "run", *TASK, "--steps", "1")
    assert found.code == 0
    assert "edgezo predict edge --run run --text '...'" in found.out


@pytest.mark.parametrize("of", [["replay", "edge", "run"], ["merge", "edge", "run", "--format", "hf"]])
def test_writing_the_start_of_a_run_says_that_nothing_in_it_is_tuned(command: Command, run: str, of: list[str]) -> None:
    shutil.rmtree(run)
    assert command("tune", "edge", "-o", run, *PLAIN, "--steps", "2").code == 0
    note = "note: step 0 is the start, nothing in it is tuned; --step last takes the last step"
    assert note in command(*of, "-o", "start", "--step", "0").err
    assert note not in command(*of, "-o", "end", "--step", "last").err


def test_what_is_written_for_others_can_be_read_by_them(command: Command, run: str, tmp_path: Path) -> None:
    assert command("merge", "edge", run, "--format", "hf", "--step", "last", "-o", "folder").code == 0
    assert (tmp_path / "folder" / "model.safetensors").stat().st_mode & 0o044 == 0o044
