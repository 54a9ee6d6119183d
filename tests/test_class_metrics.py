"""Figures of single classes: counted by hand, against scikit-learn, and as `edgezo eval` shows them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from sklearn.metrics import precision_recall_fscore_support

import edgezo
from edgezo.runtime.class_metrics import ClassCounts, count_classes


def test_counts_of_a_hand_computed_case() -> None:
    first, second, third = count_classes(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]), 3)
    assert (first, second, third) == (ClassCounts(2, 2, 1), ClassCounts(2, 2, 1), ClassCounts(0, 0, 0))
    assert (first.precision, first.recall, first.f1) == (0.5, 0.5, 0.5)
    assert (third.precision, third.recall, third.f1) == (None, None, None)


def test_a_class_that_is_never_predicted_has_no_precision_and_one_that_never_occurs_no_recall() -> None:
    missed, invented = count_classes(np.array([1, 1]), np.array([0, 0]), 2)
    assert (missed.precision, missed.recall, missed.f1) == (None, 0.0, 0.0)
    assert (invented.precision, invented.recall, invented.f1) == (0.0, None, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    gold, predicted = random.integers(0, 4, 50), random.integers(0, 4, 50)
    expected = precision_recall_fscore_support(gold, predicted, labels=range(4))
    found = [[counts.precision, counts.recall, counts.f1, counts.rows] for counts in count_classes(predicted, gold, 4)]
    assert np.allclose(found, np.transpose(expected))


def test_eval_shows_a_line_for_every_class_by_the_label_of_predictions(
    exported_dir: Path, write_rows: Callable[..., str], invoke: Command
) -> None:
    data = write_rows([{"text": "a film", "label": "neg"}] * 3 + [{"text": "a film", "label": "pos"}], "rows.jsonl")
    read = {"template": "{text} It was", "labels": "neg=terrible,pos=great", "threads": 1}
    (likeliest,) = edgezo.predict(exported_dir, texts=["a film"], **read)
    asked = ["eval", str(exported_dir), "--data", data, *(part for name, value in read.items() for part in (f"--{name}", str(value)))]
    header, *shown = [re.split("  +", line) for line in invoke(*asked).out.splitlines()[1:]]
    assert header == ["class", "rows", "predicted", "precision", "recall", "F1"]
    expected = {
        "neg": [["neg", "3", "4", "75.0 %", "100.0 %", "0.857"], ["pos", "1", "0", "-", "0.0 %", "0.000"]],
        "pos": [["neg", "3", "0", "-", "0.0 %", "0.000"], ["pos", "1", "4", "25.0 %", "100.0 %", "0.400"]],
    }
    assert shown == expected[str(likeliest.label)]
    found = json.loads(invoke(*asked, "--json").out)["classes"]
    assert {label: counts["predicted"] for label, counts in found.items()} == {label: 4 * (label == likeliest.label) for label in expected}
    assert found["neg"].keys() == {"rows", "predicted", "true_positives", "precision", "recall", "f1"}


def test_rows_that_are_no_classification_have_no_classes(exported_dir: Path, write_rows: Callable[..., str], invoke: Command) -> None:
    data = write_rows([{"text": "a film"}], "text.jsonl")
    assert len(invoke("eval", str(exported_dir), "--data", data).out.splitlines()) == 1
    assert "classes" not in json.loads(invoke("eval", str(exported_dir), "--data", data, "--json").out)
