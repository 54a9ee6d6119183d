"""The rows of a run as examples: training and validation files read under one configuration."""

from collections.abc import Callable
from typing import NamedTuple

from edgezo.config import TuneConfig
from edgezo.errors import DataError
from edgezo.runtime.data import Row, read_rows
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.order import DataOrder
from edgezo.runtime.tasks import Example, Examples, find_task, make_examples


class Dataset(NamedTuple):
    """Examples of a run. `config` is the one given, with the labels that were found in the data."""

    config: TuneConfig
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
        notice: told how many rows were cut to fit.

    Raises:
        DataError: a file, row, template or label cannot be used.
    """
    rows = read_rows(config.data)
    task = find_task(rows, config.template, config.labels, config.label_field)
    if task.labels:  # they are the run's from now on: another file may lack one
        config = config.model_copy(update={"labels": dict(task.labels)})
    limit = row_limit(model, config)

    def make(kind: str, rows: list[Row]) -> Examples:
        made = make_examples(rows, task, model.text, limit)
        if made.truncated:
            notice(f"{made.truncated} of {len(rows)} {kind} rows were cut to {limit} tokens")
        return made

    if config.directions > len(rows):
        raise DataError(
            f"--directions {config.directions}: more than the {len(rows)} rows of {config.data}, each direction needs rows of its own; give at most {len(rows)}"
        )
    train = make("training", rows)
    if config.valid is None:
        return Dataset(config, train, None)
    chosen = read_rows(config.valid)
    spread = max(1, len(chosen) / config.eval_rows)  # every k-th row, so that a sorted file is sampled evenly
    return Dataset(config, train, make("validation", [chosen[int(i * spread)] for i in range(min(len(chosen), config.eval_rows))]))


def row_limit(model: EdgeModel, config: TuneConfig) -> int:
    """Tokens a row may have: --max-length, at most the model's context."""
    return min(config.max_length or model.context, model.context)


def _length(example: Example) -> int:
    return max(len(prompt) + len(completion) for prompt, completion in example.pairs)
