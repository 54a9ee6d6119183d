"""Heads on pooled token states, and what a probe reads of encoders, against PyTorch's own numbers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_encoders
import torch
import transformers
from refusals import refusal

from edgezo import api
from edgezo.errors import AdapterError, ConfigError, EdgeModelError, ExportError
from edgezo.export import export_model
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.hugging_face import write_hugging_face
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.scoring import Classified, Masked, Sequences

TEXTS = ["user", "the plot is terrible and the film is great and the plot is great", "a great film", "user"]
ROWS = [("a great film", 1), ("a terrible plot", 0), ("the plot is great", 1), ("the film is terrible", 0)] * 4
TOLERANCE = 1e-4
POOLER = ["albert", "bert"]

Arrays = npt.NDArray[np.float32]
Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a tiny encoder with a new head of two classes, once for each name and settings; shared, never to be changed."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str = "bert", **settings: Any) -> Path:
        key = (name, *(f"{setting}={value}" for setting, value in sorted(settings.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("pooling")
            source = tiny_encoders.save(folder / "source", name, "")
            made[key] = export_model(str(source), folder / name, classes="negative,positive", **settings).directory
            shutil.rmtree(source)
        return made[key]

    return make


@pytest.fixture
def data(write_rows: Callable[..., str]) -> str:
    return write_rows([{"text": text, "label": label} for text, label in ROWS])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A BERT without a head."""
    return tiny_encoders.save(tmp_path / "source", "bert", "")


def pool_as(source: Path, config: Any) -> Path:
    """Make a sentence-transformers folder of a source."""
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return source


def tokens(name: str, texts: list[str] = TEXTS) -> list[list[int]]:
    tokenizer = tiny_encoders.make_tokenizer(name)
    return [tokenizer(text)["input_ids"] for text in texts]


def pooled(network: Any, ids: list[list[int]], pooling: str) -> Arrays:
    """Row by row, without padding."""
    with torch.no_grad():
        states = [network(torch.tensor([row])).last_hidden_state[0] for row in ids]
    return np.stack([(state.mean(0) if pooling == "mean" else state[0]).numpy() for state in states])


def read_by_last_linear(network: Any, ids: list[list[int]]) -> Arrays:
    """What the last linear layer of a network is given, row by row."""
    *_, last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
    seen: list[Arrays] = []
    hook = last.register_forward_hook(lambda module, given, made: seen.append(given[0][0].numpy()))
    with torch.no_grad():
        for row in ids:
            network(torch.tensor([row]))
    hook.remove()
    return np.stack(seen)


def found_states(directory: Path, ids: list[list[int]], **settings: Any) -> Arrays:
    model = EdgeModel(directory, threads=1, **settings)
    return Sequences(model).hidden_states([Classified(row, 1) for row in ids])


# scores and states


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_a_pooled_head_scores_as_pytorch_computes_it(name: str, pooling: str, export: Callable[..., Path]) -> None:
    model = EdgeModel(export(name, pooling=pooling), threads=1)
    ids = tokens(name)
    states = pooled(tiny_encoders.make_model(name, ""), ids, pooling)
    logits = torch.from_numpy(states @ model.weights["classifier.weight"].T + model.weights["classifier.bias"])
    found = np.concatenate(Sequences(model).log_probs([Classified(row, target) for row in ids for target in (0, 1)])).reshape(-1, 2)
    assert np.abs(found - torch.log_softmax(logits.double(), -1).numpy()).max() < TOLERANCE
    assert np.ptp(found[:3], axis=0).min() > 100 * TOLERANCE
    assert np.abs(found_states(export(name, pooling=pooling), ids) - states).max() < TOLERANCE
    assert (model.manifest.pooling, model.manifest.new_weights) == (pooling, ["classifier.bias", "classifier.weight"])
    assert not any("pooler" in weight for weight in model.weights)


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_hidden_is_what_the_last_layer_of_a_models_own_head_reads(name: str, tmp_path: Path) -> None:
    source = tiny_encoders.save(tmp_path / "source", name, "SequenceClassification", num_labels=3)
    directory = export_model(str(source), tmp_path / "edge").directory
    expected = read_by_last_linear(tiny_encoders.make_model(name, "SequenceClassification", num_labels=3), tokens(name))
    assert np.abs(found_states(directory, tokens(name)) - expected).max() < TOLERANCE
    assert np.ptp(expected[:3], axis=0).max() > 0.1


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_hidden_of_a_masked_model_is_what_the_vocabulary_projection_reads(name: str, tmp_path: Path) -> None:
    directory = export_model(str(tiny_encoders.save(tmp_path / "source", name)), tmp_path / "edge").directory
    network, ids = tiny_encoders.make_model(name), tokens(name)
    places = [1, 4, 2, 1]
    expected = []
    hook = network.get_output_embeddings().register_forward_hook(lambda module, given, made: expected.append(given[0][0].numpy()))
    with torch.no_grad():
        for row in ids:
            network(torch.tensor([row]))
    hook.remove()
    found = Sequences(EdgeModel(directory, threads=1)).hidden_states([Masked(*row, 7) for row in zip(ids, places, strict=True)])
    assert np.abs(found - np.stack([states[place] for states, place in zip(expected, places, strict=True)])).max() < TOLERANCE


@pytest.mark.parametrize(
    "settings", [{"weights": "int8"}, {"weights": "int4"}, {"weights": "fp16"}, {}], ids=["int8", "int4", "fp16", "fp32"]
)
def test_hidden_is_found_behind_branch_points(settings: dict[str, str], export: Callable[..., Path], data: str, tmp_path: Path) -> None:
    directory = export(adapter="lora", pooling="mean", **settings)
    checked = read_manifest(directory).verification
    assert checked is not None
    assert checked.largest_log_prob_difference < TOLERANCE
    base = found_states(directory, tokens("bert"))
    api.tune(directory, tmp_path / "run", data=data, template="{text}", steps=4, rank=2, lr=5e-2)
    assert np.abs(found_states(directory, tokens("bert"), run=tmp_path / "run", step="last") - base).max() > 100 * TOLERANCE
    if not settings:
        assert np.abs(base - pooled(tiny_encoders.make_model("bert", ""), tokens("bert"), "mean")).max() < TOLERANCE


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_tuning_a_pooled_head_lowers_the_loss_and_replays_bit_for_bit(
    name: str, settings: dict[str, str], export: Callable[..., Path], data: str, tmp_path: Path
) -> None:
    directory = export(name, pooling="mean", **settings)
    tiny_encoders.check_tuning(directory, tmp_path / "run", bool(settings), data=data, valid=data, template="{text}")


# what a new head reads


@pytest.mark.parametrize("name", POOLER)
def test_the_pooler_is_the_own_head_of_architectures_that_have_one(name: str, export: Callable[..., Path]) -> None:
    manifest, own = read_manifest(export(name, pooling="pooler")), read_manifest(export(name))
    assert (manifest.pooling, own.pooling) == (None, None)
    assert manifest.origin.weights_sha256 == own.origin.weights_sha256
    states = found_states(export(name, pooling="pooler"), tokens(name))
    network = tiny_encoders.make_model(name, "")
    with torch.no_grad():
        expected = np.stack([network(torch.tensor([row])).pooler_output[0].numpy() for row in tokens(name)])
    assert np.abs(states - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", sorted(tiny_encoders.CONFIGS.keys() - set(POOLER)))
def test_an_architecture_without_a_pooler_says_so(name: str, tmp_path: Path) -> None:
    source = tiny_encoders.save(tmp_path / "source", name, "")
    message = refusal(ExportError, export_model, str(source), tmp_path / "edge", classes="2", pooling="pooler")
    assert message == (
        f"{source}: --pooling pooler: the head of {name} reads no pooler; give mean or cls, or leave --pooling out for its own"
    )


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_a_sentence_transformers_folder_tells_the_pooling(config: Any, pooling: str, source: Path, tmp_path: Path, invoke: Invoke) -> None:
    pool_as(source, config)
    outcome = invoke("export", str(source), "--classes", "no,yes", "-o", str(tmp_path / "edge"))
    what = {"mean": "the mean of the token states", "cls": "the first token's state"}[pooling]
    told = f"new head    classifier.bias, classifier.weight on {what}; small and random, it knows nothing before tuning\n"
    assert told in outcome.out
    assert json.loads(invoke("inspect", str(tmp_path / "edge"), "--json").out)["pooling"] == pooling
    other = {"mean": "cls", "cls": "mean"}[pooling]
    asked = invoke("export", str(source), "--classes", "2", "--pooling", other, "-o", str(tmp_path / "asked"), "--json")
    assert json.loads(asked.out)["pooling"] == other


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"pooling_mode_max_tokens": True}, "max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean and cls"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({}, "nothing"),
    ],
)
def test_another_pooling_is_refused(config: Any, says: str, source: Path, tmp_path: Path) -> None:
    message = refusal(ExportError, export_model, str(pool_as(source, config)), tmp_path / "edge", classes="2")
    assert message == (
        f"{source}: its 1_Pooling/config.json says {says}, a new head reads one of mean, cls and pooler; choose with --pooling"
    )
    assert export_model(str(source), tmp_path / "edge", classes="2", pooling="cls").manifest.pooling == "cls"


@pytest.mark.parametrize("config", ["[1]", "{", "null"])
def test_a_pooling_file_that_is_none_is_refused(config: str, source: Path, tmp_path: Path) -> None:
    message = refusal(ExportError, export_model, str(pool_as(source, config)), tmp_path / "edge", classes="2")
    assert message.startswith(f"{source}: its 1_Pooling/config.json cannot be read (")
    assert message.endswith("); give --pooling mean, cls or pooler")


def test_a_head_of_its_own_keeps_its_pooling(tmp_path: Path) -> None:
    source = pool_as(tiny_encoders.save(tmp_path / "source", "bert", "SequenceClassification"), {"pooling_mode": "mean"})
    assert export_model(str(source), tmp_path / "edge").manifest.pooling is None
    assert refusal(ExportError, export_model, str(source), tmp_path / "other", classes="2", pooling="mean") == (
        f"{source}: --pooling mean: says what a new head reads, this model has a head of its own; leave --pooling out"
    )


def test_a_pooling_that_is_none_or_has_no_head_is_refused(tmp_path: Path) -> None:
    message = refusal(ConfigError, export_model, "nowhere", tmp_path / "edge", classes="2", pooling="max")
    assert message == "--pooling max: give mean, cls or pooler"
    message = refusal(ConfigError, export_model, "nowhere", tmp_path / "edge", pooling="mean")
    assert message == "--pooling mean: says what a new head of classes reads; add --classes or leave it out"


def test_a_hub_that_cannot_be_asked_is_told(source: Path, tmp_path: Path) -> None:
    cached = tmp_path / "home" / "hub" / "models--own--bert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    shutil.move(source, cached / "snapshots" / ("0" * 40))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "edgezo", "export", "own/bert", "--classes", "2", "-o", str(tmp_path / "edge")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.endswith(
        "error: own/bert: the hub cannot be reached to look for its 1_Pooling/config.json; say with --pooling what the new head reads: mean, cls or pooler\n"
    )


# elsewhere


def test_heads_that_read_otherwise_do_not_share_adapters(export: Callable[..., Path], data: str, tmp_path: Path) -> None:
    mean, first = export(adapter="lora", pooling="mean"), export(adapter="lora", pooling="cls")
    api.tune(mean, tmp_path / "run", data=data, template="{text}", steps=2)
    model = EdgeModel(mean, threads=1, run=tmp_path / "run", step="last")
    assert isinstance(model.adapter, Lora)
    (tmp_path / "adapter").mkdir()
    write_peft(model.adapter, model.manifest, tmp_path / "adapter")
    again = EdgeModel(mean, threads=1, adapter=tmp_path / "adapter")
    assert isinstance(again.adapter, Lora)
    assert again.adapter.b.tobytes() == model.adapter.b.tobytes()
    own, other = (read_manifest(directory).origin.weights_sha256 or "" for directory in (mean, first))
    message = refusal(AdapterError, EdgeModel, first, threads=1, adapter=tmp_path / "adapter")
    assert message == (
        f"{tmp_path / 'adapter'}: was tuned on another base (weights {own[:12]}) than this edge model ({other[:12]}); give its own base"
    )


def test_a_pooled_head_is_no_model_of_transformers(export: Callable[..., Path], tmp_path: Path) -> None:
    message = refusal(AdapterError, write_hugging_face, EdgeModel(export(pooling="mean"), threads=1), tmp_path)
    assert message == (
        f"{export(pooling='mean')}: its head has pooling mean, which no model class of transformers has; use --format edge, or peft for LoRA"
    )
    assert list(tmp_path.iterdir()) == []
    assert transformers.AutoConfig.from_pretrained(export(pooling="mean")).architectures == ["BertModel"]


def test_a_pooling_of_a_model_that_classifies_nothing_is_refused(exported_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported_dir, tmp_path / "edge"))
    read_manifest(copy).model_copy(update={"pooling": "mean"}).write(copy)
    message = refusal(EdgeModelError, read_manifest, copy)
    assert message == f"{copy / 'manifest.json'}: it is causal, with a pooling; export the model again"


# probes


@pytest.mark.parametrize(("family", "template"), [("classifier", "{text}"), ("masked", "{text} . It was {mask} .")])
def test_encoders_can_be_probed(family: str, template: str, export: Callable[..., Path], tmp_path: Path, data: str, invoke: Invoke) -> None:
    if family == "masked":
        source = tiny_encoders.save(tmp_path / "source", "bert")
        directory = export_model(str(source), tmp_path / "edge").directory
        labels = ["--labels", "terrible,great"]
    else:
        directory, labels = export(pooling="mean"), []
    outcome = invoke("probe", str(directory), "--data", data, "--test", data, "--template", template, *labels, "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0
    assert found["evaluation"]["accuracy"] == 1
    assert found["forward_rows"] == 2 * len(ROWS)


def test_a_classifier_without_hidden_states_is_refused(export: Callable[..., Path], data: str, tmp_path: Path) -> None:
    """As version 3 of the edge model made them."""
    copy = Path(shutil.copytree(export(pooling="mean"), tmp_path / "edge"))
    manifest = read_manifest(copy)
    scoring = manifest.scoring.model_copy(update={"outputs": ["log_probs"]})
    manifest.model_copy(update={"version": 3, "scoring": scoring, "pooling": None}).write(copy)
    message = refusal(EdgeModelError, api.probe, copy, data, data, template="{text}")
    assert message == f"{copy}: its scoring graph has no output hidden; export the model again"
