"""What tuning lowers, and what evaluations measure, of examples under the present weights.

    likelihood     mean over completion tokens of -log p, of the right text alone (teacher forcing)
    cross-entropy  mean over rows of -log softmax(s)[gold]
    accuracy       1 - mean over rows of [argmax(s) = gold]
    f1             1 - macro F1 over the rows, or of generated answers 1 - mean of SQuAD's F1
    exact-match, rouge-l   1 - mean over rows, of generated answers
    preference     mean over rows of -log sigmoid(beta (s_chosen - s_rejected))
    dpo            the same with s - s_ref for s, s_ref under the untuned model
    module:function        minus the mean of a user's own numbers (runtime/outcome.py)

s are a row's candidates' scores: the summed log-probability of a label word, the mean over the tokens of a choice; with calibration the sum
less that after the neutral prompt.

References:
    Malladi et al. 2023, arXiv 2305.17333; Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290).
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from edgezo.config import ANSWER_METRICS, Sampling, TuneConfig
from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime.batch_generate import generate_batch
from edgezo.runtime.class_metrics import ClassCounts, count_classes, macro_f1
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.examples import Example
from edgezo.runtime.outcome import Outcome, load_reward
from edgezo.runtime.prompt_cache import log_probs_after
from edgezo.runtime.scoring import Candidate, Copies, Pair, Scores, Sequences
from edgezo.runtime.stacked_generate import Beginnings, generate_stacked
from edgezo.runtime.tasks import Kind, Task
from edgezo.runtime.text_metrics import METRICS, best_of, require_rouge

DEFAULTS: dict[Kind, str] = {"classification": "cross-entropy", "preference": "preference"}  # likelihood for all others
SMOOTH = {"likelihood", "cross-entropy", "preference", "dpo"}
CandidateScores = npt.NDArray[np.float64]


class Objective:
    """The loss of a task's examples, and their metrics.

    Args:
        sequences: scores under the model's present weights.
        task: what the rows are.
        config: objective, beta, metrics, max_tokens.

    Raises:
        ConfigError: the objective does not fit the rows, or cannot be imported.
    """

    def __init__(self, sequences: Sequences, task: Task, config: TuneConfig) -> None:
        self.sequences, self.task, self.config = sequences, task, config
        self.smooth_name = DEFAULTS.get(task.kind, "likelihood")
        self.name = config.objective or self.smooth_name
        self.metrics: list[str] = [*config.metrics] if config.metrics else (list(ANSWER_METRICS) if task.kind == "answer" else [])
        self._refuse_misfit()
        self.reward = load_reward(self.name) if ":" in self.name else None
        if self.name in SMOOTH:
            self.smooth_name = self.name

    @property
    def generates(self) -> bool:
        """Whether the loss is of generated answers."""
        return not self.task.has_candidates and self.name not in SMOOTH

    @property
    def writes_text(self) -> bool:
        """Whether losses or evaluations read generated answers."""
        return self.generates or (not self.task.has_candidates and bool(self.metrics or self.reward))

    @property
    def smooth(self) -> bool:
        """Whether the loss has a slope that a small perturbation can show."""
        return self.name in SMOOTH

    def loss(self, examples: Sequence[Example]) -> float:
        """The loss that tuning lowers."""
        if self.generates:
            self.sequences.forward_rows += len(examples)
            return self._generated_loss(examples, self._answers(examples))
        return self._value(self.name, self.sequences.log_probs(self._flat(self.name, examples)), examples)

    def stacked_losses(self, groups: Sequence[Sequence[Example]], sides: Sequence[int], copies: Copies) -> npt.NDArray[np.float64]:
        """`loss` of every group under each of its copies, float64 [groups, sides]; of generated answers it is `stacked_generated_losses`."""
        scored = self.sequences.stacked([self._flat(self.name, group) for group in groups], sides, copies)
        return np.array(
            [[self._value(self.name, parts, group) for parts in by_side] for group, by_side in zip(groups, scored, strict=True)]
        )

    def stacked_generated_losses(
        self, groups: Sequence[Sequence[Example]], sides: Sequence[int], beginnings: Beginnings, copy_bytes: int
    ) -> npt.NDArray[np.float64]:
        """As `stacked_losses`, of generated answers; beginnings and copy_bytes as of `generate_stacked`."""
        prompts = [[example.pairs[0][0] for example in group] for group in groups]
        model, batch_tokens = self.sequences.model, self.sequences.batch_tokens
        self.sequences.forward_rows += len(sides) * sum(map(len, groups))
        answers = generate_stacked(model, prompts, sides, beginnings, copy_bytes, self.config.max_tokens, self.task.stop, batch_tokens)
        return np.array([[self._generated_loss(group, texts) for texts in by_side] for group, by_side in zip(groups, answers, strict=True)])

    def evaluate(self, examples: Sequence[Example]) -> Evaluation:
        """Loss and metrics over all examples."""
        return self.evaluate_classes(examples)[0]

    def evaluate_classes(self, examples: Sequence[Example], sampling: Sampling | None = None) -> tuple[Evaluation, list[ClassCounts]]:
        """Loss and metrics over all examples, and of classification the counts of each class.

        The loss is the objective where it is smooth, else that of the kind of data.

        Args:
            examples: of one file.
            sampling: how written answers are drawn; None is greedy.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        counted = self.sequences.forward_rows
        every = self._scores([pair for example in examples for pair in example.pairs])
        self.sequences.forward_rows = counted  # rows that nothing is learned from
        parts = every if self.smooth_name != "likelihood" else _golds(every, examples)
        loss, count = self._value(self.smooth_name, parts, examples), len(examples)
        if not all(np.isfinite(part).all() for part in every):
            loss = math.nan  # of a wrong candidate; an argmax would hide it
        if not math.isfinite(loss):
            remedy = self.sequences.model.remedy
            raise NonFiniteLossError(f"the loss over {count} rows is {loss}; {remedy}, or tune with a smaller --lr")
        if not self.task.has_candidates:
            return Evaluation(count, loss, others=self._text_metrics(examples, sampling)), []
        scores = self.candidate_scores(every, examples)
        if self.task.kind == "preference":
            margins = self._margins(self.smooth_name, scores, examples)
            return Evaluation(count, loss, others={"preferred": float((margins > 0).mean()), "margin": float(margins.mean())}), []
        predicted, gold = np.array([int(np.argmax(row)) for row in scores]), np.array([example.gold for example in examples])
        classes = count_classes(predicted, gold, len(scores[0])) if self.task.kind == "classification" else []
        macro = macro_f1(classes) if classes else None
        others = {"reward": self._reward(examples, scores, None)} if self.reward else {}
        return Evaluation(count, loss, float((predicted == gold).mean()), macro, others), classes

    def _scores(self, candidates: Sequence[Candidate]) -> Scores:
        if not self.task.prefix:
            return self.sequences.log_probs(candidates)
        return log_probs_after(self.sequences, cast("Sequence[Pair]", candidates))  # worked rows stand before prompts of a causal model

    def _flat(self, name: str, examples: Sequence[Example]) -> list[Candidate]:
        """The pairs that a loss needs, example after example."""
        return [pair for example in examples for pair in ([example.pairs[example.gold]] if name == "likelihood" else example.pairs)]

    def _value(self, name: str, parts: Scores, examples: Sequence[Example]) -> float:
        if name == "likelihood":
            return -float(sum(float(part.sum()) for part in parts)) / sum(map(len, parts))
        gold = [example.gold for example in examples]
        with np.errstate(invalid="ignore"):  # NaN is the estimator's to refuse
            scores = [
                row + np.array(example.offset) if example.offset else row
                for row, example in zip(self.candidate_scores(parts, examples), examples, strict=True)
            ]
            if name in {"preference", "dpo"}:
                return float(np.logaddexp(0, -self.config.beta * self._margins(name, scores, examples)).mean())
            if name == "cross-entropy":
                return float(np.mean([np.logaddexp.reduce(row) - row[index] for row, index in zip(scores, gold, strict=True)]))
        if not all(np.isfinite(row).all() for row in scores):
            return math.nan  # an argmax would hide it
        if self.reward:
            return -self._reward(examples, scores, None)
        predicted = np.array([int(np.argmax(row)) for row in scores])
        if name == "f1":
            return 1 - macro_f1(count_classes(predicted, np.array(gold), len(scores[0])))
        return 1 - float((predicted == gold).mean())

    def candidate_scores(self, parts: Scores, examples: Sequence[Example]) -> list[CandidateScores]:
        """Scores of each example's candidates, in nats."""
        return score_candidates(self.task, parts, [len(example.pairs) for example in examples])

    def _margins(self, name: str, scores: list[CandidateScores], examples: Sequence[Example]) -> CandidateScores:
        margins = np.array([row[0] - row[1] for row in scores])
        if name == "dpo":
            margins -= np.array([example.reference[0] - example.reference[1] for example in examples])
        return margins

    def _text_metrics(self, examples: Sequence[Example], sampling: Sampling | None) -> dict[str, float]:
        own = [self.name] if self.name in METRICS else []
        names = list(dict.fromkeys([*own, *self.metrics]))
        if not names and not self.reward:
            return {}
        texts = self._answers(examples, sampling)
        found = {"reward": self._reward(examples, None, texts)} if self.reward else {}
        return {**found, **{name.replace("-", "_"): _mean_metric(name, examples, texts) for name in names}}

    def _generated_loss(self, examples: Sequence[Example], texts: list[str]) -> float:
        return -self._reward(examples, None, texts) if self.reward else 1 - _mean_metric(self.name, examples, texts)

    def _answers(self, examples: Sequence[Example], sampling: Sampling | None = None) -> list[str]:
        """What the model answers to the prompts."""
        prompts = [example.pairs[0][0] for example in examples]
        return generate_batch(self.sequences.model, prompts, self.config.max_tokens, self.task.stop, self.sequences.batch_tokens, sampling)

    def _reward(self, examples: Sequence[Example], scores: list[CandidateScores] | None, texts: list[str] | None) -> float:
        assert self.reward is not None
        outcomes = [
            Outcome(
                example.fields,
                texts[index] if texts is not None else None,
                scores[index].tolist() if scores is not None else None,
                example.gold if scores is not None else None,
            )
            for index, example in enumerate(examples)
        ]
        return float(np.mean(self.reward(outcomes)))

    def _refuse_misfit(self) -> None:
        name, kind = self.name, self.task.kind
        fitting = [smooth for smooth in ("likelihood", "cross-entropy") if smooth == "likelihood" or self.task.has_candidates]
        fitting += ["accuracy"] if self.task.has_candidates and kind != "preference" else []
        fitting += ["f1"] if kind == "classification" else list(METRICS) if kind == "answer" else []
        fitting = ["preference", "dpo"] if kind == "preference" else fitting
        if name not in fitting and ":" not in name:
            raise ConfigError(
                f"--objective {name}: does not fit rows of kind {kind}; give {', '.join(fitting)}, or package.module:function"
            )
        if "rouge-l" in {name, *self.metrics}:
            require_rouge()
        if self.config.metrics and kind != "answer":
            raise ConfigError(f"--metrics {','.join(self.config.metrics)}: compare a generated answer, and rows of kind {kind} have none")


def score_candidates(task: Task, parts: Scores, counts: Sequence[int]) -> list[CandidateScores]:
    """Scores of the candidates of every row, in nats.

    Args:
        parts: log-probabilities of all pairs, row after row.
        counts: pairs of each row; with calibration half of them are after the neutral prompt.

    Returns:
        For each row float64 [candidates].
    """
    sums, lengths = np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])
    ends = np.cumsum(counts)[:-1]
    if task.calibrate is not None:
        return [row[: len(row) // 2] - row[len(row) // 2 :] for row in np.split(sums, ends)]
    return np.split(sums / lengths if task.kind == "choice" else sums, ends)


def add_references(sequences: Sequences, examples: Sequence[Example]) -> list[Example]:
    """Examples with their candidates' log-probabilities under the model as it is now."""
    sums = iter(sequences.log_probs([pair for example in examples for pair in example.pairs]))
    return [example._replace(reference=tuple(float(next(sums).sum()) for _ in example.pairs)) for example in examples]


def _golds(parts: Scores, examples: Sequence[Example]) -> Scores:
    """Those of the right candidates."""
    firsts = np.cumsum([0, *(len(example.pairs) for example in examples)])
    return [parts[first + example.gold] for first, example in zip(firsts[:-1], examples, strict=True)]


def _mean_metric(name: str, examples: Sequence[Example], texts: Sequence[str]) -> float:
    return float(np.mean([best_of(METRICS[name], text, example.answers) for example, text in zip(examples, texts, strict=True)]))
