"""The commands as a person meets them: what tuning tells, help, signals that lose nothing."""

import hashlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from command_line import MEASURED, PEAK, PLAIN, TASK, contents, matches, one_object
from conftest import Command

import edgezo
from edgezo.cli import tune_rows
from edgezo.runtime import tuner
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.reports import Reporter
from edgezo.runtime.run import read_run
from edgezo.runtime.tuner import Tuner

# results


def test_tune_tells_before_after_and_what_to_do_next(command: Command) -> None:
    found = command("tune", "edge", "-o", "run", *PLAIN, "--valid", "rows.jsonl", "--steps", "4", "--eval-every", "2", "--lr", "1e-4")
    matches(
        rf"run     run, 4 steps, finished, \d+ s{PEAK}\n"
        rf"before  {MEASURED}\n"
        rf"step \d  {MEASURED}, kept as best\n"
        r"use it  edgezo predict edge --run run --text '\.\.\.'\n"
        r"go on   edgezo tune edge -o run --resume --steps 8\n",
        found.out,
    )
    assert found.code == 0


def test_tune_shows_its_progress_on_standard_error(command: Command) -> None:
    found = command("tune", "edge", "-o", "run", *PLAIN, "--valid", "rows.jsonl", "--steps", "3", "--eval-every", "2", "--lr", "1e-4")
    step = r"training loss \d+\.\d{4}  \d+\.\d\d s/step  \d+:\d\d left\n"
    matches(
        r"  reading data\n  16 rows of kind classification \((?:great 8, terrible 8|terrible 8, great 8)\); 16 for validation\n"
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


@pytest.mark.parametrize(("steps", "few"), [(1, 0), (3, 1), (20, 8)])
def test_tune_without_validation_tells_the_training_loss(command: Command, steps: int, few: int) -> None:
    out = command("tune", "edge", "-o", "run", *TASK, "--steps", str(steps)).out
    ran, *loss, use, more = [re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines()]
    assert re.fullmatch(rf"run, {steps} steps?, finished, \d+ s{PEAK}", ran[1])
    assert (use[0], more[0]) == ("use it", "go on")
    losses = [record.loss for record in read_run("run").records]
    first, last = (f"{sum(part) / few:.4f}" if few else "" for part in (losses[:few], losses[-few:]))
    told = f"{first} over the first {few} step{'s' if few > 1 else ''}, {last} over the last"
    assert loss == ([["training loss", told]] if few else [])


def test_tune_says_when_no_step_was_better_than_the_base(command: Command) -> None:
    found = command("tune", "edge", "-o", "run", *PLAIN, "--valid", "rows.jsonl", "--steps", "2", "--lr", "1e-12")
    expected = "best    step 0, the start: no evaluated step was better by accuracy, then loss; --step last uses step 2"
    assert "--run run --text" in found.out
    assert (found.code, found.out.splitlines()[2]) == (0, expected)


def test_tune_says_when_no_later_step_was_evaluated(command: Command, exported_dir: Path) -> None:
    stop = Reporter(step=lambda report: signal.raise_signal(signal.SIGTERM))
    settings = {"template": "{text}\nIt was", "labels": "terrible,great", "lr": 1e-4, "valid": "rows.jsonl", "start": "none"}
    result = edgezo.tune(exported_dir, "run", data="rows.jsonl", steps=5, threads=1, reporter=stop, **settings)
    rows = dict(tune_rows(exported_dir, Path("run"), result))
    assert rows["best"] == "step 0, the start: no later step was evaluated; --step last uses step 1"
    assert rows["run"].startswith("run, 1 step, interrupted, ")
    assert rows["use it"] == f"edgezo predict {exported_dir} --run run --step last --text '...'"


@pytest.mark.parametrize(
    ("budget", "ended", "more"),
    [
        ({"steps": 0}, "finished", "--steps 500"),
        ({"steps": 3}, "finished", "--steps 6"),
        ({"minutes": 0.001}, "out of time", "--minutes 0.1"),
    ],
)
def test_a_run_tells_how_to_go_on_for_longer(command: Command, exported_dir: Path, budget: dict[str, Any], ended: str, more: str) -> None:
    edge = Path("an edge model")
    edge.symlink_to(exported_dir)
    settings = {"template": "{text} It was", "labels": "terrible,great", "start": "none", "eps": 1e-3, "lr": 1e-4}
    result = edgezo.tune(edge, "run", data="rows.jsonl", threads=1, **budget, **settings)
    assert result.ended == ended
    told = dict(tune_rows(edge, Path("run"), result._replace(seconds=1.0)))
    assert told["go on"] == f"edgezo tune 'an edge model' -o run --resume {more}"
    assert told["use it"] == "edgezo predict 'an edge model' --run run --text '...'"
    if budget.get("steps") != 0:  # 500 steps take ten seconds
        typed = shlex.split(told["go on"].replace("--minutes 0.1", f"--minutes 1 --steps {result.steps + 1}"))
        assert command(*typed[1:], "--threads", "1").code == 0
        assert len(read_run("run").records) > result.steps


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


@pytest.mark.parametrize("name", ["run[b]", "run[/b]", ":smile:", "a run with spaces " * 6])
def test_names_are_shown_as_they_are_and_never_folded(command: Command, name: str) -> None:
    found = command("tune", "edge", "-o", name, *TASK, "--steps", "1")
    assert found.code == 0
    assert f"run     {name}, 1 step, finished, " in found.out.splitlines()[0]
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


def test_a_run_that_is_terminated_before_its_first_step_leaves_nothing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminate(*arguments: Any, **named: Any) -> None:
        assert Path("other").is_dir()
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("edgezo.runtime.tune.read_dataset", terminate)
    found = command("tune", "edge", "-o", "other", *TASK)
    assert (found.code, found.err.splitlines()[-1]) == (130, "interrupted; nothing was kept, it was before the first step")
    assert not Path("other").exists()
    assert signal.getsignal(signal.SIGTERM) is before


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
    assert "  stopping after what is under way\n" in err
    matches(
        rf"run +parts, \d+ steps, interrupted, \d+ s{PEAK}\nbefore +{MEASURED}\n"
        rf"(step \d+ +{MEASURED}, kept as best|best +step 0, the start: .*)\n"
        r"use it +edgezo predict edge --run parts( --step last)? --text '\.\.\.'\ngo on +edgezo tune edge -o parts --resume\n",
        out,
    )
    made = len(read_run("parts").records)
    assert 0 < made < 600
    assert command("eval", "edge", "--data", "rows.jsonl", "--run", "parts", "--step", "last").out.startswith(f"step {made}  accuracy")
    assert " parts, 600 steps, finished, " in command("tune", "edge", "-o", "parts", "--resume", "--threads", "1").out
    assert command("tune", "edge", "-o", "whole", *options).code == 0
    assert weights_hash("edge", "parts") == weights_hash("edge", "whole")
    assert read_run("parts").records == read_run("whole").records


def test_a_run_that_is_asked_to_stop_does_not_look_back_first(
    edge_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the second step rows are scored again; whoever waits for the run to end waits for its step alone."""
    stopping, looked = threading.Event(), list[int]()
    look = Tuner._look
    monkeypatch.setattr(tuner, "stop_signals", lambda told: nullcontext(stopping))
    monkeypatch.setattr(Tuner, "_look", lambda self, *given: (looked.append(len(self.records)), look(self, *given))[1])
    settings: dict[str, Any] = {"data": reviews, "template": "{text} It was", "labels": "terrible,great", "threads": 1, "lr": 1e-4}
    settings |= {"steps": 4, "eval_every": 2, "valid": reviews, "start": "none"}
    reporter = Reporter(step=lambda report: stopping.set() if report.step == 2 else None)
    result = edgezo.tune(edge_dir, tmp_path / "parts", reporter=reporter, **settings)
    assert (result.steps, result.ended, looked) == (2, "interrupted", [1])
    stopping.clear()
    edgezo.tune(edge_dir, tmp_path / "parts", resume=True, threads=1)
    assert looked == [1, 2, 3, 4]
    edgezo.tune(edge_dir, tmp_path / "whole", **settings)
    parts, whole = (read_run(tmp_path / name) for name in ("parts", "whole"))
    assert (parts.records, parts.evaluations) == (whole.records, whole.evaluations)


def test_a_run_that_is_asked_to_stop_in_an_evaluation_makes_no_step_more(
    edge_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = threading.Event()
    monkeypatch.setattr(tuner, "stop_signals", lambda told: nullcontext(stopping))
    settings: dict[str, Any] = {"data": reviews, "template": "{text} It was", "labels": "terrible,great", "threads": 1, "lr": 1e-4}
    settings |= {"steps": 4, "eval_every": 2, "valid": reviews, "start": "none"}
    reporter = Reporter(evaluation=lambda step, found, best: stopping.set() if step == 2 else None)
    result = edgezo.tune(edge_dir, tmp_path / "parts", reporter=reporter, **settings)
    assert (result.steps, result.ended) == (2, "interrupted")
    stopping.clear()
    edgezo.tune(edge_dir, tmp_path / "parts", resume=True, threads=1)
    edgezo.tune(edge_dir, tmp_path / "whole", **settings)
    parts, whole = (read_run(tmp_path / name) for name in ("parts", "whole"))
    assert (parts.records, parts.evaluations) == (whole.records, whole.evaluations)


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


# after a run


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


@pytest.mark.parametrize(("command", "code"), [("tasks", 0), ("inspect none", 1), ("generate none --prompt -", 1)])
def test_closed_streams_are_nothing_to_stop_at(tmp_path: Path, command: str, code: int) -> None:
    check = f"""import os, sys, atexit, edgezo.cli
sys.argv = {["edgezo", *command.split()]}
atexit.register(lambda: open("opened", "w").write(str(os.open("other", os.O_CREAT | os.O_RDWR))))
edgezo.cli.main()
"""
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, check], cwd=tmp_path)
    assert done.returncode == code
    assert int((tmp_path / "opened").read_text()) > 2
