"""Encoder classifiers: their classes are scored as transformers scores them, with their own head or a new one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import peft
import pytest
import tiny_encoders
import torch
import transformers
from refusals import refusal
from tiny_classifiers import NAMES, save

from edgezo import api
from edgezo.config import make_config, parse_labels
from edgezo.errors import ConfigError, DataError, EdgeModelError
from edgezo.export import export_model
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.data import Row
from edgezo.runtime.examples import make_examples
from edgezo.runtime.hugging_face import write_hugging_face
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.lora import Lora
from edgezo.runtime.masked import ModelFacts
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.scoring import Classified, Sequences
from edgezo.runtime.tasks import find_task
from edgezo.runtime.theta import mutable_weights

ROWS = [("a great film", 1), ("a terrible plot", 0), ("the plot is great", 1), ("the film is terrible", 0)] * 4
TOLERANCE = 2e-3
Export = Callable[..., Path]
Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export a tiny encoder, with `own` a head of three classes; once for each name and settings; shared, never to be changed."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str = "bert", own: bool = False, **settings: Any) -> Path:
        key = (name, str(own), *(f"{setting}={value}" for setting, value in sorted(settings.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("classifier")
            source = save(folder / "source", name) if own else tiny_encoders.save(folder / "source", name, "")
            given = settings if own else {"classes": "negative,positive", **settings}
            made[key] = export_model(str(source), folder / name, **given).directory
            shutil.rmtree(source)
        return made[key]

    return make


@pytest.fixture
def data(write_rows: Callable[..., str]) -> str:
    return write_rows([{"text": text, "label": label} for text, label in ROWS])


def candidates(directory: Path, *texts: str, template: str = "{text}", limit: int = 64) -> tuple[list[Classified], int]:
    """The classes of some texts, and how many rows were cut."""
    model = EdgeModel(directory, threads=1)
    rows = [Row({"text": text, "label": model.manifest.classes[0]}, f"row {number}") for number, text in enumerate(texts, 1)]
    made = make_examples(rows, find_task(rows, template, None, "label", ModelFacts.of(model.manifest)), model.text, limit)
    return [pair for example in made.examples for pair in example.pairs if isinstance(pair, Classified)], made.truncated


def torch_log_probs(network: Any, ids: list[int]) -> npt.NDArray[np.float64]:
    with torch.no_grad():
        found: npt.NDArray[np.float64] = torch.log_softmax(network(torch.tensor([ids])).logits[0].double(), -1).numpy()
    return found


# scores


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_the_classes_of_its_own_head_are_scored_as_transformers_scores_them(name: str, export: Export) -> None:
    texts = ["a great film", "the plot is terrible and the film is great", "user"]
    pairs, cut = candidates(export(name, own=True), *texts)
    found = np.concatenate(Sequences(EdgeModel(export(name, own=True), threads=1)).log_probs(pairs)).reshape(3, 3)
    network, tokenizer = tiny_encoders.make_model(name, "SequenceClassification", id2label=NAMES), tiny_encoders.make_tokenizer(name)
    expected = np.array([torch_log_probs(network, tokenizer(text)["input_ids"]) for text in texts])
    assert cut == 0
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.ptp(expected) > 100 * TOLERANCE
    assert np.ptp(expected, axis=0).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_a_new_head_is_small_seeded_and_told(name: str, export: Export, tmp_path: Path) -> None:
    manifest = read_manifest(export(name))
    parameters = dict(tiny_encoders.make_model(name, "SequenceClassification", num_labels=2).named_parameters())
    assert manifest.classes == ["negative", "positive"]
    assert manifest.new_weights
    assert all("classifier" in weight for weight in manifest.new_weights)
    assert {tensor.name for tensor in manifest.tunable} == parameters.keys()
    source = tiny_encoders.save(tmp_path / "source", name, "")
    torch.manual_seed(99)
    again = export_model(str(source), tmp_path / "again", classes="2").manifest
    assert again.classes == ["0", "1"]
    assert again.origin.weights_sha256 == manifest.origin.weights_sha256
    weights = EdgeModel(export(name), threads=1).weights
    head = weights[next(weight for weight in reversed(manifest.new_weights) if weight.endswith("weight"))]
    assert head.any()
    assert np.abs(head).max() < 2  # initializer_range is 0.3 here


def test_the_manifest_says_classifier_and_the_graph_returns_log_probs_of_classes(export: Export) -> None:
    manifest = read_manifest(export(own=True))
    assert manifest.origin.family == "classifier"
    assert manifest.generation is None
    assert manifest.classes == ["bad", "fair", "good"]
    assert manifest.new_weights == []
    assert manifest.pooling is None
    assert manifest.scoring.outputs == ["log_probs", "hidden"]
    graph = onnx.load(export(own=True) / manifest.scoring.file, load_external_data=False).graph
    assert [output.name for output in graph.output] == ["log_probs", "hidden"]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_row_scores_alone_as_beside_longer_ones(name: str, export: Export) -> None:
    sequences = Sequences(EdgeModel(export(name, own=True), threads=1))
    pairs, _ = candidates(export(name, own=True), "user", "the plot is terrible and the film is great and the plot is great")
    together = np.concatenate(sequences.log_probs(pairs))
    apart = np.concatenate([*sequences.log_probs(pairs[:3]), *sequences.log_probs(pairs[3:])])
    assert np.abs(together - apart).max() < 1e-4


def test_a_long_text_loses_its_last_tokens_and_keeps_the_special_ones(export: Export) -> None:
    whole = tiny_encoders.make_tokenizer("bert")("the film is great and the plot is terrible")["input_ids"]
    pairs, cut = candidates(export(), "the film is great and the plot is terrible", limit=6)
    assert cut == 1
    assert pairs[0].tokens == [*whole[:5], whole[-1]]
    assert refusal(DataError, candidates, export(), "the film", limit=2) == (
        "at most 2 tokens are allowed, 2 of them are special tokens; raise --max-length"
    )


# labels


def labels_of(directory: Path, labels: str | None, label: object) -> dict[str, str]:
    """How labels of the data are read: label to class, in order of the classes."""
    rows = [Row({"text": "a film", "label": label}, "row 1")]
    model = ModelFacts.of(read_manifest(directory))
    return dict(find_task(rows, "{text}", None if labels is None else parse_labels(labels), "label", model).labels)


@pytest.mark.parametrize(
    ("labels", "label", "expected"),
    [
        (None, 1, {"0": "negative", "1": "positive"}),
        (None, "positive", {"negative": "negative", "positive": "positive"}),
        ("negative,positive", 1, {"0": "negative", "1": "positive"}),
        ("positive,negative", 1, {"1": "negative", "0": "positive"}),
        ("pos=positive,neg=negative", "neg", {"neg": "negative", "pos": "positive"}),
        ("bad,good", "good", {"0": "bad", "1": "good"}),
    ],
)
def test_labels_are_put_in_the_order_of_the_classes(labels: str | None, label: object, expected: dict[str, str], export: Export) -> None:
    found = labels_of(export(), labels, label)
    assert list(found.items()) == list(expected.items())


def test_labels_that_do_not_fit_the_classes_are_refused(export: Export) -> None:
    assert refusal(DataError, labels_of, export(), "a,b,c", 1) == (
        "--labels a, b, c: 3 labels, this model has the 2 classes negative, positive; give one for each"
    )
    assert refusal(DataError, labels_of, export(), "neg=negative,pos=great", "neg") == (
        "--labels: 'great' is no class of this model; its classes are negative, positive, write label=class for each"
    )


def test_a_label_outside_the_classes_is_refused(export: Export, write_rows: Callable[..., str]) -> None:
    path = write_rows([{"text": "a film", "label": 1}, {"text": "a film", "label": 2}])
    message = refusal(DataError, api.evaluate, export(), path, template="{text}")
    assert (
        message
        == f"{path}:2: label '2' is not among 0=negative, 1=positive; mend or remove the row, or give every label a word: --labels 0=word,..."
    )


# runs


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_tuning_lowers_the_loss_and_replays_bit_for_bit(
    name: str, settings: dict[str, str], export: Export, data: str, tmp_path: Path
) -> None:
    tiny_encoders.check_tuning(export(name, **settings), tmp_path / "run", bool(settings), data=data, valid=data, template="{text}")


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
@pytest.mark.parametrize("weights", ["int8", "int4", "fp16"])
def test_rounded_bases_are_checked_and_tuned(name: str, weights: str, export: Export, data: str, tmp_path: Path) -> None:
    directory = export(name, adapter="lora", weights=weights)
    checked = read_manifest(directory).verification
    assert checked is not None
    assert checked.quantization_loss_change is not None
    assert (checked.half_log_prob_difference is not None) == (weights == "fp16")
    assert api.tune(directory, tmp_path / "run", data=data, template="{text}", steps=2).steps == 2


def test_the_head_is_a_target_of_lora(export: Export) -> None:
    adapter = read_manifest(export(adapter="lora")).adapter
    assert adapter is not None
    modules = [target.module for target in adapter.targets]
    assert {"classifier", "bert.pooler.dense"} < set(modules)
    assert len(modules) == 2 * 6 + 2


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_merged_lora_scores_as_the_adapter_does_in_transformers(name: str, export: Export, data: str, tmp_path: Path) -> None:
    directory = export(name, adapter="lora")
    api.tune(directory, tmp_path / "run", data=data, template="{text}", steps=8, rank=2, lr=5e-2)
    model = EdgeModel(directory, threads=1, run=tmp_path / "run", step="last")
    (tmp_path / "hf").mkdir()
    write_hugging_face(model, tmp_path / "hf")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    assert merged.config.id2label == {0: "negative", 1: "positive"}
    pairs, _ = candidates(directory, "the plot is great")
    found = np.concatenate(Sequences(model).log_probs(pairs))
    base = np.concatenate(Sequences(EdgeModel(directory, threads=1)).log_probs(pairs))
    assert np.abs(found - torch_log_probs(merged, pairs[0].tokens)).max() < TOLERANCE
    assert np.abs(found - base).max() > 5 * TOLERANCE


def test_a_dead_tensor_of_a_classifier_is_named(export: Export, tmp_path: Path) -> None:
    from edgezo.errors import DeadTensorError

    copy = Path(shutil.copytree(export(), tmp_path / "edge"))
    manifest = read_manifest(copy)
    path = copy / manifest.scoring.file
    proto = onnx.load(path, load_external_data=False)
    kept = [value for value in proto.graph.input if value.name != "classifier.weight"]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    onnx.save(proto, path)
    changed = {**manifest.files, path.name: _stored(path)}
    manifest.model_copy(update={"files": changed}).write(copy)
    model = EdgeModel(copy, threads=1)
    weights = mutable_weights(model, make_config(None, {"data": "none", "eps": 1e-3}))
    message = refusal(DeadTensorError, prove_live, model, weights)
    assert "1 of 41 tunable tensors would not be tuned" in message
    assert "classifier.weight" in message


def _stored(path: Path) -> Any:
    from edgezo.manifest import StoredFile
    from edgezo.storage import sha256_file

    return StoredFile(bytes=path.stat().st_size, sha256=sha256_file(path))


def test_classes_are_shown_evaluated_and_predicted_on_the_command_line(export: Export, data: str, invoke: Invoke) -> None:
    directory = str(export())
    shown = json.loads(invoke("inspect", directory, "--json").out)
    assert (shown["family"], shown["classes"], shown["new_head"]) == (
        "classifier",
        ["negative", "positive"],
        ["classifier.bias", "classifier.weight"],
    )
    evaluated = json.loads(invoke("eval", directory, "--data", data, "--template", "{text}", "--json").out)
    predicted = invoke("predict", directory, "--data", data, "--template", "{text}", "--json")
    predictions = json.loads(predicted.out)["predictions"]
    right = [prediction["label"] == str(label) for prediction, (_, label) in zip(predictions, ROWS, strict=True)]
    assert evaluated["accuracy"] == pytest.approx(sum(right) / len(right))
    alone = json.loads(invoke("predict", directory, "--text", "a great film", "--template", "{text}", "--json").out)["predictions"]
    assert list(alone[0]["probabilities"]) == ["negative", "positive"]
    assert list(alone[0]["probabilities"].values()) == pytest.approx(list(predictions[0]["probabilities"].values()), abs=1e-5)


def test_a_run_is_used_without_saying_its_template_again(export: Export, data: str, tmp_path: Path, invoke: Invoke) -> None:
    api.tune(export(), tmp_path / "run", data=data, template="{text}", steps=2)
    outcome = invoke("predict", str(export()), "--run", str(tmp_path / "run"), "--text", "a great film")
    assert outcome.code == 0
    assert outcome.out.count("%") == 2


# refusals


def test_classes_of_the_own_head_can_be_named(tmp_path: Path, export: Export) -> None:
    manifest = export_model(str(save(tmp_path / "source")), tmp_path / "edge", classes="x,y,z").manifest
    assert manifest.classes == ["x", "y", "z"]
    assert manifest.new_weights == []
    assert manifest.origin.weights_sha256 == read_manifest(export(own=True)).origin.weights_sha256


def test_a_prefix_and_writing_text_are_refused(export: Export, tmp_path: Path, invoke: Invoke) -> None:
    source = save(tmp_path / "source")
    assert refusal(ConfigError, export_model, str(source), tmp_path / "edge", adapter="prefix") == (
        f"--adapter prefix: a prefix is put before the text of a causal model, {source} is a classifier; use --adapter lora"
    )
    outcome = invoke("generate", str(export()), "--prompt", "a")
    assert outcome.code == 1
    assert outcome.err == f"error: {export()}: is a classifier, which writes no text; use edgezo predict, or export a causal model\n"


def test_a_mask_and_rows_without_a_template_are_refused(export: Export, data: str, tmp_path: Path) -> None:
    assert refusal(DataError, api.evaluate, export(), data, template="{text} {mask}") == (
        "--template '{text} {mask}': names {mask}, but this is a classifier; its head gives the class, leave {mask} out"
    )
    assert refusal(DataError, api.tune, export(), tmp_path / "run", data=data) == (
        "this is a classifier, which learns labels of rows alone; give --template '{text}'"
    )


def test_a_manifest_without_classes_is_refused(export: Export, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(export(), tmp_path / "edge"))
    read_manifest(copy).model_copy(update={"classes": ["one"]}).write(copy)
    assert refusal(EdgeModelError, read_manifest, copy) == (
        f"{copy / 'manifest.json'}: it is a classifier with the classes ['one'], which are not two or more of a name each; export the model again"
    )


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_peft_loads_the_adapter_of_encoder_and_head_onto_the_source(name: str, export: Export, tmp_path: Path) -> None:
    directory = export(name, adapter="lora", own=True)
    labels = "terrible=bad,ok=fair,great=good"
    rows = [{"text": text, "label": "great" if label else "terrible"} for text, label in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    api.tune(
        directory,
        tmp_path / "run",
        data=str(tmp_path / "rows.jsonl"),
        template="{text}",
        labels=labels,
        steps=8,
        rank=2,
        lr=5e-2,
        start="none",
    )
    model = EdgeModel(directory, threads=1, run=tmp_path / "run", step="last")
    assert isinstance(model.adapter, Lora)
    (tmp_path / "adapter").mkdir()
    write_peft(model.adapter, model.manifest, tmp_path / "adapter")
    network = tiny_encoders.make_model(name, "SequenceClassification", id2label=NAMES)
    adapted = peft.PeftModel.from_pretrained(network, str(tmp_path / "adapter")).eval()
    pairs, _ = candidates(directory, "the plot is great")
    found = np.concatenate(Sequences(model).log_probs(pairs))
    assert np.abs(found - torch_log_probs(adapted, pairs[0].tokens)).max() < TOLERANCE
    (row,) = api.predict(directory, run=tmp_path / "run", step="last", texts=["the plot is great"])
    assert list(row.probabilities) == ["terrible", "ok", "great"]
    assert list(row.probabilities.values()) == pytest.approx(np.exp(found).tolist(), abs=1e-5)
