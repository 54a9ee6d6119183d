"""`edgezo tune`: the loop, and the set-up around it."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO

import numpy as np
from pydantic import ValidationError

from edgezo.config import TuneConfig, describe
from edgezo.errors import AdapterError, ConfigError, RunError
from edgezo.runtime.adapter_files import read_adapter
from edgezo.runtime.corpus import WARNING
from edgezo.runtime.dataset import Dataset, read_dataset
from edgezo.runtime.evaluation import Evaluation, best_step
from edgezo.runtime.exact_start import ExactStart, resolve_start, start_exactly
from edgezo.runtime.journal import Journal, StepRecord, head_record
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.lora import Lora
from edgezo.runtime.machine import peak_bytes
from edgezo.runtime.memory import fit_batches, refuse_less_than_weights
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.optimizer import schedule_factor
from edgezo.runtime.run import (
    INIT,
    METRICS,
    check_base,
    check_same,
    held_run,
    journal_header,
    open_journal,
    replay,
    write_summary,
)
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.smoothness import smoothness_warning
from edgezo.runtime.theta import Theta, mutable_weights, step_directions, write_start

STILL_STEPS = 5  # in a row without any change of the loss before it is said


class StepReport(NamedTuple):
    """One finished step. `step` counts from 1; `progress` is the finished fraction of the run."""

    step: int
    loss: float
    projected_grads: tuple[float, ...]
    learning_rate: float
    step_seconds: float
    seconds: float
    progress: float


class TuneResult(NamedTuple):
    """How a run ended: finished, out of time, or interrupted.

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
    seconds: float
    peak_bytes: int | None


@dataclass
class Reporter:
    """What the loop tells as it goes; every callback may be left out."""

    stage: Callable[[str], None] = lambda text: None
    notice: Callable[[str], None] = lambda text: None
    begin: Callable[[int, int | None], None] = lambda step, total_steps: None
    step: Callable[[StepReport], None] = lambda report: None
    evaluation: Callable[[int, Evaluation, bool], None] = lambda step, evaluation, best: None


@dataclass
class Tuner:
    """Everything the loop works with, opened and checked."""

    model: EdgeModel
    config: TuneConfig
    directory: Path
    dataset: Dataset
    theta: Theta
    journal: Journal
    reporter: Reporter
    first_step: int = 0
    spent_seconds: float = 0.0
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    untuned: Evaluation | None = None  # before an exact start

    def loop(self) -> TuneResult:
        """The forwards of the estimator and one update a step, until the steps or the minutes are used up or a signal asks to stop."""
        config, order = self.config, self.dataset.order()
        started = time.monotonic() - self.spent_seconds
        step = self.first_step
        if self._progress(step, self.spent_seconds) >= 1:
            self.reporter.notice(f"nothing to tune: {step} steps are done, as many as were asked for; give more --steps or --minutes")
        with _stop_signals() as stopping, _append_lines(self.directory / METRICS) as metrics:
            self.reporter.begin(step, config.total_steps)
            still = 0
            while True:
                progress = self._progress(step, time.monotonic() - started)
                if step not in self.evaluations and (step % config.eval_every == 0 or progress >= 1):
                    self._evaluate(step, metrics, started)
                if progress >= 1:
                    ended = "finished" if step == config.total_steps else "out of time"
                    break
                if stopping.is_set():
                    ended = "interrupted"
                    break
                begun = time.monotonic()
                directions = step_directions(config, step)
                lr = float(np.float32(config.lr * schedule_factor(config.schedule, progress, config.warmup)))  # as the journal holds it
                estimates = self.theta.measure(partial(self.dataset.batch, order), step, lr)
                loss = sum(estimate.loss for estimate in estimates) / len(estimates)
                record = self.journal.append(StepRecord(tuple(estimate.projected_grad for estimate in estimates), lr, loss))
                self.theta.step(directions, record.projected_grads, record.learning_rate)
                step += 1
                now = time.monotonic()
                report = StepReport(
                    step,
                    loss,
                    record.projected_grads,
                    record.learning_rate,
                    now - begun,
                    now - started,
                    self._progress(step, now - started),
                )
                _write_step(metrics, report)
                self.reporter.step(report)
                still = 0 if any(record.projected_grads) or self.theta.rule.rests else still + 1
                if still == STILL_STEPS:
                    self.reporter.notice(
                        f"warning: in {STILL_STEPS} steps no direction changed the objective, so nothing was learned; give more rows (--batch), a larger --eps or a smoother --objective"
                    )
        self.theta.weights.flush()
        self.model.step, self.model.changed = step, True
        return self._finish(step, ended, time.monotonic() - started)

    def _progress(self, step: int, seconds: float) -> float:
        """Finished fraction of the run: of its steps or of its minutes, whichever is further."""
        total, minutes = self.config.total_steps, self.config.minutes
        return max(step / total if total else 0.0, seconds / (60 * minutes) if minutes else 0.0)

    def _evaluate(self, step: int, metrics: TextIO, started: float) -> None:
        if self.dataset.valid is None:
            return
        self.theta.weights.flush()
        self.reporter.stage("evaluating")
        found = self.theta.objective.evaluate(self.dataset.valid.examples)
        self.evaluations[step] = found
        best = best_step(self.evaluations, step) == step
        self.journal.mark(step, found, best)
        metrics.write(json.dumps({"step": step, "valid": found.as_dict(), "seconds": round(time.monotonic() - started, 3)}) + "\n")
        self.reporter.evaluation(step, found, best)

    def _finish(self, step: int, ended: str, seconds: float) -> TuneResult:
        best = best_step(self.evaluations, step)
        first = self.evaluations.get(0)
        before, start = (first, None) if self.untuned is None else (self.untuned, first)
        result = TuneResult(self.directory, step, ended, best, before, start, self.evaluations.get(best), seconds, peak_bytes())
        summary: dict[str, Any] = {
            "steps": step,
            "ended": ended,
            "best_step": best,
            "seconds": round(seconds, 1),
            "peak_bytes": result.peak_bytes,
        }
        for name, evaluation in (("before", result.before), ("start", result.start), ("best", result.best)):
            if evaluation is not None:
                summary[name] = evaluation.as_dict()
        write_summary(self.directory, summary)
        return result


def tune(
    model: EdgeModel,
    config: TuneConfig,
    output: str | Path,
    *,
    resume: bool = False,
    memory: int | None = None,
    reporter: Reporter | None = None,
) -> TuneResult:
    """Tune a freshly opened model; afterwards its weights are those of the last step.

    Args:
        model: from `EdgeModel(directory)`; its weights are changed in place.
        config: what to do.
        output: run directory to make, or with `resume` to continue.
        resume: go on after the last step in `output`; only steps, minutes and eval_every, and the places of the data files, may differ from
            the run's own.
        memory: bytes that the process may take at most; forwards are made small enough.

    Raises:
        EdgezoError: bad data, a run that cannot be continued, a dead tensor, a loss that is not finite. The run directory
            then holds all whole steps.
    """
    reporter, output = reporter or Reporter(), Path(output)
    if model.changed:
        raise RunError(
            f"{output}: the model given is tuned already; tune starts from the base, open the edge model anew without run= and adapter="
        )
    if memory is not None and model.device is not None:
        raise ConfigError(
            f"--memory: what a process takes on {model.device.name} is not measured; leave it out and lower --batch and --max-length"
        )
    if memory is not None:
        refuse_less_than_weights(model, memory)
    with held_run(output, resume) as previous:
        start = previous.start if previous is not None else None
        if previous is None and config.init is not None:
            config, start = _start_from(model, config, output)  # gives the model the adapter's rows of the head, too
        reporter.stage("reading data")
        dataset = read_dataset(model, config, reporter.notice)
        if previous is None:
            dataset = resolve_start(model, dataset, reporter.notice)
        config = dataset.config
        header = journal_header(model.manifest, config, start)
        if previous is not None:
            check_base(previous, model)
            check_same(previous, config, header)
        if previous is None and dataset.task.kind == "text":
            reporter.notice(WARNING)
        weights = mutable_weights(model, config, start)
        theta = Theta(model, config, weights, Objective(Sequences(model), dataset.task, config))
        if theta.rule.state_bytes:
            reporter.notice(f"--rule {config.rule} keeps {theta.rule.state_bytes / 1e6:.0f} MB of averages in memory")
        reporter.stage("checking that the engine sees changes of every tunable tensor")
        prove_live(model, weights, generates=theta.objective.writes_text)
        if theta.objective.name == "dpo":
            reporter.stage("scoring the rows at the start of the run")
            if memory is not None:  # a row at a time: how much fits is measured below
                theta.sequences.batch_tokens = 1
            dataset = dataset.with_references(theta.sequences)
        if memory is not None:
            reporter.stage("measuring what a forward takes")
            everything = [*dataset.train.examples, *(dataset.valid.examples if dataset.valid is not None else [])]
            reporter.notice(f"forwards of at most {fit_batches(theta, everything, memory)} tokens keep to {memory / 1e6:.0f} MB")
        if previous is None and theta.objective.smooth and (warning := smoothness_warning(theta, dataset.train.examples)):
            reporter.notice(f"warning: {warning}")
        given = [head_record(model.head)] if previous is None and config.init is not None and len(model.head.tokens) else []
        begun, exact = time.monotonic(), ExactStart(given, None)
        if previous is None and config.start == "exact":
            reporter.stage("solving the rows of the head")
            exact = start_exactly(model, theta.objective, dataset, reporter.notice)
        with open_journal(output, config, header, previous, exact.records) as journal:
            tuner = Tuner(model, config, output, dataset, theta, journal, reporter)
            tuner.spent_seconds, tuner.untuned = time.monotonic() - begun, exact.untuned
            if previous is not None:
                reporter.stage(f"rebuilding step {len(previous.records)} from the journal")
                replay(previous, model, weights, len(previous.records), theta.rule)
                tuner.first_step, tuner.spent_seconds = len(previous.records), previous.seconds
                tuner.evaluations, tuner.untuned = dict(previous.evaluations), previous.journal.untuned
            return tuner.loop()


def _start_from(model: EdgeModel, config: TuneConfig, output: Path) -> tuple[TuneConfig, Path]:
    """Read --init and keep its tensors in the run, which must not depend on other files; rank and alpha are the adapter's."""
    adapter = read_adapter(Path(str(config.init)), model.manifest)
    if isinstance(adapter, Lora):
        if not adapter.complete:
            raise AdapterError(
                f"{config.init}: leaves branch points of {model.directory} out, which would never learn; export with --targets as the adapter has"
            )
        own = {"rank": adapter.rank, "alpha": adapter.alpha}
        for name, value in own.items():
            asked = getattr(config, name)
            if name in config.model_fields_set and asked != value:
                raise ConfigError(
                    f"--{name} {asked}: the adapter {config.init} has {name} {value}; leave --{name} out or start from another"
                )
        try:
            config = TuneConfig.model_validate({**config.model_dump(), **own})
        except ValidationError as error:
            raise ConfigError(describe(error)) from None
        model.head = adapter.head if len(adapter.head.tokens) else model.head
    write_start(adapter, output / INIT)
    return config, output / INIT


def _write_step(metrics: TextIO, report: StepReport) -> None:
    size = math.sqrt(sum(grad * grad for grad in report.projected_grads) / len(report.projected_grads))
    line = {"step": report.step, "loss": report.loss, "projected_grad_rms": size, "lr": report.learning_rate}
    metrics.write(json.dumps({**line, "step_seconds": round(report.step_seconds, 4), "seconds": round(report.seconds, 3)}) + "\n")


def _append_lines(path: Path) -> TextIO:
    """Open for whole lines, each written at once; a torn last line of an earlier process is ended first."""
    file = open(path, "a+", encoding="utf-8", buffering=1)  # noqa: SIM115  the caller closes it
    if file.tell() and path.read_bytes()[-1:] != b"\n":
        file.write("\n")
    return file


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set the event at the first SIGINT or SIGTERM; a second SIGINT interrupts at once. Only the main thread can listen."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.set()

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
