"""Figures of single classes: counted by hand, against scikit-learn, and as `edgezo eval` shows them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from sklearn.metrics import precision_recall_fscore_support

import edgezo
from edgezo.runtime.class_metrics import ClassCounts, count_classes


def test_counts_of_a_hand_computed_case() -> None:
    found = count_classes(["ham", "spam", "scam"], np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]))
    assert found == [ClassCounts("ham", 2, 2, 1), ClassCounts("spam", 2, 2, 1), ClassCounts("scam", 0, 0, 0)]
    assert [found[0].precision, found[0].recall, found[0].f1] == [0.5, 0.5, 0.5]
    assert [found[2].precision, found[2].recall, found[2].f1] == [None, None, None]


def test_a_class_that_is_never_predicted_has_no_precision_and_one_that_never_occurs_no_recall() -> None:
    missed, invented = count_classes(["a", "b"], np.array([1, 1]), np.array([0, 0]))
    assert (missed.precision, missed.recall, missed.f1) == (None, 0.0, 0.0)
    assert (invented.precision, invented.recall, invented.f1) == (0.0, None, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    gold, predicted = random.integers(0, 4, 50), random.integers(0, 4, 50)
    expected = precision_recall_fscore_support(gold, predicted, labels=range(4))
    found = count_classes(["a", "b", "c", "d"], predicted, gold)
    assert np.allclose([[counts.precision, counts.recall, counts.f1, counts.rows] for counts in found], np.transpose(expected))


def test_eval_shows_a_line_for_every_class(exported_dir: Path, write_rows: Callable[..., str], invoke: Command) -> None:
    data = write_rows([{"text": "a film", "label": 0}] * 3 + [{"text": "a film", "label": 1}], "rows.jsonl")
    asked = ["eval", str(exported_dir), "--data", data, "--template", "{text} It was", "--labels", "terrible,great", "--threads", "1"]
    likeliest = edgezo.predict(exported_dir, texts=["a film"], template="{text} It was", labels="terrible,great", threads=1)
    first = {"0": "terrible", "1": "great"}[str(likeliest[0].label)]
    shown = [line.split("  ") for line in invoke(*asked).out.splitlines()[1:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in shown]
    assert cells[0] == ["class", "rows", "predicted", "precision", "recall", "F1"]
    both = {
        "terrible": [["terrible", "3", "4", "75.0 %", "100.0 %", "0.857"], ["great", "1", "0", "-", "0.0 %", "0.000"]],
        "great": [["terrible", "3", "0", "-", "0.0 %", "0.000"], ["great", "1", "4", "25.0 %", "100.0 %", "0.400"]],
    }
    assert cells[1:] == both[first]
    found = json.loads(invoke(*asked, "--json").out)["classes"]
    rows = {name: (counts["rows"], counts["predicted"]) for name, counts in found.items()}
    assert rows == {"terrible": (3, 4 * (first == "terrible")), "great": (1, 4 * (first == "great"))}
    assert found[first]["recall"] == 1.0


def test_rows_that_are_no_classification_have_no_classes(exported_dir: Path, write_rows: Callable[..., str], invoke: Command) -> None:
    data = write_rows([{"text": "a film"}], "text.jsonl")
    assert len(invoke("eval", str(exported_dir), "--data", data).out.splitlines()) == 1
    assert "classes" not in json.loads(invoke("eval", str(exported_dir), "--data", data, "--json").out)
