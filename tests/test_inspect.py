"""What inspect tells of an edge model and of a run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import PLAIN, one_object
from conftest import Command

import edgezo
from edgezo.cli import tune_rows
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import EVALUATION_BYTES, STEP_BYTES
from edgezo.runtime.run import base_id, read_run, read_summary
from edgezo.runtime.run_directory import held_run
from edgezo.runtime.tuner import Tuner
from edgezo.storage import sha256_file


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
        ("base", base_id(read_manifest(Path("edge")))),
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


def test_inspect_tells_what_belongs_together(command: Command) -> None:
    assert command("tune", "edge", "-o", "run", *PLAIN, "--steps", "1").code == 0
    assert command("replay", "edge", "run", "-o", "mine").code == 0
    edge, run, mine = (dict(facts(command("inspect", path).out)) for path in ("edge", "run", "mine"))
    assert run["base"] == edge["base"] != mine["base"]
    assert mine["tuned"] == f"step 1 of the run with journal {run['journal sha256'][:12]} on base {edge['base'][:12]}, share 1"


def test_inspect_of_a_run(command: Command) -> None:
    template, limits = ["--template", "{text} It was"], ["--minutes", "60", "--steps", "2"]
    options = [*template, "--valid", "rows.jsonl", *limits, "--eval-every", "1", "--seed", "5"]
    assert command("tune", "edge", "-o", "run", *PLAIN, *options).code == 0
    state, journal = read_run("run"), Path("run/journal.bin")
    steps = len(state.records)
    valid = {
        step: f"rows 16, loss {e.loss:.6g}, accuracy {e.accuracy:.6g}, macro_f1 {e.macro_f1:.6g}" for step, e in state.evaluations.items()
    }
    assert facts(command("inspect", "run").out) == [
        ("run", "run"),
        ("steps", str(steps)),
        ("ended", "finished"),
        ("best step", str(state.best_step)),
        ("seconds", f"{read_summary(Path('run'))['seconds']:g}"),
        ("base", state.header["base"]),
        ("journal bytes", str(journal.stat().st_size)),
        ("journal sha256", sha256_file(journal)),
        *((f"valid at step {step}", valid[step]) for step in dict.fromkeys([0, state.best_step, steps])),
        ("last loss", f"{state.records[-1].loss:.6g}"),
        ("data", "rows.jsonl"),
        ("valid", "rows.jsonl"),
        ("template", "{text} It was"),
        ("labels", "0=terrible, 1=great"),
        ("label field", "label"),
        ("steps asked", "2"),
        ("minutes", "60"),
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


def test_inspect_does_not_tell_an_end_that_is_not_that_of_the_journal(command: Command, tmp_path: Path, run: str) -> None:
    def ended() -> tuple[Any, str]:
        return one_object(command("inspect", run, "--json").out)["ended"], dict(facts(command("inspect", run).out))["ended"]

    assert ended() == ("finished", "finished")
    summary, unknown = (
        tmp_path / run / "summary.json",
        (None, "not recorded, it was cut off or failed; go on with: edgezo tune DIR -o run --resume"),
    )
    summary.write_text(json.dumps({**json.loads(summary.read_text(encoding="utf-8")), "steps": 3}), encoding="utf-8")
    assert ended() == unknown
    summary.unlink()
    assert ended() == unknown


def test_inspect_knows_a_run_that_goes_on(command: Command, tmp_path: Path, run: str) -> None:
    with held_run(tmp_path / run, resume=True):
        assert one_object(command("inspect", run, "--json").out)["ended"] == "not yet, a process is tuning it"
    assert one_object(command("inspect", run, "--json").out)["ended"] == "finished"


def test_inspect_does_not_tell_the_end_before_a_resume_that_was_cut_off(
    command: Command, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    def stop(self: Tuner, opening_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "loop", stop)
    assert command("tune", "edge", "-o", run, "--resume", "--steps", "9").code == 130
    found = one_object(command("inspect", run, "--json").out)
    assert (found["steps"], found["steps_asked"], found["ended"]) == (4, 9, None)


def test_inspect_tells_what_a_rate_was_lowered_to(command: Command, lora_dir: Path, reviews: str) -> None:
    settings = {"data": reviews, "lr": 3.0, "eps": 2**-8, "schedule": "constant", "start": "none", "threads": 1}
    result = edgezo.tune(lora_dir, "run", steps=12, template="{text} It was", labels="terrible,great", **settings)
    journal, found = read_run("run").journal, facts(command("inspect", "run").out)
    assert journal.undos > 0
    times = f"{journal.undos} time{'s' if journal.undos > 1 else ''}"
    told = dict(tune_rows(lora_dir, Path("run"), result))["gone back"]
    assert told == f"{times}, the loss rose or was not finite; lr 3, at the end {3 * journal.lr_scale:.3g}"
    summary = Path("run/summary.json")
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "seconds": 1234.5}))
    assert ("seconds", "1234.5") in facts(command("inspect", "run").out)
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "steps": 11}))  # of a run that went on since
    assert ("seconds", "1234.5") not in facts(command("inspect", "run").out)
    assert ("times gone back", str(journal.undos)) in found
    place = found.index(("lr", "3"))
    assert found[place + 1] == ("lr lowered to", f"{3 * journal.lr_scale:.6g}")


def test_inspect_tells_a_rate_that_was_halved(command: Command, run: str) -> None:
    with Journal.reopen(Path(run) / "journal.bin", read_journal(Path(run) / "journal.bin")) as journal:
        journal.undo(4, 0.5)  # as the loop does where nothing gets better
    found = facts(command("inspect", run).out)
    lr = read_run(run).config.lr
    assert lr is not None
    assert ("lr lowered to", f"{lr / 2:.6g}") in found
    assert not any(name == "times gone back" for name, _ in found)
