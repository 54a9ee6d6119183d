"""A linear probe: logistic regression on the frozen model's final hidden states, the baseline of one forward a row."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import ConfigError, DataError, NonFiniteLossError
from edgezo.runtime.class_metrics import count_classes, macro_f1
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.examples import Example, Examples
from edgezo.runtime.scoring import Classified, Masked, Sequences
from edgezo.runtime.tasks import Task

STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # C, the inverse of the L2 penalty
FOLDS = 5
ITERATIONS = 10_000  # of L-BFGS at most; the largest C on separable rows needs most

Floats = npt.NDArray[np.float64]
Gold = npt.NDArray[np.int64]


class Labelled(NamedTuple):
    """Hidden states, float64 [rows, width], and the index of the right label, int64 [rows]."""

    features: Floats
    gold: Gold


class ProbeResult(NamedTuple):
    """A fitted probe on the test rows.

    evaluation: on the test rows; its loss is the mean of -log p(label), in nats. strength: the C that was chosen. chosen_by:
    "validation" or "cross-validation", chosen_on what C was chosen by. forward_rows: training, validation and test rows, one forward each.
    forward_seconds, seconds: of the forwards, and with the fits.
    """

    evaluation: Evaluation
    strength: float
    chosen_by: str
    chosen_on: Evaluation
    train_rows: int
    valid_rows: int
    forward_rows: int
    forward_seconds: float
    seconds: float
    truncated: int


def require_scikit_learn() -> None:
    """Say what to install before any forward is made.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("a probe needs scikit-learn, which is not installed; install it with: pip install scikit-learn") from None


def refuse_rare_labels(examples: Sequence[Example], task: Task, least: int) -> None:
    """Every label needs `least` training rows.

    Raises:
        DataError: a label has fewer.
    """
    counts = np.bincount([example.gold for example in examples], minlength=len(task.words))
    for label, count in zip(task.classes, counts.tolist(), strict=True):
        if count < least:
            why = "a probe learns from at least one" if least == 1 else "cross-validation needs two; give --valid"
            raise DataError(
                f"label {label!r} has {count} of the {len(examples)} training rows, {why}{' or' if least > 1 else '; give'} more rows"
            )


def run_probe(
    sequences: Sequences,
    train: Examples,
    test: Examples,
    valid: Examples | None,
    progress: Callable[[str], None] = lambda stage: None,
) -> ProbeResult:
    """Fit W and b of p = softmax(W s(h) + b), s the standardisation of the training rows, and evaluate them on the test rows.

    h is the final hidden state at the last token of the prompt or at the mask, of a classifier what the last layer of its head reads.
    W minimises C * sum of -log p(label) + |W|^2 / 2 over the training rows.

    Args:
        train, test, valid: classification rows; every label among the training rows, twice without validation rows.

    Raises:
        NonFiniteLossError: the model gives no finite hidden states.

    References:
        Alain and Bengio 2016, Understanding intermediate layers using linear classifier probes (arXiv 1610.01644).
    """
    from threadpoolctl import threadpool_limits

    begin = time.perf_counter()
    parts = {name: part for name, part in (("training", train), ("validation", valid), ("test", test)) if part is not None}
    read = {}
    for name, part in parts.items():
        progress(f"{len(part.examples)} forwards of {name} rows")
        read[name] = _read(sequences, part.examples)
    forward_seconds = time.perf_counter() - begin
    progress("fitting")
    with threadpool_limits(sequences.model.threads):
        strength, chosen_on = choose_strength(read["training"], read.get("validation"))
        found = _evaluate(_classifier(strength).fit(*read["training"]).predict_proba(read["test"].features), read["test"].gold)
    return ProbeResult(
        evaluation=found,
        strength=strength,
        chosen_by="cross-validation" if valid is None else "validation",
        chosen_on=chosen_on,
        train_rows=len(train.examples),
        valid_rows=len(valid.examples) if valid is not None else 0,
        forward_rows=sum(len(part.examples) for part in parts.values()),
        forward_seconds=forward_seconds,
        seconds=time.perf_counter() - begin,
        truncated=sum(part.truncated for part in parts.values()),
    )


def choose_strength(train: Labelled, valid: Labelled | None) -> tuple[float, Evaluation]:
    """The C of `STRENGTHS` with the best accuracy, then loss, and both: on the validation rows, without them on held-out folds."""
    held = {strength: held_out(train, valid, strength) for strength in STRENGTHS}
    best = max(held, key=lambda strength: held[strength].score())
    return best, held[best]


def held_out(train: Labelled, valid: Labelled | None, strength: float) -> Evaluation:
    """Of the validation rows by a fit of all training rows; without them of every training row by a fit of the other folds."""
    if valid is not None:
        return _evaluate(_classifier(strength).fit(*train).predict_proba(valid.features), valid.gold)
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(min(FOLDS, int(np.bincount(train.gold).min())))
    return _evaluate(cross_val_predict(_classifier(strength), *train, cv=folds, method="predict_proba"), train.gold)


def _read(sequences: Sequences, examples: Sequence[Example]) -> Labelled:
    features = sequences.hidden_states([_read_of(example) for example in examples])
    if not np.isfinite(features).all():
        raise NonFiniteLossError("the model gives no finite hidden states; export it again")
    return Labelled(features.astype(np.float64), np.array([example.gold for example in examples]))


def _read_of(example: Example) -> list[int] | Masked | Classified:
    """The text that all candidates share: of prompts the shortest, since a label word may change their last token."""
    first = example.pairs[0]
    if isinstance(first, Masked | Classified):
        return first
    return min((candidate[0] for candidate in example.pairs if not isinstance(candidate, Masked | Classified)), key=len)


def _classifier(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS))


def _evaluate(probabilities: Floats, gold: Gold) -> Evaluation:
    """Probabilities [rows, labels] against the right labels."""
    predicted = probabilities.argmax(axis=1)
    right = np.maximum(probabilities[np.arange(len(gold)), gold], np.finfo(np.float64).tiny)
    accuracy = float((predicted == gold).mean())
    classes = count_classes(predicted, gold, probabilities.shape[1])
    return Evaluation(len(gold), float(-np.log(right).mean()), accuracy, macro_f1(classes))
