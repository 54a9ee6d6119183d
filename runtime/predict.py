"""Labels, choices and answers for rows that have none: what a tuned model is for."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.config import Sampling, TuneConfig
from edgezo.errors import ConfigError, DataError, NonFiniteLossError
from edgezo.runtime.batch_generate import generate_batch
from edgezo.runtime.data import Row
from edgezo.runtime.dataset import task_of
from edgezo.runtime.examples import candidate_texts, make_candidates, make_prompt
from edgezo.runtime.masked import ModelFacts
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import score_candidates
from edgezo.runtime.sampling import refuse_draws
from edgezo.runtime.scoring import Candidate, Sequences
from edgezo.runtime.tasks import Task


class Prediction(NamedTuple):
    """What a model makes of one row.

    label: the likeliest label; None unless classification.
    choice: number of the likeliest choice, from 0; None unless choices.
    text: that choice, or the answer that the model writes; None for labels.
    probabilities: of every label or choice: softmax over the candidates' scores.
    truncated: whether the row was cut to fit.
    """

    label: str | None = None
    choice: int | None = None
    text: str | None = None
    probabilities: Mapping[str, float] = MappingProxyType({})
    truncated: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        given = {name: value for name, value in self._asdict().items() if name not in ("probabilities", "truncated") and value is not None}
        probabilities = {"probabilities": dict(self.probabilities)} if self.probabilities else {}
        return {**given, **probabilities, "truncated": self.truncated}


def task_to_predict(rows: Sequence[Row], config: TuneConfig, model: ModelFacts, of_run: bool) -> Task:
    """How rows that need neither label nor answer are read: as settings say, else the field `choices`; other prompts are answered.

    Args:
        rows: one or more.
        of_run: whether the settings are those of a run, or of one merged into the model, in which a template without labels and choices is that of answers.

    Raises:
        ConfigError: it is not said what to predict.
        DataError: the rows do not fit the settings, or have nothing to predict.
    """
    first, answers = rows[0], False
    if config.labels is None and model.family == "masked":
        raise ConfigError("a masked language model predicts labels; give --template and --labels, or the --run of a classification")
    if config.labels is None and model.family == "causal" and not config.choices and "choices" not in first.fields:
        answers = of_run or config.answer_field is not None or "answer" in first.fields or config.template is None
        if not answers:
            raise ConfigError(
                f"--template {config.template!r}: what continues it is not said; give --labels of classes, --choices, or --answer-field for a generated answer"
            )
        config = config.model_copy(update={"answer_field": config.answer_field or "answer"})
        if config.template is None and "prompt" not in first.fields:
            raise DataError(
                f"{first.place}: no field 'prompt'; it has {', '.join(map(repr, first.fields))}, give --template (messages are answered by edgezo generate --chat)"
            )
    return task_of(rows, config, model)


def predict(model: EdgeModel, rows: Sequence[Row], task: Task, max_length: int, sampling: Sampling | None = None) -> list[Prediction]:
    """Rank the labels or choices of every row, or write its answer; the rows need neither label nor answer.

    Args:
        rows: with the template's fields.
        task: classification, choice or answer.
        max_length: tokens of a row; longer prompts lose their first tokens, which `truncated` tells.
        sampling: how to draw answers; None is greedy.

    Raises:
        ConfigError: no answers are written that could be drawn, or a setting of the sampling is out of range.
        DataError: a row lacks a field of the template, or a candidate does not fit.
        NonFiniteLossError: the model gives no finite scores.
    """
    if task.kind == "answer":
        prompts, truncated = zip(*(make_prompt(row, task, model.text, max_length) for row in rows), strict=True)
        answers = generate_batch(model, list(prompts), task.room, task.stop, sampling=sampling)
        return [Prediction(text=text, truncated=cut) for text, cut in zip(answers, truncated, strict=True)]
    refuse_draws(sampling, task.kind)
    found = []
    candidates, truncated = zip(*(make_candidates(row, task, model.text, max_length) for row in rows), strict=True)
    for row, likely, cut in zip(rows, _rank(model, candidates, task), truncated, strict=True):
        best = int(likely.argmax())
        if task.kind == "classification":
            by_class = dict(zip(task.classes, likely.tolist(), strict=True))
            found.append(Prediction(task.classes[best], probabilities=by_class, truncated=cut))
        else:
            texts = candidate_texts(row, task)
            of_text: dict[str, float] = {}
            for text, probability in zip(texts, likely.tolist(), strict=True):
                of_text[text] = of_text.get(text, 0.0) + probability  # two choices may be the same
            found.append(Prediction(choice=best, text=texts[best], probabilities=of_text, truncated=cut))
    return found


def _rank(model: EdgeModel, candidates: Sequence[Sequence[Candidate]], task: Task) -> list[npt.NDArray[np.float64]]:
    """Probabilities of every row's candidates."""
    parts = Sequences(model).log_probs([pair for pairs in candidates for pair in pairs])
    found = score_candidates(task, parts, [len(pairs) for pairs in candidates])
    if not all(np.isfinite(scores).all() for scores in found):
        raise NonFiniteLossError(f"the model gives no finite scores; {model.remedy}, or tune with a smaller --lr")
    return [np.exp(scores - np.logaddexp.reduce(scores)) for scores in found]
