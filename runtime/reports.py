"""What a run tells while it goes: to whoever listens, and to metrics.jsonl."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from edgezo.config import TuneConfig
from edgezo.runtime.evaluation import Evaluation


class StepReport(NamedTuple):
    """One finished step. `step` counts from 1; `seconds` are those of the run, `opening_seconds` of them before first steps; `progress` is the
    finished fraction of the run; `forward_rows` as in `TuneResult`."""

    step: int
    loss: float
    projected_grads: tuple[float, ...]
    learning_rate: float
    step_seconds: float
    seconds: float
    opening_seconds: float
    progress: float
    forward_rows: int


class TuneResult(NamedTuple):
    """How a run ended: finished, out of time, no longer better, or interrupted.

    before: the validation of the untuned model. start: that after an exact start, None without one. best: that of `best_step`.
    peak_bytes: the most memory that the last process had.
    """

    directory: Path
    steps: int
    ended: str
    best_step: int
    before: Evaluation | None
    start: Evaluation | None
    best: Evaluation | None
    forward_rows: int
    seconds: float
    peak_bytes: int | None

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        names = ("steps", "ended", "best_step", "seconds", "forward_rows", "peak_bytes")
        facts = {name: getattr(self, name) for name in names}
        evaluations = {"before": self.before, "start": self.start, "best": self.best}
        found = {name: evaluation.as_dict() for name, evaluation in evaluations.items() if evaluation is not None}
        return {**facts, "seconds": round(self.seconds, 1), **found}


@dataclass
class Reporter:
    """What the loop tells as it goes; every callback may be left out."""

    stage: Callable[[str], None] = lambda text: None
    notice: Callable[[str], None] = lambda text: None
    begin: Callable[[int, int | None], None] = lambda step, total_steps: None
    step: Callable[[StepReport], None] = lambda report: None
    evaluation: Callable[[int, Evaluation, bool], None] = lambda step, evaluation, best: None


def nothing_left(config: TuneConfig, step: int, spent_seconds: float) -> str:
    """Why a process makes no step after the first `step`."""
    steps, minutes = config.total_steps, config.minutes
    late = minutes is not None and spent_seconds >= 60 * minutes
    if steps is not None and step >= steps:
        return f"nothing to tune: --steps {steps}, and as many are done; give more --steps{' and --minutes' if late else ''}"
    before = "another" if step else "the first"
    return f"no step: --minutes {minutes:g} in all were over before {before}, {spent_seconds:.0f} s are spent; give more --minutes"


def going_on(step: int, total: int | None, planned: int | None, learning_rate: float, best: int | None) -> str:
    """Where a run goes on.

    Args:
        step: after which.
        total: steps in all; None where minutes alone end the run.
        planned: that number when the run last ended.
        learning_rate: of the next step.
        best: the step of the best evaluation, if there was one.
    """
    before = f" ({planned} before)" if planned not in (None, total) else ""
    of = f" of {total}{before}" if total is not None else ""
    known = f"; best so far: step {best}" if best is not None else ""
    return f"going on after step {step}{of}, the next with lr {learning_rate:.3g}{known}"


def write_step(metrics: TextIO, report: StepReport) -> None:
    """A line of metrics.jsonl."""
    size = math.sqrt(sum(grad * grad for grad in report.projected_grads) / len(report.projected_grads))
    line = {
        "step": report.step,
        "loss": report.loss,
        "projected_grad_rms": size,
        "lr": report.learning_rate,
        "forward_rows": report.forward_rows,
    }
    metrics.write(json.dumps({**line, "step_seconds": round(report.step_seconds, 4), "seconds": round(report.seconds, 3)}) + "\n")


def append_lines(path: Path) -> TextIO:
    """Open for whole lines, each written at once; a torn last line of an earlier process is ended first."""
    file = open(path, "a+", encoding="utf-8", buffering=1)  # noqa: SIM115  the caller closes it
    if file.tell() and path.read_bytes()[-1:] != b"\n":
        file.write("\n")
    return file
