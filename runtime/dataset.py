"""The rows of a run as examples: training and validation files read under one configuration."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from edgezo.config import ADAPTER_DEFAULTS, TuneConfig
from edgezo.errors import DataError, RunError
from edgezo.runtime import noise
from edgezo.runtime.corpus import is_corpus, pack, packs, read_data, sha256_data
from edgezo.runtime.data import Row
from edgezo.runtime.examples import Example, Examples, Offsets, make_examples
from edgezo.runtime.masked import CAUSAL, ModelFacts
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import add_references
from edgezo.runtime.order import ORDER, DataOrder
from edgezo.runtime.scoring import Sequences, forward_tokens
from edgezo.runtime.tasks import OPTIONS, Task, find_task, seen_labels

LEAST_TO_SHARE = 100  # training rows; the validation of fewer would tell little and cost them much
ASIDE_EPOCH = (1 << 64) - 2  # no run has this epoch


class Dataset(NamedTuple):
    """Examples of a run. `config` is the one given, with the labels that were found in the data."""

    config: TuneConfig
    task: Task
    train: Examples
    valid: Examples | None

    def with_references(self, sequences: Sequences) -> "Dataset":
        """The same with log-probabilities under the model as it is now, which the objective dpo is relative to."""

        def referred(part: Examples) -> Examples:
            return part._replace(examples=add_references(sequences, part.examples))

        return self._replace(train=referred(self.train), valid=referred(self.valid) if self.valid is not None else None)

    def with_offsets(self, offsets: Offsets | None) -> "Dataset":
        """The same with offsets of training rows.

        Raises:
            RunError: they are of other rows.
        """
        if offsets is None:
            return self
        found = list(self.train.examples)
        if not (offsets.rows < len(found)).all() or offsets.values.shape[1] != len(self.task.words):
            raise RunError(
                f"{self.config.data}: has {len(found)} rows of {len(self.task.words)} labels, the run's offsets are of others; the run cannot go on"
            )
        for row, values in zip(offsets.rows.tolist(), offsets.values.tolist(), strict=True):
            found[row] = found[row]._replace(offset=tuple(values))
        return self._replace(train=self.train._replace(examples=found))

    def order(self, version: int = ORDER) -> DataOrder:
        """Which rows each step sees, by this version of the order."""
        return DataOrder([_length(example) for example in self.train.examples], self.config.rows, self.config.seed, version)

    def batch(self, order: DataOrder, step: int) -> list[Example]:
        """The training examples of step `step` (from 0)."""
        return [self.train.examples[row] for row in order.batch(step)]


def read_dataset(model: EdgeModel, config: TuneConfig, notice: Callable[[str], None] = lambda text: None) -> Dataset:
    """Read and tokenise the files of `config`.

    Args:
        model: gives the tokenizer and the context.
        notice: told how many rows were cut to fit.

    Raises:
        DataError: a file, row, template or label cannot be used.
    """
    rows = read_data(config.data)
    task = task_of(rows, config, ModelFacts.of(model.manifest))
    chosen = read_data(config.valid) if config.valid is not None else []
    if task.labels:  # they are the run's from now on: another file may lack one
        config = config.model_copy(update={"labels": seen_labels(task.labels, task.label_field, [*rows, *chosen])})
    if not packs(config.data, task):
        config = _fit_directions(config, len(rows) - _aside(config, len(rows)), model, notice)
    train = tokenize_data(model, config, task, config.data, rows, notice, "training")
    if packs(config.data, task):
        config = _fit_directions(config, len(train.examples) - _aside(config, len(train.examples)), model, notice)
        if config.max_length is None:  # evaluations of the run are to cut text alike
            config = config.model_copy(update={"max_length": _length(train.examples[0]) + 1})
    if config.valid is None:
        return Dataset(config, task, *_set_aside(train, config, notice))
    if not packs(config.valid, task):
        chosen = spread(chosen, config.eval_rows)
    valid = tokenize_data(model, config, task, config.valid, chosen, notice, "validation")
    return Dataset(config, task, train, valid._replace(examples=spread(valid.examples, config.eval_rows)))


def tokenize_data(
    model: EdgeModel,
    config: TuneConfig,
    task: Task,
    path: str,
    rows: Sequence[Row],
    notice: Callable[[str], None] = lambda text: None,
    shown: str = "",
) -> Examples:
    """The examples of rows read from `path`; plain text is packed.

    Args:
        model: gives the tokenizer and the context.
        notice: told how text was packed, or how many rows were cut to fit.
        shown: what the rows are for.

    Raises:
        DataError: a row cannot be used.
    """
    if packs(path, task):
        packed = pack(rows, model.text, config.max_length, model.context, config.rows // config.batch)
        notice(f"{shown} text: {packed}")
        return Examples(packed.examples, 0)
    limit = row_limit(model, config)
    made = make_examples(rows, task, model.text, limit)
    if made.truncated:
        notice(f"{made.truncated} of {len(rows)} {shown} rows were cut to {limit} tokens")
    return made


def _aside(config: TuneConfig, rows: int) -> int:
    """How many of so many training rows are set aside for validation; of a small file none by default."""
    if config.valid is not None or (rows < LEAST_TO_SHARE and config.valid_share == TuneConfig.model_fields["valid_share"].default):
        return 0
    count = min(round(config.valid_share * rows), config.eval_rows)
    if count == rows:
        raise DataError(
            f"--valid-share {config.valid_share:g}: leaves none of the {rows} rows of {config.data} to learn from; give a smaller one"
        )
    return count


def weak_validation(dataset: Dataset) -> str | None:
    """Why there is no validation, or one that tells nothing, and what to do; None where all is well or none was wanted."""
    config, rows = dataset.config, len(dataset.train.examples)
    if config.valid is not None and sha256_data(config.valid) == sha256_data(config.data):
        return f"warning: --valid {config.valid} has the rows that are learned, and cannot tell when learning them by heart begins; give others, or leave it out"
    if dataset.valid is not None or not config.valid_share:
        return None
    none = round(config.valid_share * rows) == 0
    why = f"{config.valid_share:g} of them is none" if none else f"files under {LEAST_TO_SHARE} rows are not split"
    share = "a larger --valid-share" if none else "--valid-share 0.3"
    return f"no validation: {config.data} has {rows} rows, {why}; --valid FILE gives others, {share} sets some aside"


def _set_aside(train: Examples, config: TuneConfig, notice: Callable[[str], None]) -> tuple[Examples, Examples | None]:
    """Training and validation rows of one file, drawn by the seed; none for validation where there are few or none were asked for."""
    made = train.examples
    count = _aside(config, len(made))
    if not count:
        return train, None
    chosen = {int(row) for row in noise.permutation(config.seed, len(made), ASIDE_EPOCH)[:count]}
    notice(
        f"validation: {count} of the {len(made)} rows of {config.data} set aside, drawn by the seed; --valid FILE takes others, --valid-share 0 tunes on all"
    )
    parts = [[example for row, example in enumerate(made) if (row in chosen) is inside] for inside in (False, True)]
    return train._replace(examples=parts[0]), Examples(parts[1], 0)


def _fit_directions(config: TuneConfig, rows: int, model: EdgeModel, notice: Callable[[str], None]) -> TuneConfig:
    """Every direction needs a row of its own: an adapter's default number is lowered to the rows there are, one asked for is refused."""
    if config.directions <= rows or config.shares_rows:
        return config
    adapter = model.manifest.adapter
    enough = rows >= (2 if config.rule == "fzoo" else 1)  # it divides by the spread over the directions
    if enough and adapter is not None and config.directions == ADAPTER_DEFAULTS[adapter.kind]["directions"]:
        notice(f"{rows} rows of {config.data}: {rows} directions a step instead of {config.directions}, since each needs rows of its own")
        return config.model_copy(update={"directions": rows})
    raise DataError(
        f"--directions {config.directions}: more than the {rows} rows of {config.data}, each direction needs rows of its own; give at most {rows}{', or a smaller --max-length' if is_corpus(config.data) else ''}"
    )


def spread(items: list[Any], most: int) -> list[Any]:
    """At most so many, every k-th, so that a sorted file is sampled evenly."""
    stride = max(1, len(items) / most)
    return [items[int(place * stride)] for place in range(min(len(items), most))]


def task_of(rows: Sequence[Row], config: TuneConfig, model: ModelFacts = CAUSAL) -> Task:
    """How a configuration reads rows for a model.

    Raises:
        DataError: it does not fit their fields.
    """
    given = {name: getattr(config, name) for name in OPTIONS}
    task = find_task(rows, config.template, config.labels, config.label_field, model, **given)
    generates = task.kind == "answer" or (config.objective is not None and ":" in config.objective and not task.has_candidates)
    return task._replace(room=config.max_tokens) if generates else task


def row_limit(model: EdgeModel, config: TuneConfig) -> int:
    """Tokens a row may have: --max-length, at most the model's context."""
    return min(config.max_length or model.context, model.context)


def _length(example: Example) -> int:
    return max(forward_tokens(pair) for pair in example.pairs)
