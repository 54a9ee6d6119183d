"""An exact start goes wherever a run goes: adapters, folders, edge models, averages."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from exact_starts import FEW, TASK, only, tuned_run
from reference import edge_log_probs, make_pairs, network_log_probs, peft_network, randomise, write_adapter

import edgezo
from edgezo.errors import AdapterError, EdgeModelError, RunError
from edgezo.runtime import head_rows
from edgezo.runtime.head_rows import NO_ROWS, HeadRows
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.tuned import write_tuned
from edgezo.storage import sha256_file


@pytest.fixture(params=["rows of the head", "a probe"])
def run(lora_dir: Path, rows: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A run of LoRA with an exact start of either kind, and the scores of its last step."""
    only(monkeypatch, request.param)
    tuned_run(lora_dir, tmp_path / "run", rows, lr=5e-2, rank=1)
    return tmp_path / "run", edge_log_probs(EdgeModel(lora_dir, run=tmp_path / "run", step="last", threads=1), make_pairs())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_peft_folder_holds_the_rows(lora_dir: Path, rows: str, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "peft", threads=1)
    assert np.abs(network_log_probs(peft_network("llama", tmp_path / "out"), make_pairs()) - run[1]).max() < 1e-4
    model = EdgeModel(lora_dir, adapter=tmp_path / "out", threads=1)
    assert np.abs(edge_log_probs(model, make_pairs()) - run[1]).max() < 1e-5
    edgezo.tune(lora_dir, tmp_path / "next", data=rows, init=str(tmp_path / "out"), start="none", **{**TASK, **FEW})
    start = EdgeModel(lora_dir, run=tmp_path / "next", step=0, threads=1)
    assert np.abs(edge_log_probs(start, make_pairs()) - run[1]).max() < 1e-4


def test_an_onnx_adapter_holds_the_rows(lora_dir: Path, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "a.onnx_adapter", "onnx-adapter", threads=1)
    model = EdgeModel(lora_dir, adapter=tmp_path / "a.onnx_adapter", threads=1)
    assert np.abs(edge_log_probs(model, make_pairs()) - run[1]).max() < 1e-5


def test_a_hugging_face_folder_has_a_head_of_its_own(lora_dir: Path, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "hf", threads=1)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert np.abs(network_log_probs(network, make_pairs()) - run[1]).max() < 1e-4
    assert network.lm_head.weight is not network.model.embed_tokens.weight


def test_an_edge_model_holds_the_rows_and_can_be_tuned_on(lora_dir: Path, rows: str, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "edge", threads=1)
    assert np.abs(edge_log_probs(EdgeModel(tmp_path / "out", threads=1), make_pairs()) - run[1]).max() < 1e-4
    result = tuned_run(tmp_path / "out", tmp_path / "again", rows, steps=1)
    assert result.before == edgezo.evaluate(tmp_path / "out", rows, **TASK).evaluation
    write_tuned(tmp_path / "out", [tmp_path / "again"], [1.0], 0, tmp_path / "twice", "edge", threads=1)
    once, twice = (EdgeModel(path, threads=1) for path in (tmp_path / "out", tmp_path / "twice"))
    started = EdgeModel(tmp_path / "out", run=tmp_path / "again", step=0, threads=1)
    assert twice.head.equals(started.head)
    assert twice.head.rows.shape == once.head.rows.shape


def test_a_damaged_head_file_is_refused(lora_dir: Path, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "edge", threads=1)
    path = tmp_path / "out" / "head.bin"
    data = path.read_bytes()
    path.write_bytes(np.array([1, 1], "<i8").tobytes() + data[16:])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"]["head.bin"]["sha256"] = sha256_file(path)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    message = f"{path}: rows of the head of tokens that the model has not, twice, or not finite; copy or merge the edge model again"
    with pytest.raises(EdgeModelError, match=f"^{re.escape(message)}$"):
        EdgeModel(tmp_path / "out", threads=1)
    manifest["tensors"] = [tensor for tensor in manifest["tensors"] if tensor["name"] != "head_tokens"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    left = ", ".join(name for name in ("head_rows", "probe_A") if name in {tensor["name"] for tensor in manifest["tensors"]})
    message = f"{tmp_path / 'out' / 'manifest.json'}: its rows of the head ({left}) do not fit each other; export the model again"
    with pytest.raises(EdgeModelError, match=f"^{re.escape(message)}$"):
        EdgeModel(tmp_path / "out", threads=1)


def test_an_older_export_refuses_what_it_cannot_be_fed(lora_dir: Path, rows: str, run: tuple[Path, Any], tmp_path: Path) -> None:
    """The same weights, but graphs without inputs for rows of the head would give other scores without a word."""
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "a.onnx_adapter", "onnx-adapter", threads=1)
    old = Path(shutil.copytree(lora_dir, tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({**manifest, "version": 3, "probes": []}))
    reason = (
        f"{run[0]}: has an exact start, and {old} was exported without inputs for it; export it again, or give the one it was tuned from"
    )
    with pytest.raises(RunError, match=f"^{re.escape(reason)}$"):
        EdgeModel(old, run=run[0], threads=1)
    probed = read_journal(run[0] / "journal.bin").heads[0].probe.size
    missing = (
        "has a probe of the attention, and this edge model was exported without inputs for it"
        if probed
        else "changes rows of the head, and this edge model was exported without inputs for them"
    )
    reason = f"{tmp_path / 'a.onnx_adapter'}: {missing}; export it again"
    with pytest.raises(AdapterError, match=f"^{re.escape(reason)}$"):
        EdgeModel(old, adapter=tmp_path / "a.onnx_adapter", threads=1)
    with pytest.raises(AdapterError, match=f"^{re.escape(reason)}$"):
        tuned_run(old, tmp_path / "on", rows, init=str(tmp_path / "a.onnx_adapter"), start="none")
    assert not (tmp_path / "on").exists()


def test_inspect_counts_the_rows_and_not_their_numbers(lora_dir: Path, run: tuple[Path, Any], tmp_path: Path, invoke: Any) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "edge", threads=1)
    base, merged = (json.loads(invoke("inspect", str(path), "--json").out)["parameters"] for path in (lora_dir, tmp_path / "out"))
    head = read_journal(run[0] / "journal.bin").heads[0]
    assert merged - base == head.rows.size + head.probe.size


def test_an_exact_start_alone_is_written_without_a_note(lora_dir: Path, rows: str, tmp_path: Path, invoke: Any) -> None:
    tuned_run(lora_dir, tmp_path / "run", rows, steps=0)
    assert "note:" not in invoke("replay", str(lora_dir), str(tmp_path / "run"), "-o", str(tmp_path / "out")).err
    tuned_run(lora_dir, tmp_path / "none", rows, steps=0, start="none")
    assert "note: step 0 is the start" in invoke("replay", str(lora_dir), str(tmp_path / "none"), "-o", str(tmp_path / "other")).err


def test_the_average_of_runs_averages_their_rows(lora_dir: Path, rows: str, run: tuple[Path, Any], tmp_path: Path) -> None:
    tuned_run(lora_dir, tmp_path / "other", rows, start_rows=8, lr=5e-2, rank=1)
    write_tuned(lora_dir, [run[0], tmp_path / "other"], [0.25, 0.75], "last", tmp_path / "out", "edge", threads=1)
    one, other = (EdgeModel(lora_dir, run=path, threads=1).head for path in (run[0], tmp_path / "other"))
    found = EdgeModel(tmp_path / "out", threads=1).head
    assert np.abs(found.rows - (0.25 * one.rows + 0.75 * other.rows)).max() < 1e-6
    assert np.allclose(found.probe, 0.25 * one.probe + 0.75 * other.probe, atol=1e-5)


def test_a_peft_folder_of_a_prefix_cannot_hold_them(prefix_dir: Path, rows: str, tmp_path: Path) -> None:
    tuned_run(prefix_dir, tmp_path / "run", rows)
    message = "source: the run changed rows of the head, which a PEFT folder of a prefix cannot hold; use --format edge, or tune with --start none"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        write_tuned(prefix_dir, [tmp_path / "run"], [1.0], "last", tmp_path / "out", "peft", threads=1)
    assert not (tmp_path / "out").exists()
    write_tuned(prefix_dir, [tmp_path / "run"], [1.0], "last", tmp_path / "edge", "edge", threads=1)
    expected = edge_log_probs(EdgeModel(prefix_dir, run=tmp_path / "run", step="last", threads=1), make_pairs())
    assert np.abs(edge_log_probs(EdgeModel(tmp_path / "edge", threads=1), make_pairs()) - expected).max() < 1e-5


def test_an_adapter_that_changes_too_many_rows_is_refused(lora_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EdgeModel(lora_dir, threads=1)
    randomise(model)
    folder = write_adapter(model, tmp_path / "plain")
    assert EdgeModel(lora_dir, adapter=folder, threads=1).head is NO_ROWS
    head = HeadRows(np.arange(3), np.ones((32, 3), np.float32))
    (tmp_path / "rows").mkdir()
    assert model.adapter is not None
    write_peft(model.adapter, model.manifest, tmp_path / "rows", head)
    monkeypatch.setattr(head_rows, "HEAD_TOKENS_LIMIT", 2)
    message = f"{tmp_path / 'rows'}: changes 3 rows of the head, edgezo takes 2; train the adapter without the head"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        EdgeModel(lora_dir, adapter=tmp_path / "rows", threads=1)
