"""Exporting a classifier: the head it gets, and heads and classes that are refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_encoders
import transformers
from conftest import Command
from refusals import refusal
from tiny_classifiers import save

from edgezo.errors import ConfigError, ExportError
from edgezo.export import export_model


def test_exporting_tells_the_new_head(tmp_path: Path, invoke: Command) -> None:
    source = tiny_encoders.save(tmp_path / "source", "bert", "")
    outcome = invoke("export", str(source), "--classes", "no,yes", "-o", str(tmp_path / "edge"))
    assert outcome.code == 0
    assert "classes     no, yes\n" in outcome.out
    assert "new head    classifier.bias, classifier.weight; small and random, it knows nothing before tuning\n" in outcome.out


@pytest.mark.parametrize("classes", ["1", "", "a", "a,,b", "a,a", "0"])
def test_classes_that_are_none_are_refused(classes: str, tmp_path: Path) -> None:
    message = refusal(ConfigError, export_model, "nowhere", tmp_path / "edge", classes=classes)
    assert message == f"--classes {classes!r}: give a number of at least 2, or names as negative,positive, each once"


def test_classes_that_do_not_fit_the_own_head_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    message = refusal(ExportError, export_model, str(source), tmp_path / "edge", classes="2")
    assert message == f"{source}: --classes has 2 classes, its own head has 3; leave --classes out, or name 3"


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", id2label={0: "same", 1: "same"})
    message = refusal(ExportError, export_model, str(source), tmp_path / "edge")
    assert message == f"{source}: two of its classes have one name (same, same); name all 2 with --classes"
    assert export_model(str(source), tmp_path / "edge", classes="no,yes").manifest.classes == ["no", "yes"]


def test_classes_for_a_model_onnx_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    message = refusal(ConfigError, export_model, str(tmp_path), tmp_path / "edge", classes="2")
    assert message == f"--classes: {tmp_path} is a model.onnx, which has its head already; leave it out, or give the Hugging Face folder"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"num_labels": 1}, "its head gives one number, not classes; edgezo tunes classifiers, give a model with two classes or more"),
        (
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            "its head is for multi_label_classification; edgezo tunes classifiers with one right class a row, give another model",
        ),
    ],
)
def test_heads_that_do_not_classify_are_refused(more: dict[str, Any], problem: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", **more)
    assert refusal(ExportError, export_model, str(source), tmp_path / "edge") == f"{source}: {problem}"


def test_a_head_on_a_decoder_is_refused(source_dir: Path, tmp_path: Path) -> None:
    ending = "llama is a decoder; edgezo exports classifiers of encoders such as BERT, use label words on a causal model instead"
    message = refusal(ExportError, export_model, str(source_dir), tmp_path / "edge", classes="2")
    assert message == f"{source_dir}: --classes needs an encoder, {ending}"
    config = transformers.AutoConfig.for_model("llama", **tiny.CONFIGS["llama"])
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "llama")
    message = refusal(ExportError, export_model, str(tmp_path / "llama"), tmp_path / "edge")
    assert message == f"{tmp_path / 'llama'}: its head is one of classes, {ending}"
