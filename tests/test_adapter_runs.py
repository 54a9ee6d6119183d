"""Runs of adapters: proven live first, lower in loss, and rebuilt to the last bit."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from damage import rewrite_scoring
from onnx import helper, numpy_helper
from reference import edge_log_probs, make_pairs, randomise, write_adapter
from tiny_adapters import RANK, digest

import edgezo
from edgezo.config import make_config
from edgezo.errors import AdapterError, DeadTensorError, EdgezoError, RunError
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.theta import mutable_weights
from edgezo.runtime.tune import tune

TASK = {"template": "{text} It was", "labels": "terrible,great"}

# adapters are proven live


def test_every_part_of_an_adapter_is_live(adapter_dirs: dict[str, Path]) -> None:
    for directory in adapter_dirs.values():
        model = EdgeModel(directory, threads=1)
        weights = mutable_weights(model, make_config(None, {"data": "no file", "eps": 1e-2}, "lora"))
        before = digest(model)
        prove_live(model, weights)
        assert digest(model) == before


def cut_branch(graph: onnx.GraphProto) -> None:
    """The second target's branch is computed, but nothing reads it."""
    node = next(node for node in graph.node if "edgezo/lora1/branch" in node.input)
    node.op_type = "Identity"
    del node.input[1:]


def silence_branch(graph: onnx.GraphProto) -> None:
    """The second target's branch is multiplied by zero."""
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "silent"))
    place = next(place for place, node in enumerate(graph.node) if "edgezo/lora1/branch" in node.input)
    graph.node[place].input[1] = "silenced"
    graph.node.insert(place, helper.make_node("Mul", ["edgezo/lora1/branch", "silent"], ["silenced"]))


def silence_prefix(graph: onnx.GraphProto) -> None:
    """The values of the second layer are multiplied by zero."""
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "silent"))
    place = next(place for place, node in enumerate(graph.node) if "prefix.1.value" in node.input and node.op_type == "Unsqueeze")
    graph.node[place].input[0] = "silenced"
    graph.node.insert(place, helper.make_node("Mul", ["prefix.1.value", "silent"], ["silenced"]))


@pytest.mark.parametrize(
    ("kind", "damage", "dead", "of", "why"),
    [
        ("lora", cut_branch, ["{1}.lora_A.weight", "{1}.lora_B.weight"], 28, "nothing in the scoring graph uses them"),
        ("lora", silence_branch, ["{1}.lora_A.weight", "{1}.lora_B.weight"], 28, "their changes do not reach the scores"),
        ("prefix", silence_prefix, ["prefix.1.value"], 4, "their changes do not reach the scores"),
    ],
)
def test_a_dead_part_of_an_adapter_is_refused_by_name(
    adapter_dirs: dict[str, Path], reviews: str, tmp_path: Path, kind: str, damage: Any, dead: list[str], of: int, why: str
) -> None:
    directory = Path(shutil.copytree(adapter_dirs[kind], tmp_path / "edge"))
    rewrite_scoring(directory, damage)
    targets = read_manifest(directory).adapter.targets  # type: ignore[union-attr]
    names = ", ".join(re.sub(r"\{1\}", targets[1].module if targets else "", name) for name in dead)
    with pytest.raises(DeadTensorError) as caught:
        edgezo.tune(directory, tmp_path / "run", data=reviews, steps=2, threads=1, directions=2, **TASK)
    assert str(caught.value).startswith(
        f"{directory}: {len(dead)} of {of} tunable tensors would not be tuned, {why}: {names}; export again"
    )
    assert not (tmp_path / "run").exists()


# runs


class Tuned(NamedTuple):
    """A run in memory: its model, and SHA-256 of what was tuned."""

    model: EdgeModel
    digest: str


def run_of(directory: Path, run: Path, reviews: str, resume: bool = False, **settings: Any) -> Tuned:
    model = EdgeModel(directory, threads=1)
    assert model.manifest.adapter is not None
    given = {"data": reviews, "rank": RANK, "directions": 4, "batch": 2, "eval_every": 5, **TASK, **settings}
    kind = model.manifest.adapter.kind
    tune(model, make_config(None, given if kind == "lora" else {**given, "rank": 8}, kind), run, resume=resume)
    return Tuned(model, digest(model))


RUNS = [
    ("lora", {}),
    ("lora", {"tune_a": True}),
    ("lora", {"rule": "sgd", "weight_decay": 0.5}),
    ("prefix", {}),
    ("prefix", {"noise": "gaussian"}),
]


@pytest.mark.parametrize(("kind", "settings"), RUNS)
def test_a_run_is_rebuilt_from_base_and_journal_and_can_be_stopped_and_resumed(
    adapter_dirs: dict[str, Path], reviews: str, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    directory = adapter_dirs[kind]
    settings = {"schedule": "constant", "start": "none", **settings}
    whole = run_of(directory, tmp_path / "whole", reviews, steps=10, **settings)
    rebuilt = EdgeModel(directory, run=tmp_path / "whole", step="last", threads=2)
    assert digest(rebuilt) == whole.digest
    assert np.array_equal(edge_log_probs(rebuilt, make_pairs()), edge_log_probs(whole.model, make_pairs()))
    start = EdgeModel(directory, run=tmp_path / "whole", step=0, threads=1)
    assert np.abs(edge_log_probs(start, make_pairs()) - edge_log_probs(EdgeModel(directory, threads=1), make_pairs())).max() < 1e-4
    half = run_of(directory, tmp_path / "parts", reviews, steps=5, **settings)
    assert digest(EdgeModel(directory, run=tmp_path / "whole", step=5)) == half.digest != whole.digest
    assert run_of(directory, tmp_path / "parts", reviews, resume=True, steps=10, **settings).digest == whole.digest
    assert read_journal(tmp_path / "parts" / "journal.bin").records == read_journal(tmp_path / "whole" / "journal.bin").records
    if kind == "lora":
        assert isinstance(start.adapter, Lora)
        assert isinstance(rebuilt.adapter, Lora)
        assert np.array_equal(start.adapter.a, rebuilt.adapter.a) != bool(settings.get("tune_a"))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_tuning_an_adapter_lowers_the_loss_and_leaves_the_edge_model_as_it_is(
    adapter_dirs: dict[str, Path], reviews: str, tmp_path: Path, kind: str
) -> None:
    before = {path.name: path.read_bytes() for path in adapter_dirs[kind].iterdir()}
    settings = {**TASK, "start": "none", "steps": 40, "directions": 8, "lr": {"lora": 1.2e-2, "prefix": 5e-2}[kind]}
    result = edgezo.tune(adapter_dirs[kind], tmp_path / "run", data=reviews, valid=reviews, threads=1, **settings)
    assert result.before is not None
    assert result.best is not None
    assert result.best.loss < 0.8 * result.before.loss
    assert {path.name: path.read_bytes() for path in adapter_dirs[kind].iterdir()} == before
    found = edgezo.evaluate(adapter_dirs[kind], reviews, run=tmp_path / "run", threads=1)
    assert found.evaluation.loss == pytest.approx(result.best.loss, abs=1e-6)


def test_seeds_and_settings_that_the_weights_depend_on_make_other_runs(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"rank": 2}, {"alpha": 4.0}, {"tune_a": True}, {"rule": "sgd"}, {"directions": 3}]
    digests = {run_of(lora_dir, tmp_path / str(n), reviews, steps=2, **change).digest for n, change in enumerate(changes)}
    assert len(digests) == len(changes)


@pytest.mark.parametrize("name", ["rank", "alpha", "tune_a", "rule", "directions", "batch"])
def test_a_resumed_run_keeps_what_its_weights_depend_on(lora_dir: Path, reviews: str, tmp_path: Path, name: str) -> None:
    run_of(lora_dir, tmp_path / "run", reviews, steps=2)
    before = (tmp_path / "run" / "journal.bin").read_bytes()
    value: Any = {"tune_a": True, "rule": "sgd"}.get(name, 1)
    with pytest.raises(RunError) as caught:
        edgezo.tune(lora_dir, tmp_path / "run", resume=True, steps=4, threads=1, **{name: value})
    own = {"rank": 3, "alpha": 16.0, "tune_a": False, "rule": "normalized", "directions": 4, "batch": 2}[name]
    shown = float(value) if name == "alpha" else value
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: --{name.replace('_', '-')} {shown!r} differs from the run's {own!r}; a resumed run keeps it, start a new run to change it"
    )
    assert (tmp_path / "run" / "journal.bin").read_bytes() == before


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_run_keeps_the_adapter_it_started_from(adapter_dirs: dict[str, Path], reviews: str, tmp_path: Path, kind: str) -> None:
    directory, run = adapter_dirs[kind], tmp_path / "run"
    first = EdgeModel(directory, threads=1)
    randomise(first, rank=2, alpha=3.0)
    folder = write_adapter(first, tmp_path / "adapter")
    result = edgezo.tune(
        directory, run, data=reviews, steps=4, threads=1, directions=4, init=str(folder), schedule="constant", start="none", **TASK
    )
    assert result.steps == 4
    shutil.rmtree(folder)
    start = EdgeModel(directory, run=run, step=0, threads=1)
    assert np.abs(edge_log_probs(start, make_pairs()) - edge_log_probs(first, make_pairs())).max() < 1e-4
    if isinstance(start.adapter, Lora):
        assert (start.adapter.rank, start.adapter.alpha) == (2, 3.0)
    tuned = EdgeModel(directory, run=run, step="last", threads=1)
    assert digest(tuned) != digest(start)
    edgezo.tune(directory, run, resume=True, steps=6, threads=1)
    assert digest(EdgeModel(directory, run=run, step=4)) == digest(tuned) != digest(EdgeModel(directory, run=run, step=6))


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_run_whose_start_was_changed_is_refused(lora_dir: Path, reviews: str, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    model = EdgeModel(lora_dir, threads=1)
    randomise(model)
    edgezo.tune(lora_dir, run, data=reviews, steps=2, threads=1, directions=4, init=str(write_adapter(model, tmp_path / "adapter")), **TASK)
    start = run / "init.safetensors"
    data = start.read_bytes()
    start.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if damage == "missing":
        start.unlink()
    message = f"{start}: missing or changed; the run started from this adapter and cannot be rebuilt, restore it from a copy"
    attempts: list[Callable[[], object]] = [
        lambda: EdgeModel(lora_dir, run=run, threads=1),
        lambda: edgezo.tune(lora_dir, run, resume=True, steps=4, threads=1),
        lambda: model.use(run=run),
    ]
    before = digest(model)
    for attempt in attempts:
        with pytest.raises(RunError) as caught:
            attempt()
        assert str(caught.value) == message
    assert digest(model) == before, "the model is as it was"
    start.write_bytes(data)
    assert EdgeModel(lora_dir, run=run, step="last", threads=1).step == 2


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lora", {"noise": "gaussian"}, "--noise gaussian: directions of LoRA are outer products of signs; leave it out"),
        ("prefix", {"tune_a": True}, "--tune-a: this edge model has no branch points for LoRA; export it with --adapter lora"),
        ("prefix", {"rank": 4}, "--rank: this edge model has no branch points for LoRA; export it with --adapter lora"),
        ("prefix", {"alpha": 1.0}, "--alpha: this edge model has no branch points for LoRA; export it with --adapter lora"),
        (
            "lora",
            {"init": "nowhere"},
            "nowhere: no such adapter; give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)",
        ),
    ],
)
def test_settings_that_do_not_fit_the_adapter_are_refused(
    adapter_dirs: dict[str, Path], reviews: str, tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EdgezoError) as caught:
        edgezo.tune(adapter_dirs[kind], tmp_path / "run", data=reviews, steps=2, threads=1, directions=4, **TASK, **settings)
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_a_run_given_as_an_adapter_is_told(adapter_dirs: dict[str, Path], reviews: str, tmp_path: Path) -> None:
    edgezo.tune(adapter_dirs["lora"], tmp_path / "run", data=reviews, steps=1, threads=1, directions=4, **TASK)
    with pytest.raises(AdapterError) as caught:
        EdgeModel(adapter_dirs["lora"], adapter=tmp_path / "run", threads=1)
    assert str(caught.value).startswith(
        f"{tmp_path / 'run'}: a run, no adapter; make an adapter of it with edgezo merge DIR {tmp_path / 'run'}"
    )
