"""What a run that was given no eps or no lr takes instead: measured before its first step, told in a few lines, and kept in its journal."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgezo.config import DEFAULT_STEPS, LARGEST_LR, TuneConfig
from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.dataset import Dataset
from edgezo.runtime.estimators import ESTIMATORS
from edgezo.runtime.journal_records import StepRecord, as_stored
from edgezo.runtime.landscape import FULL_ROWS, LEAST_STEPS, UNRELIABLE, Landscape, Scale, learning_rate, survey
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.objective import Objective
from edgezo.runtime.replay import apply_records
from edgezo.runtime.rules import make_rule
from edgezo.runtime.rules.rule import Rule
from edgezo.runtime.smoothness import PROBE_STEP
from edgezo.runtime.theta import Theta, step_directions

LARGEST = {"lora": 4, "prefix": 4, None: 0}  # k of the largest scale 2^k; tensors of a base have values below 1
FIRST = {"lora": -6, "prefix": -4, None: -10}  # where to begin: near what models of 100M to 1B parameters have
LEAST = -20
IN_PLACE_DIRECTIONS = 8  # one after the other, of two rows each
FAR = 10.0  # times the measured rate: told when a given one is so far from it
MUCH_DECAY = 0.01  # of a weight in a step, of which a person is told
TRIAL_STEPS = 8  # tried and taken back
TRIAL_RUN_STEPS = 40  # the rate they take is that of a run of so many; shorter runs have no trial


class Calibration(NamedTuple):
    """A configuration with eps and lr, what a person is told, and the numbers for the journal."""

    config: TuneConfig
    told: list[str]
    facts: dict[str, Any]


def measuring_config(model: EdgeModel, config: TuneConfig) -> TuneConfig:
    """The configuration to measure under, whose eps leaves room for the largest scale; `config` itself where there is nothing to measure."""
    if config.eps is not None and config.lr is not None:
        return config
    return config.model_copy(update={"eps": max(config.eps or 0.0, 2.0 ** LARGEST[_kind(model)] / 4)})


def first_scale(model: EdgeModel) -> float:
    """Where measuring begins: a perturbation that a model of this kind stands."""
    return float(2.0 ** FIRST[_kind(model)])


def calibrate(
    theta: Theta, config: TuneConfig, dataset: Dataset, opened: float, start: Path | None, stage: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Measure what `config` leaves open; a given eps or lr is kept.

    Without rows of the head the first steps may change the loss around theta as no later ones do (labels out of balance): lr is then measured again
    after a few of them, which are taken back.

    Args:
        theta: at the start, of `measuring_config`; not to be used any more afterwards but by `anew`, since its grid is coarse and trial steps move it.
        config: of the run.
        dataset: rows to measure on.
        opened: when the run's minutes began, by `time.monotonic`.
        start: tensors that the run starts from, as of `mutable_weights`.
        stage: told what is being measured.

    Raises:
        NonFiniteLossError: the loss is not finite near the start.
        ConfigError: weight decay at the measured lr would undo every step.
    """
    stage("measuring the loss around the start")
    probe = _Probe(theta, dataset)
    found = _survey(probe)
    theta.weights.flush()
    steps = _expected_steps(config, probe.row_seconds, dataset, time.monotonic() - opened)
    # of the 64 rows of a step none changed in 7 of 9 steps at a quarter of the reach; at the reach 1 to 5 did in 12 of 14 (`edgezo tune
    # --objective accuracy --start none --batch 4`, SST-2, SmolLM2-135M, LoRA)
    eps = config.eps or (found.eps if theta.objective.smooth else found.reach)
    rule = make_rule(config, {})  # for its rate alone
    has_trial = steps >= TRIAL_RUN_STEPS and config.lr is None and theta.objective.smooth and not len(theta.model.head.tokens)
    after = None
    if has_trial:
        lr = min(_rate(found, rule, config, TRIAL_RUN_STEPS), LARGEST_LR)
        stage(f"measuring it again after {TRIAL_STEPS} steps, which are taken back")
        after = _after_trial(theta, config.model_copy(update={"eps": eps, "lr": lr}), dataset, start)
        steps = _expected_steps(config, probe.row_seconds, dataset, time.monotonic() - opened)
    if after is not None and config.eps is None:
        eps = min(eps, after.eps)
    trusted = _trusted(found, after, rule, config)
    measured = _Measured(found, has_trial, after, trusted, _rate(trusted, rule, config, steps), steps, probe.rows)
    resolved = config.model_copy(update={"eps": eps, "lr": config.lr or min(measured.lr, LARGEST_LR)})
    _refuse_decay(resolved)
    return Calibration(resolved, _told(config, resolved, theta.objective.smooth, measured), measured.facts())


class _Measured(NamedTuple):
    """What was measured, and the rate that follows.

    start: the loss around the start. has_trial: whether steps were tried. after: the loss around the weights after them, None where it was not
    finite. trusted: that of the two by which the rate goes. lr: before it is capped. steps: of the run. rows: that were measured on.
    """

    start: Landscape
    has_trial: bool
    after: Landscape | None
    trusted: Landscape
    lr: float
    steps: int
    rows: int

    def facts(self) -> dict[str, Any]:
        """Numbers for the journal."""
        facts = {**self.start.as_dict(), "lr": self.lr, "steps": self.steps, "rows": self.rows}
        if self.has_trial:
            facts["trial"] = {"tried_steps": TRIAL_STEPS, **(self.after.as_dict() if self.after is not None else {})}
        return facts

    def trial(self) -> list[str]:
        """What the trial found, in a line; none where there was none."""
        if not self.has_trial:
            return []
        tried = f"{TRIAL_STEPS} steps were tried and taken back"
        if self.after is None:
            return [f"{tried}: the loss was not finite after them, so the rate measured before them holds"]
        if self.after.loss >= self.start.loss:
            held = "before them holds" if self.trusted is self.start else "after them holds, which is smaller"
            return [f"{tried}: they did not lower the loss, so the rate measured {held}"]
        return [
            f"{tried}, and the loss around them measured: random steps reached {self.start.reach:.3g} before, {self.after.reach:.3g} after"
        ]


def _trusted(found: Landscape, after: Landscape | None, rule: Rule, config: TuneConfig) -> Landscape:
    """That after the trial; but one that did not lower the loss can lower the rate and not raise it."""
    if after is None:
        return found
    return after if after.loss < found.loss else min(found, after, key=lambda one: _rate(one, rule, config, TRIAL_RUN_STEPS))


def _rate(found: Landscape, rule: Rule, config: TuneConfig, steps: int) -> float:
    return learning_rate(found, rule, config.schedule, config.warmup, steps, config.directions, config.rows / config.directions)


def _refuse_decay(config: TuneConfig) -> None:
    assert config.lr is not None
    if _decays_all(config):
        raise ConfigError(
            f"--weight-decay {config.weight_decay:g}: times the measured lr {config.lr:.3g} is not below 1; give a smaller one, or a smaller --lr"
        )


def decay_warning(config: TuneConfig) -> str | None:
    """What speaks against the weight decay of a configuration with lr."""
    assert config.lr is not None
    taken = config.lr * config.weight_decay
    if taken < MUCH_DECAY:
        return None
    return f"--weight-decay {config.weight_decay:g} times lr {config.lr:.3g} takes {100 * taken:.0f} % off the matrices that are tuned at a step of the full rate; give a smaller one"


def _decays_all(config: TuneConfig) -> bool:
    assert config.lr is not None
    return config.lr * config.weight_decay >= 1


def _after_trial(theta: Theta, config: TuneConfig, dataset: Dataset, start: Path | None) -> Landscape | None:
    """What is measured after the first steps of a run of `config` at its full rate; None where the loss is not finite then."""
    if _decays_all(config):  # the run's own rate may be below this one
        config = config.model_copy(update={"weight_decay": 0.0})
    lr, order, records = float(np.float32(config.lr)), dataset.order(), []
    moved = theta.anew(config, start)
    try:
        for step in range(TRIAL_STEPS):
            estimates = moved.measure(partial(dataset.batch, order), step, lr)
            record = as_stored(StepRecord.of(estimates, lr))
            moved.step(step_directions(config, step), record.projected_grads, record.learning_rate)
            records.append(record)
        moved = moved.anew(theta.config, start)  # whose grid has room for the scales
        apply_records(config, records, moved.weights, moved.rule)
        return _survey(_Probe(moved, dataset))
    except NonFiniteLossError:
        return None


def _survey(probe: "_Probe") -> Landscape:
    kind = _kind(probe.theta.model)
    return survey(probe, FIRST[kind], LEAST, LARGEST[kind])


class _Probe:
    """c and losses at a scale, along the same directions on the same rows, of the smooth objective for the kind of rows."""

    def __init__(self, theta: Theta, dataset: Dataset) -> None:
        config = theta.config.model_copy(update={} if theta.objective.smooth else {"objective": None})
        self.theta = Theta(theta.model, config, theta.weights, Objective(theta.sequences, dataset.task, config))
        examples = dataset.train.examples
        chosen = [examples[row] for row in noise.permutation(config.seed, len(examples), 0)[:FULL_ROWS]]
        count = FULL_ROWS if theta.model.adapter is not None else IN_PLACE_DIRECTIONS
        size = FULL_ROWS // count
        self.groups = [[chosen[(place * size + row) % len(chosen)] for row in range(size)] for place in range(count)]
        self.directions = [Direction(config.seed, PROBE_STEP, number) for number in range(count)]
        self.rows = len(chosen)
        self.row_seconds = float("inf")

    def __call__(self, scale: float) -> Scale:
        begun = time.perf_counter()  # finer than the ticks of monotonic on Windows
        estimates = self.theta.estimates(self.directions, self.groups, scale)
        self.row_seconds = min(self.row_seconds, (time.perf_counter() - begun) / (2 * FULL_ROWS))
        return Scale(np.array([estimate.projected_grad for estimate in estimates]), np.array([estimate.loss for estimate in estimates]))


def forward_rows(config: TuneConfig) -> float:
    """Rows of forward that a step of a run takes on average, a row with all its candidates once, evaluations left out."""
    estimate = ESTIMATORS[config.estimator].forwards(config.directions) * config.batch
    return make_rule(config, {}).forward_rows(estimate, config.rows)


def _expected_steps(config: TuneConfig, row_seconds: float, dataset: Dataset, spent: float) -> int:
    """Steps of the whole run, by the time of a row where minutes alone end it."""
    steps = config.total_steps or (
        None if config.minutes is not None else DEFAULT_STEPS
    )  # of an exact start alone: for those that may follow
    if config.minutes is not None:
        evaluated = len(dataset.valid.examples) / config.eval_every if dataset.valid is not None else 0.0
        fitting = max(1, round((60 * config.minutes - spent) / (row_seconds * (forward_rows(config) + evaluated))))
        steps = min(steps or fitting, fitting)
    assert steps is not None
    return steps


def _told(config: TuneConfig, resolved: TuneConfig, smooth: bool, measured: _Measured) -> list[str]:
    """What was chosen and why; what was given and does not fit."""
    start, after, rate, steps, rows = measured.start, measured.after, measured.lr, measured.steps, measured.rows
    found = after if after is not None and after.eps < start.eps else start  # whose eps it is
    lines = []
    if found.change > UNRELIABLE:
        lines.append(
            f"warning: projected gradients change by {100 * found.change:.0f} % between eps {found.smooth / 4:.3g} and {found.smooth:.3g}, and more elsewhere: rounding or curvature drowns the slope; the run will learn little"
        )
    if config.eps is None and not smooth:
        lines.append(
            f"eps {resolved.eps:.3g}, the reach measured on {rows} rows: by less an objective that changes in steps changes for hardly any row"
        )
    elif config.eps is None:
        at, why = (
            ("there", "")
            if found.smooth == resolved.eps
            else (f"at {found.smooth:.3g}", f"; eps is kept to a quarter of the reach, {found.reach:.3g}")
        )
        lines.append(
            f"eps {resolved.eps:.3g}, measured on {rows} rows: projected gradients {at} and at a quarter of it differ by {100 * found.change:.0f} %{why}"
        )
    if config.lr is None:
        lines += measured.trial()
        counted = f", at the rate for {LEAST_STEPS}" if steps < LEAST_STEPS else ""
        step_rows = f"{config.batch} shared" if config.shares_rows else f"{config.directions} x {config.batch}"
        ending = "the loss is up by a tenth" if measured.trusted.rises else "half of a projected gradient is left"
        lines.append(
            f"lr {resolved.lr:.3g} ({config.rule}, {config.schedule}, about {steps} step{'s' if steps > 1 else ''} of {step_rows} rows{counted}): random steps reach {measured.trusted.reach:.3g} in all, where {ending}"
        )
    elif not 1 / FAR <= config.lr / rate <= FAR:
        direction = "diverge" if config.lr > rate else "learn little"
        lines.append(
            f"warning: --lr {config.lr:.3g} is kept, {rate:.3g} was measured for {steps} steps; the run may {direction}, leave --lr out"
        )
    return lines


def _kind(model: EdgeModel) -> Any:
    """Key of the tables above: the adapter that is fed, None where weights are tuned in place."""
    adapter = model.manifest.adapter
    return adapter.kind if adapter is not None and adapter.kind in LARGEST else None
