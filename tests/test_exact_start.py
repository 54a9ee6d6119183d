"""Runs that start exactly: rebuilt from their journals, resumed wherever they were stopped, and told."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
import transformers
from exact_starts import FEW, ROWS, TASK, only, tuned_run
from reference import edge_log_probs, make_pairs

import edgezo
from edgezo.config import make_config
from edgezo.errors import AdapterError, ConfigError
from edgezo.runtime import exact_start
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.head_rows import NO_ROWS
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import evaluation_records, head_record, offsets_record
from edgezo.runtime.label_start import read_features
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.reports import Reporter
from edgezo.runtime.scoring import Classified, Sequences
from edgezo.runtime.tuned import write_tuned


@pytest.mark.parametrize("settings", [{}, {"adapter": "lora"}, {"adapter": "prefix"}])
def test_a_run_starts_exactly_and_is_rebuilt_from_its_journal(
    export_tiny: Callable[..., Path], rows: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    directory = export_tiny("llama", **settings)
    result = tuned_run(directory, tmp_path / "whole", rows)
    assert result.before is not None
    assert result.start is not None
    assert result.start.score() > result.before.score()
    assert result.start.loss < 0.7 * result.before.loss
    tuned_run(directory, tmp_path / "parts", rows, steps=1)
    resumed = edgezo.tune(directory, tmp_path / "parts", resume=True, steps=3, threads=1)
    assert (resumed.before, resumed.start) == (result.before, result.start)
    contents = [read_journal(tmp_path / name / "journal.bin") for name in ("whole", "parts")]
    assert contents[0].records == contents[1].records
    found = [edge_log_probs(EdgeModel(directory, run=tmp_path / name, step="last", threads=1), make_pairs()) for name in ("whole", "parts")]
    assert np.array_equal(*found)
    start = EdgeModel(directory, run=tmp_path / "whole", step=0, threads=1)
    assert start.head.equals(contents[0].heads[0])
    assert edgezo.evaluate(directory, rows, run=tmp_path / "whole", step=0).evaluation == result.start
    start.use()
    assert start.head is NO_ROWS


def test_a_run_killed_between_its_start_and_its_first_evaluation_goes_on(lora_dir: Path, rows: str, tmp_path: Path) -> None:
    whole = tuned_run(lora_dir, tmp_path / "whole", rows)
    contents = read_journal(tmp_path / "whole" / "journal.bin")
    assert contents.untuned is not None
    assert contents.evaluations[0] == whole.start
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "journal.bin").unlink()
    assert contents.offsets is not None
    first = [*evaluation_records(0, contents.untuned, True), head_record(contents.heads[0]), offsets_record(contents.offsets)]
    Journal.create(tmp_path / "killed" / "journal.bin", contents.header, first).close()
    assert read_journal(tmp_path / "killed" / "journal.bin").evaluations == {}
    resumed = edgezo.tune(lora_dir, tmp_path / "killed", resume=True, threads=1)
    assert (resumed.before, resumed.start, resumed.best) == (whole.before, whole.start, whole.best)
    assert (tmp_path / "killed" / "journal.bin").read_bytes() == (tmp_path / "whole" / "journal.bin").read_bytes()


def test_losses_are_measured_as_if_the_start_had_not_seen_their_rows(
    lora_dir: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offset scores are those of fits on the other folds, for the rows of the file in their order."""
    only(monkeypatch, "rows of the head")
    tuned_run(lora_dir, tmp_path / "run", rows, steps=0, labels="what,of")
    offsets = read_journal(tmp_path / "run" / "journal.bin").offsets
    assert offsets is not None
    assert sorted(offsets.rows) == list(range(len(ROWS)))
    model = EdgeModel(lora_dir, threads=1)
    config = make_config(None, {"data": rows}, None, {"template": TASK["template"], "labels": "what,of", **FEW})
    dataset = read_dataset(model, config)
    objective = Objective(Sequences(model), dataset.task, dataset.config)
    examples = [dataset.train.examples[row] for row in offsets.rows]
    (fit, *_) = exact_start.label_fits(objective, examples, read_features(objective, examples, 2))
    model.head = fit.make()
    assert objective.loss(dataset.with_offsets(offsets).train.examples) == pytest.approx(fit.held_out, abs=1e-3)
    assert objective.loss(dataset.train.examples) < 0.9 * fit.held_out


def test_the_steps_of_a_run_are_derived_again_with_its_head(lora_dir: Path, rows: str, tmp_path: Path, invoke: Any) -> None:
    tuned_run(lora_dir, tmp_path / "run", rows)
    found = json.loads(invoke("verify", str(tmp_path / "run"), "--base", str(lora_dir), "--every", "1", "--threads", "1", "--json").out)
    assert (found["steps_derived_again"], found["verdict"]) == (3, "no fault found")


def test_the_stages_of_a_start_are_told(lora_dir: Path, rows: str, write_rows: Callable[..., str], tmp_path: Path) -> None:
    stages: list[str] = []
    tuned_run(lora_dir, tmp_path / "run", rows, reporter=Reporter(stage=stages.append))
    begin = stages.index("validating the model as it is")
    count = len(ROWS)
    assert stages[begin + 1 : begin + 3] == [f"reading {count} rows for the exact start", f"solving the exact start from {count} rows"]
    assert stages[begin + 3].startswith("putting ")
    assert stages[begin + 4] == f"validating {stages[begin + 3].removeprefix('putting ').removesuffix(' into the model')}"
    stages.clear()
    texts = write_rows([{"prompt": row["text"], "completion": " it was"} for row in ROWS], "texts.jsonl")
    edgezo.tune(lora_dir, tmp_path / "texts", data=texts, threads=1, **FEW, reporter=Reporter(stage=stages.append))
    assert [stage.split()[0] for stage in stages if "start" in stage or "own" in stage][:3] == ["letting", "reading", "solving"]


def test_a_masked_model_starts_exactly(tmp_path: Path, rows: str) -> None:
    directory = edgezo.export_model(tiny_encoders.save(tmp_path / "source", "bert"), tmp_path / "edge").directory
    template = "{text} It was {mask} ."
    result = edgezo.tune(directory, tmp_path / "run", data=rows, valid=rows, steps=1, threads=1, template=template, labels="bad,good")
    assert result.before is not None
    assert result.start is not None
    assert result.start.loss < 0.5 * result.before.loss


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_classifier_starts_exactly_and_goes_to_hugging_face(tmp_path: Path, rows: str, name: str) -> None:
    source = tiny_encoders.save(tmp_path / "source", name, head="")
    directory = edgezo.export_model(source, tmp_path / "edge", classes="bad,good", adapter="lora").directory
    result = edgezo.tune(directory, tmp_path / "run", data=rows, valid=rows, steps=1, directions=4, threads=1, template="{text}")
    assert result.before is not None
    assert result.start is not None
    assert result.start.loss < 0.8 * result.before.loss
    model = EdgeModel(directory, run=tmp_path / "run", step="last", threads=1)
    text = model.text.encode("the film is great", True)
    expected = np.concatenate(Sequences(model).log_probs([Classified(text, target) for target in (0, 1)]))
    write_tuned(directory, [tmp_path / "run"], [1.0], "last", tmp_path / "hf", "hf", threads=1)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    found = torch.log_softmax(network(torch.tensor([text])).logits[0], 0).detach().numpy()
    assert np.abs(found - expected).max() < 1e-4
    message = f"{model.manifest.origin.id}: the run changed rows of the head beside LoRA at the same layer, which a PEFT folder cannot hold; use --format hf or edge, or tune with --start none"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        write_tuned(directory, [tmp_path / "run"], [1.0], "last", tmp_path / "peft", "peft", threads=1)


def test_what_the_start_did_is_told(lora_dir: Path, rows: str, tmp_path: Path, invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "rows of the head")
    options = ["--template", TASK["template"], "--labels", TASK["labels"], "--threads", "1", "--directions", "4", "--steps", "1"]
    found = invoke("tune", str(lora_dir), "--data", rows, "--valid", rows, "-o", str(tmp_path / "run"), *options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, start = (100 * summary[name]["accuracy"] for name in ("before", "start"))
    losses = " -> ".join(f"{summary[name]['loss']:.3f}" for name in ("before", "start"))
    told = (
        f"exact start: rows of the head for 2 label words, from 24 rows: validation accuracy {before:.1f} % -> {start:.1f} %, loss {losses}"
    )
    assert told in " ".join(found.err.split())
    assert re.search(rf"^before +accuracy {before:.1f} %.*\nexact start +accuracy {start:.1f} %", found.out, re.M)


def test_inspect_tells_of_the_start(invoke: Any, lora_dir: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, shown in (("rows of the head", "2 tokens"), ("a probe", "2 tokens, and a probe of the attention of 2 layers")):
        with monkeypatch.context() as patched:
            only(patched, kind)
            result = tuned_run(lora_dir, tmp_path / kind, rows, steps=0)
        found = json.loads(invoke("inspect", str(tmp_path / kind), "--json").out)
        assert found["head_at_start"] == f"rows of the head for {shown}"
        assert found["valid_before_start"] == result.before.as_dict()
        assert found["valid_at_step_0"] == result.start.as_dict()
    tuned_run(lora_dir, tmp_path / "none", rows, steps=0, start="none")
    assert not {"head_at_start", "valid_before_start"} & json.loads(invoke("inspect", str(tmp_path / "none"), "--json").out).keys()


def test_a_start_of_the_head_alone_leaves_the_attention_as_it_is(lora_dir: Path, rows: str, tmp_path: Path) -> None:
    tuned_run(lora_dir, tmp_path / "run", rows, steps=0, start="head")
    head = read_journal(tmp_path / "run" / "journal.bin").heads[0]
    assert len(head.tokens) == 2
    assert not head.probe.size
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start"] == "head"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"labels": None, "template": None},
            "--start exact: rows of kind preference have no exact start, give rows with right texts; or give --start none",
        ),
        (
            {"labels": "great,great film"},
            "--start exact: the label words great, great film do not begin with tokens of their own, choose other words; or give --start none",
        ),
    ],
)
def test_an_exact_start_that_cannot_be_is_refused(
    lora_dir: Path, write_rows: Callable[..., str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    rows = write_rows([{**row, "prompt": row["text"], "chosen": "yes", "rejected": "no"} for row in ROWS])
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        tuned_run(lora_dir, tmp_path / "run", rows, start="exact", **settings)
    assert not (tmp_path / "run").exists()
    notices: list[str] = []
    reporter = edgezo.Reporter(notice=notices.append)
    tuned_run(lora_dir, tmp_path / "run", rows, reporter=reporter, **settings)
    reason = message.removeprefix("--start exact: ").removesuffix("; or give --start none")
    assert [text for text in notices if "exact start" in text] == ([f"no exact start: {reason}"] if settings["labels"] else [])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start"] == "none"


def test_no_steps_are_an_exact_start_alone(lora_dir: Path, rows: str, tmp_path: Path) -> None:
    result = tuned_run(lora_dir, tmp_path / "run", rows, steps=0)
    assert (result.steps, result.ended, result.best_step) == (0, "finished", 0)
    assert result.best == result.start != result.before
    resumed = edgezo.tune(lora_dir, tmp_path / "run", resume=True, steps=2, threads=1)
    assert (resumed.steps, resumed.start) == (2, result.start)
    assert resumed.forward_rows >= result.forward_rows + 2 * 2 * 8


@pytest.mark.parametrize("helps", [True, False])
@pytest.mark.parametrize("given", [{}, {"eps": 2**-8, "lr": 1e-3}])
@pytest.mark.parametrize(("adapter", "more"), [("lora", 0), (None, 1)])
def test_what_the_start_has_validated_is_not_validated_again(
    export_tiny: Callable[..., Path],
    write_rows: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: str | None,
    more: int,
    given: dict[str, float],
    helps: bool,
) -> None:
    """Weights in place are rounded for the run's eps after the start, so that theirs is another model."""
    directory = export_tiny("llama", **({"adapter": adapter} if adapter is not None else {}))
    found: list[Any] = []
    stages: list[str] = []
    evaluate = Objective.evaluate
    monkeypatch.setattr(Objective, "evaluate", lambda *of: found.append(evaluate(*of)) or found[-1])
    valid = write_rows(ROWS if helps else [{**row, "label": 1 - int(row["label"])} for row in ROWS], "valid.jsonl")
    settings: dict[str, Any] = {**TASK, **FEW, "steps": 0, **given}
    result = edgezo.tune(
        directory, tmp_path / "run", data=write_rows(ROWS), valid=valid, **settings, reporter=Reporter(stage=stages.append)
    )
    assert len(found) == sum(stage.startswith("validating ") for stage in stages) + more
    assert (result.start is not None) == helps
    assert result.best == edgezo.evaluate(directory, valid, run=tmp_path / "run", step=0).evaluation
