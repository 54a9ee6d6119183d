"""Rows of choices, answers and preferences, and the objective that they are measured by."""

from typing import Any

from row_examples import make_rows

from edgezo.config import make_config
from edgezo.runtime.examples import Example, make_examples
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.tasks import find_task

CHOICE_ROWS = [
    {"prompt": "the film was", "choices": ["good", "bad and long"], "answer": 0},
    {"prompt": "a plot so", "choices": ["long it is bad", "good"], "answer": "good"},
    {"prompt": "it is", "choices": ["a film", "no film", "the plot"], "answer": "2"},
]
ANSWER_ROWS = [{"prompt": "what was it?", "answer": ["a film", "film"]}, {"prompt": "it was the", "answer": "plot"}]
PREFERENCE_ROWS = [
    {"prompt": "it was", "chosen": "a good film", "rejected": "bad"},
    {"prompt": "the plot is", "chosen": "long", "rejected": "a bad film and no plot"},
]


def objective_of(model: EdgeModel, rows: list[dict[str, Any]], **settings: Any) -> tuple[Objective, list[Example]]:
    """The objective that these rows have with the settings, and the rows as examples."""
    read = make_rows(*rows)
    config = make_config(None, {"data": "no file", **settings})
    names = ("choices", "answer_field", "replace", "stop", "calibrate")
    task = find_task(read, config.template, config.labels, config.label_field, **{name: getattr(config, name) for name in names})
    return Objective(Sequences(model), task, config), make_examples(read, task, model.text, 64).examples
