"""The weights that a run stands for, made again from base and journal without a forward pass."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from edgezo.config import TuneConfig
from edgezo.errors import NonFiniteLossError, RunError
from edgezo.runtime.attention_probe import probe_fits
from edgezo.runtime.journal_records import STEP_KINDS, StepRecord
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.rules import make_rule
from edgezo.runtime.rules.rule import Rule
from edgezo.runtime.run import Run, StepChoice, base_id, read_run
from edgezo.runtime.theta import mutable_weights, step_directions
from edgezo.runtime.weights import MutableWeights

REPLAY_GROUP = 8  # steps added to a block while it lies in cache; each holds a 1.3 MB table


def check_base(run: Run, model: EdgeModel) -> None:
    """Refuse a run that was tuned from other weights, or has rows of the head that this export cannot be fed."""
    recorded, found = str(run.header.get("base")), base_id(model.manifest)
    if recorded != found:
        raise RunError(
            f"{run.directory}: was tuned from another edge model (base {recorded[:12]}) than {model.directory} ({found[:12]}); give the one it was tuned from"
        )
    fits = all(probe_fits(head.probe, model.manifest) for head in run.journal.heads.values())
    if run.journal.heads and not (model.manifest.takes_head_rows and fits):
        raise RunError(
            f"{run.directory}: has an exact start, and {model.directory} was exported without inputs for it; export it again, or give the one it was tuned from"
        )


def take_head(run: Run, model: EdgeModel, step: int) -> None:
    """Give the model the rows of the head that a run has after `step` steps: those of an exact start, or of the adapter that it began with."""
    model.head = run.journal.head_at(step) or model.head


@contextmanager
def last_step_told(run: Run, step: int) -> Iterator[None]:
    """That step `step` was the last before the run ended, where it outgrows the grid: the process had no time to take it back."""
    try:
        yield
    except NonFiniteLossError as error:
        if step != len(run.records) or run.journal.last_kind not in STEP_KINDS:
            raise
        raise RunError(
            f"{run.directory}: ended within step {step}, which diverged; go on with --resume, which takes it back, or use --step {step - 1}"
        ) from error


def replay(run: Run, model: EdgeModel, weights: MutableWeights, steps: int, rule: Rule | None = None) -> None:
    """Bring the base to the state after `steps` steps, without a forward pass.

    Args:
        rule: at its start; afterwards as after the last step.
    """
    take_head(run, model, steps)
    with last_step_told(run, steps):
        apply_records(run.config, run.records[:steps], weights, rule or make_rule(run.config, weights.sizes))


def apply_records(config: TuneConfig, records: Sequence[StepRecord], weights: MutableWeights, rule: Rule) -> None:
    """Apply the steps of a run from its first one on to weights and a rule at their start."""
    for step, record in enumerate(records):
        directions = step_directions(config, step)
        zo_step(weights, directions, record.projected_grads, record.learning_rate, rule, config.weight_decay)
        if (step + 1) % REPLAY_GROUP == 0:
            weights.flush()
    weights.flush()


def read_tuned(model: EdgeModel, directory: str | os.PathLike[str], step: StepChoice = "best") -> tuple[Run, int]:
    """A run of this model and the number of a step of it, checked."""
    run = read_run(directory)
    check_base(run, model)
    assert run.start is None or run.start.is_file()  # told before anything is changed
    return run, run.resolve(step)


def rebuild(model: EdgeModel, run: Run, step: int) -> None:
    """Turn the base into the model of a run after `step` steps: base + journal."""
    replay(run, model, mutable_weights(model, run.config, run.start), step)
