"""`edgezo tune`: the set-up around the loop."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from edgezo.config import TuneConfig, describe
from edgezo.errors import AdapterError, ConfigError, RunError
from edgezo.runtime.adapter_files import read_adapter
from edgezo.runtime.calibration import calibrate, decay_warning, first_scale, measuring_config
from edgezo.runtime.corpus import WARNING
from edgezo.runtime.data_summary import data_summary
from edgezo.runtime.dataset import Dataset, read_dataset, weak_validation
from edgezo.runtime.exact_start import ExactStart, resolve_start, start_exactly
from edgezo.runtime.journal_records import head_record
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.lora import Lora
from edgezo.runtime.memory import fit_batches, refuse_less_than_weights
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.replay import check_base, take_head
from edgezo.runtime.reports import Reporter, StepReport, TuneResult
from edgezo.runtime.run import INIT, Run, check_same, journal_header, measured_lr
from edgezo.runtime.run_directory import held_run, open_journal
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.smoothness import smoothness_warning
from edgezo.runtime.theta import Theta, mutable_weights, write_start
from edgezo.runtime.tuner import Tuner
from edgezo.unused import unused_notes

__all__ = ["Reporter", "StepReport", "TuneResult", "tune"]


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
        resume: go on after the last step in `output`; only steps, minutes, eval_every and patience, and the places of the data files, may differ from
            the run's own.
        memory: bytes that the process may take at most; forwards are made small enough.

    Raises:
        EdgezoError: bad data, a run that cannot be continued, a dead tensor, a loss that is not finite. The run directory
            then holds all whole steps.
    """
    opened, reporter, output = time.monotonic(), reporter or Reporter(), Path(output)
    _refuse_unfit(model, output, memory)
    with held_run(output, resume) as previous, model.one_session():
        opening = _Opening(model, output, memory, reporter)
        run = opening.begin(config, opened) if previous is None else opening.go_on(config, previous)
        with open_journal(output, run.config, run.header, previous, run.exact.records) as journal:
            tuner = Tuner(model, run.config, output, run.dataset, run.theta, journal, reporter, run.start)
            tuner.untuned, tuner.validated = run.exact.untuned, run.exact.validated
            tuner.measured_lr = measured_lr(run.header)
            if previous is not None:
                reporter.stage(f"rebuilding step {len(previous.records)} from the journal")
                tuner.go_on_from(previous)
            return tuner.loop(time.monotonic() - opened)


class _Opened(NamedTuple):
    """What the loop works with. start: tensors that the run starts from. exact: what the journal begins with."""

    config: TuneConfig
    dataset: Dataset
    theta: Theta
    header: dict[str, Any]
    start: Path | None
    exact: ExactStart


class _Opening(NamedTuple):
    """Everything before the first step."""

    model: EdgeModel
    output: Path
    memory: int | None
    reporter: Reporter

    def begin(self, config: TuneConfig, opened: float) -> _Opened:
        """A new run, whose minutes began when it was `opened`: rows understood and told, tensors proven live, an exact start, what is not given
        measured."""
        model, reporter, start = self.model, self.reporter, None
        if config.init is not None:
            config, start = _start_from(model, config, self.output)  # gives the model the adapter's rows of the head, too
        given_eps = config.eps is not None
        reporter.stage("reading data")
        dataset = resolve_start(model, read_dataset(model, config, reporter.notice), reporter.notice)
        config = dataset.config
        if config.total_steps == 0 and config.start == "none":
            reporter.notice("--steps 0 without an exact start: nothing is tuned, the run holds what it started from; give --steps N")
        for note in unused_notes(config):
            reporter.notice(note)
        header = journal_header(model.manifest, config, start)
        _tell_rows(dataset, model, reporter)
        theta, dataset = self._ready(config, dataset, start)
        exact = ExactStart([head_record(model.head)] if config.init is not None and len(model.head.tokens) else [])
        if config.start != "none":
            exact = start_exactly(model, theta.objective, dataset, reporter)
        validated = theta.adapter_sha256()
        dataset = dataset.with_offsets(exact.offsets)
        if theta.config is not config:
            measured = calibrate(theta, config, dataset, opened, start, reporter.stage)
            config, theta = measured.config, theta.anew(measured.config, start)
            header = {**header, "config": config.model_dump(), "calibration": measured.facts}
            for line in measured.told:
                reporter.notice(line)
            if theta.objective.name == "dpo":  # by the grid of the run's own eps, as when it goes on
                dataset = _with_references(theta, dataset, self.memory)
        if validated is None or theta.adapter_sha256() != validated:
            exact = exact._replace(validated=None)
        rough = smoothness_warning(theta, dataset.train.examples) if given_eps and theta.objective.smooth else None
        for warning in filter(None, (rough, decay_warning(config))):
            reporter.notice(f"warning: {warning}")
        return _Opened(config, dataset, theta, header, start, exact)

    def go_on(self, config: TuneConfig, previous: Run) -> _Opened:
        """A run that stopped: the same rows, model and settings, tensors proven live."""
        model, reporter = self.model, self.reporter
        # what it measured is its own
        config = config.model_copy(update={name: getattr(previous.config, name) for name in ("eps", "lr") if getattr(config, name) is None})
        reporter.stage("reading data")
        dataset = read_dataset(model, config, reporter.notice)
        config = dataset.config
        check_base(previous, model)
        check_same(previous, config, journal_header(model.manifest, config, previous.start))
        take_head(previous, model, 0)  # the references of dpo are of the model that the run began with
        theta, dataset = self._ready(config, dataset, previous.start)
        return _Opened(config, dataset.with_offsets(previous.journal.offsets), theta, previous.header, previous.start, ExactStart([]))

    def _ready(self, config: TuneConfig, dataset: Dataset, start: Path | None) -> tuple[Theta, Dataset]:
        """theta, and the rows with what dpo compares them to; forwards that keep to the memory."""
        theta = _proven_theta(self.model, config, dataset, start, self.reporter)
        if theta.objective.name == "dpo":
            self.reporter.stage("scoring the rows at the start of the run")
            dataset = _with_references(theta, dataset, self.memory)
        if self.memory is not None:
            self.reporter.stage("measuring what a forward takes")
            everything = [*dataset.train.examples, *(dataset.valid.examples if dataset.valid is not None else [])]
            tokens = fit_batches(theta, everything, self.memory)
            self.reporter.notice(f"forwards of at most {tokens} tokens keep to {self.memory / 1e6:.0f} MB")
        return theta, dataset


def _refuse_unfit(model: EdgeModel, output: Path, memory: int | None) -> None:
    """Refuse a model that is tuned already, and a limit of memory that cannot be kept."""
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


def _tell_rows(dataset: Dataset, model: EdgeModel, reporter: Reporter) -> None:
    """Tell what was understood of the rows, and what speaks against them."""
    limit = dataset.config.max_length
    if limit is not None and limit > model.context:
        reporter.notice(f"--max-length {limit}: the model's context has {model.context} tokens, which holds instead")
    for line in data_summary(dataset, model.text):
        reporter.notice(line)
    if dataset.task.kind == "text":
        reporter.notice(WARNING)
    if (why := weak_validation(dataset)) is not None:
        reporter.notice(why)


def _proven_theta(model: EdgeModel, config: TuneConfig, dataset: Dataset, start: Path | None, reporter: Reporter) -> Theta:
    """theta at the start, each of its tensors proven to be seen by the engine; of another configuration than `config` where eps or lr are to be measured."""
    measuring = measuring_config(model, config)
    model.changed = True  # by rounding to the grid, whatever happens from here on
    weights = mutable_weights(model, measuring, start)
    if measuring is not config:
        weights.eps = max(config.eps or 0.0, first_scale(model))  # the proof perturbs by it
    theta = Theta(model, measuring, weights, Objective(Sequences(model), dataset.task, config))
    older = model.device is None and isinstance(model.adapter, Lora) and not model.generates_copies
    if theta.objective.generates and older:
        reporter.notice(
            f"{model.directory}: exported before answers of several directions could share a forward; export again for faster steps"
        )
    if config.rule == "hizoo" and not theta.objective.smooth:
        raise ConfigError(f"--rule hizoo: --objective {theta.objective.name} changes in steps and has no curvature; take another rule")
    if theta.rule.state_bytes:
        reporter.notice(f"--rule {config.rule} keeps {theta.rule.state_bytes / 1e6:.0f} MB of averages in memory")
    if config.rule == "hizoo" and config.noise == "rademacher" and config.sampler in {"full", "magnitude"}:
        advice = "take another rule" if isinstance(model.adapter, Lora) else "give --noise gaussian"
        reporter.notice(f"--rule hizoo: directions of signs meet one curvature in all weights, so that it changes the rate alone; {advice}")
    reporter.stage("checking that the engine sees changes of every tunable tensor")
    prove_live(model, weights, generates=theta.objective.writes_text)
    return theta


def _with_references(theta: Theta, dataset: Dataset, memory: int | None) -> Dataset:
    """Log-probabilities that dpo is relative to; with a limit of memory row by row, before and after anything is measured alike."""
    fitted = theta.sequences.batch_tokens
    theta.sequences.batch_tokens = fitted if memory is None else 1
    referred = dataset.with_references(theta.sequences)
    theta.sequences.batch_tokens = fitted
    return referred


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
