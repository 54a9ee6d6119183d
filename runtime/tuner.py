"""The loop of a run: evaluate, step, notice a rise of the loss and take it back."""

import json
import math
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from edgezo.config import TuneConfig
from edgezo.errors import DivergenceError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.dataset import Dataset
from edgezo.runtime.evaluation import Evaluation, best_step, evaluations_waited, scheduled_evaluations
from edgezo.runtime.examples import Example
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_records import EVALUATION, STEP_KINDS, StepRecord
from edgezo.runtime.machine import peak_bytes
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.optimizer import schedule_factor
from edgezo.runtime.replay import apply_records, replay
from edgezo.runtime.reports import Reporter, StepReport, TuneResult, append_lines, going_on, nothing_left, write_step
from edgezo.runtime.run import METRICS, Run
from edgezo.runtime.run_directory import write_summary
from edgezo.runtime.signals import stop_signals
from edgezo.runtime.theta import Theta, step_directions
from edgezo.runtime.watch import LEVEL_STEPS, Rise, find_rise, lowest_level, worse_than_start

LAST_BATCHES, MOST_ROWS, CLEARLY = 8, 32, 0.1  # rows that decide whether weights are worse, and by how much of their loss
GUARD_STEPS, RUINED = (2, 4, 8, 16, 32, 64), 0.5  # when the loss of a few rows is compared with that at the start; evaluations do later
SMALLER, MOST_UNDOS = 1 / 4, 8  # after a divergence; 4^8 is 65,536

SETTLE_EVALUATIONS = 2  # in a row without a new best
STILL_STEPS = 5  # in a row without any change of the loss before it is said


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
    start: Path | None = None
    records: list[StepRecord] = field(default_factory=list)
    spent_seconds: float = 0.0
    opening_seconds: float = 0.0  # of those, before first steps: the schedule begins after them
    spent_rows: int = 0
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    untuned: Evaluation | None = None  # before an exact start
    validated: Evaluation | None = None  # of step 0, where the exact start has made it
    lr_scale: float = 1.0
    undos: int = 0
    measured_lr: float | None = None  # what a given rate that proves too large falls to
    planned: int | None = None  # steps in all, before this process
    told: bool = False  # where this process begins
    quiet_until: int = 0  # after a rise that was the rows' alone
    start_loss: float | None = None  # of the guarded rows
    pending: bytes = b""  # kind of the record after which the process before this one ended, changes of settings left out
    still: int = 0  # steps in a row that changed nothing
    started: float = field(init=False)  # when the run would have begun had one process done all of it, by `time.monotonic`
    metrics: TextIO = field(init=False)

    def __post_init__(self) -> None:
        self.order = self.dataset.order()

    def go_on_from(self, previous: Run) -> None:
        """Stand where an earlier process ended. A step after which it ended is made by the loop, which goes back where it outgrows the grid."""
        journal = previous.journal
        rebuilt = len(previous.records) - (journal.last_kind in STEP_KINDS)
        replay(previous, self.model, self.theta.weights, rebuilt, self.theta.rule)
        self.order = self.dataset.order(previous.order_version)
        self.records, self.spent_seconds, self.spent_rows = list(previous.records), previous.seconds, previous.forward_rows
        self.opening_seconds = previous.opening_seconds
        self.evaluations, self.untuned = dict(previous.evaluations), journal.untuned
        self.planned = previous.config.total_steps
        self.lr_scale, self.undos, self.pending = journal.lr_scale, journal.undos, journal.last_kind
        if journal.quiet_step is not None:
            self.quiet_until = journal.quiet_step + LEVEL_STEPS

    def loop(self, opening_seconds: float) -> TuneResult:
        """The forwards of the estimator and one update a step, until the steps or the minutes are used up or a signal asks to stop.

        Args:
            opening_seconds: what this process has taken so far.
        """
        self.spent_seconds += opening_seconds
        self.opening_seconds += opening_seconds
        self.started = time.monotonic() - self.spent_seconds
        step = len(self.records)
        with (
            stop_signals(lambda: self.reporter.notice("stopping after what is under way")) as stopping,
            append_lines(self.directory / METRICS) as self.metrics,
        ):
            opened = {"opening_seconds": opening_seconds, "forward_rows": self.forward_rows, "seconds": self.spent_seconds}
            self._write({name: round(value, 3) for name, value in opened.items()})
            self.reporter.begin(step, self.config.total_steps)
            ended = None
            while ended is None:
                try:
                    ended = self._turn(stopping)
                except NonFiniteLossError as error:
                    if not self.records:
                        raise
                    _, good_step, _ = lowest_level([record.loss for record in self.records])
                    self._go_back(good_step, str(error))
        self.theta.weights.flush()
        step = len(self.records)
        if self.still == step and 0 < step < STILL_STEPS:
            self._tell_still()
        self.model.step, self.model.changed = step, True
        return self._finish(step, ended)

    def _tell_where(self, step: int) -> None:
        """Once in a process, when steps may follow: where it begins."""
        self.told, config, spent = True, self.config, self.spent_seconds
        progress = self._progress(step, spent)
        if config.total_steps != 0 and progress >= 1:
            self.reporter.notice(nothing_left(config, step, spent))
        elif step:
            best = best_step(self.evaluations, 0) if self.evaluations else None
            self.reporter.notice(going_on(step, config.total_steps, self.planned, self._rate(progress), best))

    def _rate(self, progress: float) -> float:
        """The learning rate of a step, as the journal holds it."""
        assert self.config.lr is not None  # given, or measured before the run began
        return float(np.float32(self.config.lr * self.lr_scale * schedule_factor(self.config.schedule, progress, self.config.warmup)))

    def _turn(self, stopping: threading.Event) -> str | None:
        """An evaluation where one is due, then a step, or the reason why there is none."""
        step, config, pending, self.pending = len(self.records), self.config, self.pending, b""
        if pending in STEP_KINDS:
            record = self.records[-1]
            self.theta.step(step_directions(config, step - 1), record.projected_grads, record.learning_rate)
        if stopping.is_set():  # what is due after the last step is made up for by --resume
            return "interrupted"
        if pending in STEP_KINDS:  # what follows a step was left undone, or is the same the second time
            self._look()
            return None
        if not self.told:
            self._tell_where(step)
        progress = self._progress(step, self.seconds)
        due = step not in self.evaluations and (step % config.eval_every == 0 or progress >= 1)
        if (due and self._evaluate(step)) or (pending == EVALUATION and step % config.eval_every == 0):
            scheduled = scheduled_evaluations(self.evaluations, config.eval_every, step)
            start, found, best = scheduled[min(scheduled)], scheduled[step], best_step(scheduled, step)
            if worse_than_start(start, found):
                why = f"the validation loss rose from {start.loss:.4g} to {found.loss:.4g}"
                self._go_back(best, f"step {step}: {why}")
                return None
            waited = evaluations_waited(self.evaluations, config.eval_every, step)
            if progress < 1 and 0 < config.allowed_patience <= waited and pending != EVALUATION:  # a run that is gone on with goes on
                return "no longer better"
            if progress < 1 and self._settles and step % config.eval_every == 0 and waited and waited % SETTLE_EVALUATIONS == 0:
                self._settle(step)
        if progress >= 1:
            return "finished" if step == config.total_steps else "out of time"
        if stopping.is_set():  # during the evaluation
            return "interrupted"
        self._step(step, progress)
        if not stopping.is_set():
            self._look()
        return None

    def _look(self) -> None:
        """After a step: whether the loss rises, or weights are worse than at the start."""
        if not self.theta.objective.smooth:
            return
        rise = find_rise([record.loss for record in self.records], self.config.rows)
        if rise is not None and len(self.records) > self.quiet_until:
            self._look_back(rise)
        elif len(self.records) in GUARD_STEPS:
            self._look_at_start()

    def _step(self, step: int, progress: float) -> None:
        config, begun = self.config, time.monotonic()
        directions = step_directions(config, step)
        lr = self._rate(progress)
        estimates = self.theta.measure(partial(self.dataset.batch, self.order), step, lr)
        unrounded = StepRecord.of(estimates, lr)
        record = self.journal.append(unrounded)
        self.records.append(record)
        self.theta.step(directions, record.projected_grads, record.learning_rate)
        step_seconds, seconds = time.monotonic() - begun, self.seconds
        grads = record.projected_grads[: len(directions)]  # behind them may be what the rule takes beside
        report = StepReport(
            step + 1,
            unrounded.loss,
            grads,
            record.learning_rate,
            step_seconds,
            seconds,
            self.opening_seconds,
            self._progress(step + 1, seconds),
            self.forward_rows,
        )
        write_step(self.metrics, report)
        self.reporter.step(report)
        self.still = 0 if any(grads) or self.theta.rule.rests else self.still + 1
        if self.still == STILL_STEPS:
            self._tell_still()

    def _tell_still(self) -> None:
        steps = f"{self.still} step{'s' if self.still > 1 else ''}"
        self.reporter.notice(
            f"warning: in {steps} no direction changed the objective, so nothing was learned; give more rows (--batch), a larger --eps or a smoother --objective"
        )

    @property
    def _settles(self) -> bool:
        """Whether the rate is a measured one that no schedule lowers."""
        return self.config.schedule == "constant" and self.measured_lr == self.config.lr

    def _settle(self, step: int) -> None:
        """Half the learning rate from here on: at this one the noise of the steps undoes what they learn."""
        assert self.config.lr is not None
        self.lr_scale = self.journal.undo(step, self.lr_scale / 2)
        lr = self.config.lr * self.lr_scale
        self.reporter.notice(f"step {step}: {SETTLE_EVALUATIONS} evaluations without a new best; on with half the learning rate, {lr:.3g}")

    def _look_back(self, rise: Rise) -> None:
        """Score the rows of the last steps now, at the last good step and at the best of the scheduled evaluations: rows may differ more than weights do."""
        step = len(self.records)
        rows = [example for number in range(max(0, step - LAST_BATCHES), step) for example in self.dataset.batch(self.order, number)]
        best = best_step(scheduled_evaluations(self.evaluations, self.config.eval_every, 0), 0)
        losses = {place: self._loss_at(place, rows[-MOST_ROWS:]) for place in (step, best, rise.good_step)}
        good = min(losses, key=lambda place: losses[place])
        if losses[step] > losses[good] + CLEARLY * abs(losses[good]):
            why = f"step {step}: the loss of the last rows is {losses[step]:.4g} and was {losses[good]:.4g} at step {good}"
            self._go_back(good, why)
        else:
            self._rebuild(step)
            self.journal.undo(step, self.lr_scale)  # nothing is taken back: a run that goes on is quiet as long
            self.quiet_until = step + LEVEL_STEPS

    def _look_at_start(self) -> None:
        """Score the same few rows as at the start: weights that know nothing any more may have a loss like that of a hard batch."""
        step, rows = len(self.records), self._guard_rows()
        if self.start_loss is None:
            self.start_loss = self._loss_at(0, rows)
            self._rebuild(step)
        now = self._loss(rows)
        if now > self.start_loss + RUINED * abs(self.start_loss):
            why = f"step {step}: the loss of {len(rows)} training rows is {now:.4g} and was {self.start_loss:.4g} at the start"
            self._go_back(0, why)

    def _guard_rows(self) -> list[Example]:
        examples = self.dataset.train.examples
        return [examples[row] for row in noise.permutation(self.config.seed, len(examples), 0)[:MOST_ROWS]]

    def _loss_at(self, step: int, rows: list[Example]) -> float:
        if step != len(self.records):
            self._rebuild(step)
        return self._loss(rows)

    def _loss(self, rows: list[Example]) -> float:
        """Infinite where it is not finite."""
        self.theta.weights.flush()
        loss = self.theta.objective.loss(rows)
        return loss if math.isfinite(loss) else math.inf

    def _rebuild(self, step: int) -> None:
        """theta after the first `step` steps, from the base."""
        self.theta = self.theta.anew(self.config, self.start)
        apply_records(self.config, self.records[:step], self.theta.weights, self.theta.rule)

    def _go_back(self, step: int, why: str) -> None:
        """Take back the steps after the first `step`, and go on from there with a smaller learning rate.

        Raises:
            DivergenceError: that has been done too often; the run stands at this step.
        """
        assert self.config.lr is not None
        self.undos += 1
        smaller, lower = self.lr_scale * SMALLER, "a quarter of the learning rate"
        if self.measured_lr is not None and self.measured_lr < self.config.lr * smaller:
            smaller, lower = self.measured_lr / self.config.lr, "the learning rate that was measured"
        self.lr_scale = self.journal.undo(step, smaller)
        if step < len(self.records):
            self.quiet_until = 0  # other steps come
        del self.records[step:]
        self.evaluations = {number: found for number, found in self.evaluations.items() if number <= step}
        self._write({"undone_to": step, "lr_scale": self.lr_scale, "seconds": round(self.seconds, 3)})
        lr = self.config.lr * self.lr_scale
        if self.undos >= MOST_UNDOS:
            raise DivergenceError(
                f"{self.directory}: diverged {self.undos} times, the last time: {why}; stopped at step {step}, the last good one, start a new run without --lr and --eps, or with a --lr below {lr:.3g}"
            )
        self._rebuild(step)
        advice = "; without --lr a new run measures one" if self.measured_lr is None and self.undos == 1 else ""
        self.reporter.notice(f"{why}; back to step {step}, on from there with {lower}, {lr:.3g}{advice}")

    def _write(self, line: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(line) + "\n")

    @property
    def seconds(self) -> float:
        """Of the run so far, all its processes."""
        return time.monotonic() - self.started

    @property
    def forward_rows(self) -> int:
        """As in `TuneResult`."""
        return self.spent_rows + self.theta.sequences.forward_rows

    def _progress(self, step: int, seconds: float) -> float:
        """Finished fraction of the run: of its steps or of what was left of its minutes when they began, whichever is further."""
        total, minutes = self.config.total_steps, self.config.minutes
        if total == 0 or (minutes and seconds >= 60 * minutes):  # an exact start alone, or out of time
            return 1.0
        of_minutes = (seconds - self.opening_seconds) / (60 * minutes - self.opening_seconds) if minutes else 0.0
        return max(step / total if total else 0.0, of_minutes)

    def _evaluate(self, step: int) -> bool:
        """Whether there are rows to evaluate on; what was found is kept."""
        if self.dataset.valid is None:
            return False
        self.theta.weights.flush()
        self.reporter.stage("evaluating")
        found = self.validated if step == 0 and self.validated is not None else self.theta.objective.evaluate(self.dataset.valid.examples)
        self.evaluations[step] = found
        best = best_step(self.evaluations, step) == step
        self.journal.mark(step, found, best)
        spent = {"forward_rows": self.forward_rows, "seconds": round(self.seconds, 3)}
        self._write({"step": step, "valid": found.as_dict(), **spent})
        self.reporter.evaluation(step, found, best)
        return True

    def _finish(self, step: int, ended: str) -> TuneResult:
        best, seconds = best_step(self.evaluations, step), self.seconds
        first = self.evaluations.get(0)
        before, start = (first, None) if self.untuned is None else (self.untuned, first)
        result = TuneResult(
            self.directory, step, ended, best, before, start, self.evaluations.get(best), self.forward_rows, seconds, peak_bytes()
        )
        write_summary(self.directory, result.summary())
        return result
