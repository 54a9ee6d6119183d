"""The rows of a run as examples: training and validation files read under one configuration."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgezo.config import TuneConfig
from edgezo.errors import DataError
from edgezo.runtime.data import Row, read_rows
from edgezo.runtime.examples import Example, Examples, make_examples
from edgezo.runtime.masked import CAUSAL, ModelFacts
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import add_references
from edgezo.runtime.order import DataOrder
from edgezo.runtime.scoring import Sequences, forward_tokens
from edgezo.runtime.tasks import Task, find_task, seen_labels


class Dataset(NamedTuple):
    """Examples of a run. `config` is the one given, with the labels that were found in the data."""

    config: TuneConfig
    task: Task
    train: Examples
    valid: Examples | None

    def order(self) -> DataOrder:
        """Which rows each step sees."""
        return DataOrder([_length(example) for example in self.train.examples], self.config.rows, self.config.seed)

    def batch(self, order: DataOrder, step: int) -> list[Example]:
        """The training examples of step `step` (from 0)."""
        return [self.train.examples[row] for row in order.batch(step)]


def read_dataset(model: EdgeModel, config: TuneConfig, notice: Callable[[str], None] = lambda text: None) -> Dataset:
    """Read and tokenise the files of `config`.

    Args:
        model: untuned; with the objective dpo its scores are what preferences are relative to.
        notice: told how many rows were cut to fit.

    Raises:
        DataError: a file, row, template or label cannot be used.
    """
    rows = read_rows(config.data)
    task = task_of(rows, config, ModelFacts.of(model.manifest))
    chosen = read_rows(config.valid) if config.valid is not None else []
    if task.labels:  # they are the run's from now on: another file may lack one
        config = config.model_copy(update={"labels": seen_labels(task.labels, task.label_field, [*rows, *chosen])})
    limit = row_limit(model, config)

    def make(kind: str, rows: list[Row]) -> Examples:
        made = make_examples(rows, task, model.text, limit)
        if made.truncated:
            notice(f"{made.truncated} of {len(rows)} {kind} rows were cut to {limit} tokens")
        return made._replace(examples=add_references(Sequences(model), made.examples)) if config.objective == "dpo" else made

    if config.directions > len(rows):
        raise DataError(
            f"--directions {config.directions}: more than the {len(rows)} rows of {config.data}, each direction needs rows of its own; give at most {len(rows)}"
        )
    train = make("training", rows)
    if config.valid is None:
        return Dataset(config, task, train, None)
    spread = max(1, len(chosen) / config.eval_rows)  # every k-th row, so that a sorted file is sampled evenly
    return Dataset(config, task, train, make("validation", [chosen[int(i * spread)] for i in range(min(len(chosen), config.eval_rows))]))


def task_of(rows: Sequence[Row], config: TuneConfig, model: ModelFacts = CAUSAL) -> Task:
    """How a configuration reads rows for a model.

    Raises:
        DataError: it does not fit their fields.
    """
    names = ("choices", "answer_field", "replace", "stop", "calibrate")
    return find_task(rows, config.template, config.labels, config.label_field, model, **{name: getattr(config, name) for name in names})


def row_limit(model: EdgeModel, config: TuneConfig) -> int:
    """Tokens a row may have: --max-length, at most the model's context."""
    return min(config.max_length or model.context, model.context)


def _length(example: Example) -> int:
    return max(forward_tokens(pair) for pair in example.pairs)
