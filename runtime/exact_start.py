"""An exact start: what a linear model on top of one forward a row finds, put into the weights; zeroth-order steps go on below it.

Label words: runtime/label_start.py. Texts: runtime/token_start.py.

References:
    Sugiura and Matsutani 2025, ElasticZO: A Memory-Efficient On-Device Learning with Combined Zeroth- and First-Order Optimization
    (arXiv 2501.04287).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.dataset import Dataset, spread
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.examples import Example, Offsets
from edgezo.runtime.head_fit import HeadFit
from edgezo.runtime.head_rows import summed
from edgezo.runtime.journal_records import Record, evaluation_records, head_record, offsets_record
from edgezo.runtime.label_start import first_tokens, label_fits, read_features
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.reports import Reporter
from edgezo.runtime.token_start import token_fits

SHARE = 1 / 6  # of a time budget, that forwards of the start may take; a probe reads its rows twice


class ExactStart(NamedTuple):
    """What the journal keeps of a start, the validation of the model before it, offsets of the rows that it has seen, and the validation of the model that
    steps begin from."""

    records: list[Record]
    untuned: Evaluation | None = None
    offsets: Offsets | None = None
    validated: Evaluation | None = None


def resolve_start(model: EdgeModel, dataset: Dataset, notice: Callable[[str], None]) -> Dataset:
    """The data set with `start` of its configuration as it will be done: an exact one unless that was refused or cannot be.

    Raises:
        ConfigError: one was asked for and cannot be.
    """
    asked, problem = dataset.config.start, obstacle(model, dataset)
    if asked in {"exact", "head"} and problem is not None:
        raise ConfigError(f"--start {asked}: {problem}; or give --start none")
    if asked is None and problem is not None and dataset.task.kind != "preference":
        notice(f"no exact start: {problem}")
    start = (asked or "exact") if problem is None else "none"
    return dataset._replace(config=dataset.config.model_copy(update={"start": start}))


def start_exactly(model: EdgeModel, objective: Objective, dataset: Dataset, reporter: Reporter) -> ExactStart:
    """Give the model the solution that helps its validation rows, the one that promises more tried first; without such rows that one."""
    config, valid, notice = dataset.config, dataset.valid, reporter.notice
    chosen = np.array(spread(list(range(len(dataset.train.examples))), config.start_rows))
    # a file may come label by label, and parts of the rows are used for themselves
    rows = chosen[noise.permutation(config.seed, len(chosen), 0)]
    if valid is not None:
        reporter.stage("validating the model as it is")
    before = objective.evaluate(valid.examples) if valid is not None else None
    seconds = SHARE * 60 * config.minutes if config.minutes is not None else math.inf
    found, refused = model.head, "lower the held-out loss"
    for fit in _fits(objective, [dataset.train.examples[row] for row in rows], config.start == "exact", seconds, reporter.stage):
        reporter.stage(f"putting {fit.name} into the model")
        try:
            model.head = summed([found, fit.make()], [1.0, 1.0])
            if valid is not None:
                reporter.stage(f"validating {fit.name}")
            after = objective.evaluate(valid.examples) if valid is not None else None
        except NonFiniteLossError:  # of the changed model; as it was it gave what the fit read
            model.head, refused = found, f"keep the losses finite ({fit.name})"
            continue
        gain = _gain(fit, before, after)
        if before is None or after is None or after.score() > before.score():
            notice(f"exact start: {fit.name}, from {fit.rows} rows: {gain}")
            offsets = _offsets(fit, rows)
            told = [*(evaluation_records(0, before, True) if before is not None else []), head_record(model.head)]
            return ExactStart([*told, *([offsets_record(offsets)] if offsets is not None else [])], before, offsets, after)
        refused = f"help the validation rows ({gain})"
        model.head = found
    notice(f"exact start: what the training rows teach does not {refused}; the run starts from the model as it is")
    return ExactStart([head_record(found)] if len(found.tokens) else [], validated=before)


def _fits(objective: Objective, examples: list[Example], probe: bool, seconds: float, stage: Callable[[str], None]) -> Iterator[HeadFit]:
    if objective.task.kind != "classification":
        return token_fits(objective, examples, seconds, stage)
    stage(f"reading {len(examples)} rows for the exact start")
    features = read_features(objective, examples, len(objective.task.words), seconds, attention=None if probe else False)
    stage(f"solving the exact start from {len(features.gold)} rows")
    return label_fits(objective, examples[: len(features.gold)], features)


def _offsets(fit: HeadFit, rows: npt.NDArray[np.int64]) -> Offsets | None:
    if fit.unseen is None:
        return None
    centred = fit.unseen - fit.unseen.mean(axis=1, keepdims=True)  # softmax does not see a constant of a row
    return Offsets(rows[: fit.rows], centred.astype(np.float32))


def _gain(fit: HeadFit, before: Evaluation | None, after: Evaluation | None) -> str:
    if before is None or after is None:
        return f"held-out loss {fit.before:.3f} -> {fit.held_out:.3f}"
    changes = [f"loss {before.loss:.3f} -> {after.loss:.3f}"]
    if before.accuracy is not None and after.accuracy is not None:
        changes.insert(0, f"accuracy {100 * before.accuracy:.1f} % -> {100 * after.accuracy:.1f} %")
    changes += [f"{name.replace('_', ' ')} {value:.3f} -> {after.others[name]:.3f}" for name, value in before.others.items()]
    return f"validation {', '.join(changes)}"


def obstacle(model: EdgeModel, dataset: Dataset) -> str | None:
    """Why a data set has no exact start; None where it has one."""
    task, examples = dataset.task, dataset.train.examples
    if task.kind == "preference":
        return "rows of kind preference have no exact start, give rows with right texts"
    if len(examples) < 2:
        return "it is chosen by rows held out, and there is one row, give more"
    likely = task.kind == "classification" or (task.kind != "choice" and dataset.config.objective in {None, "likelihood"})
    if dataset.valid is None and not likely:
        return "it makes right texts likelier, and without validation rows nothing tells whether that helps here, give --valid"
    if not model.manifest.takes_head_rows:
        return f"{model.directory} was exported without inputs for rows of the head, export it again"
    if task.kind == "classification" and first_tokens(examples, len(task.words)) is None:
        return f"the label words {', '.join(task.words)} do not begin with tokens of their own, choose other words"
    return None
