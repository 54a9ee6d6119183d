"""The Python API behind the commands: one function each, settings by the names of `TuneConfig`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from edgezo.config import KIND_SETTINGS, Sampling, TuneConfig, make_config, task_settings_of
from edgezo.errors import ConfigError, DataError, ExportError
from edgezo.manifest_reader import read_manifest
from edgezo.recipe import task_settings
from edgezo.runtime.class_metrics import ClassCounts
from edgezo.runtime.corpus import is_corpus, read_data
from edgezo.runtime.data import Row, read_rows
from edgezo.runtime.dataset import row_limit, task_of, tokenize_data
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.examples import make_examples
from edgezo.runtime.masked import ModelFacts
from edgezo.runtime.memory import parse_bytes
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective, add_references
from edgezo.runtime.predict import Prediction, task_to_predict
from edgezo.runtime.predict import predict as predict_rows
from edgezo.runtime.probe import ProbeResult, refuse_rare_labels, require_scikit_learn, run_probe
from edgezo.runtime.run import StepChoice, read_run, refuse_moved
from edgezo.runtime.sampling import check_sampling, refuse_draws
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.shots import add_shots, draw_shots
from edgezo.runtime.tasks import template_fields
from edgezo.runtime.tune import Reporter, TuneResult
from edgezo.runtime.tune import tune as tune_model

if TYPE_CHECKING:
    from edgezo.export import ExportResult

PathLike = str | os.PathLike[str]


class EvalResult(NamedTuple):
    """An evaluation, the step of the run it was made at (None: of no run), how many rows were cut to fit, and how many shots they had.

    labels: the label words, where nothing but the rows says what they are; empty otherwise. classes: of classification the counts of every class, by the label that predictions show.
    """

    evaluation: Evaluation
    step: int | None
    truncated: int
    shots: int = 0
    labels: tuple[str, ...] = ()
    classes: Mapping[str, ClassCounts] = MappingProxyType({})


def export_model(
    model: str,
    output: PathLike,
    *,
    progress: Callable[[str], None] = lambda stage: None,
    **settings: Any,
) -> "ExportResult":
    """`edgezo.export.export_model`, or one line on how to get the workstation half.

    Raises:
        ExportError: a package of the extra `export` is missing; and all that `edgezo.export.export_model` raises.
    """
    try:
        from edgezo.export import export_model as export

        return export(model, Path(output), progress=progress, **settings)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"exporting needs the package {error.name!r}; install the workstation half with: pip install 'edgezo[export]'"
        ) from None


def tune(
    directory: PathLike,
    run: PathLike,
    *,
    resume: bool = False,
    config: PathLike | None = None,
    task: PathLike | None = None,
    threads: int | None = None,
    device: str = "cpu",
    memory: int | str | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> TuneResult:
    """Tune an edge model; writes the run directory and leaves the edge model as it is.

    Args:
        directory: edge model made by `export_model`.
        run: directory to make, or with `resume` to continue.
        resume: go on where the run stopped; its own settings hold, `steps` and `minutes` may be raised.
        config: YAML or JSON file of settings; `settings` override it.
        task: name or .yaml file of a recipe, which sets how rows are read and measured; `config` and `settings` override it.
        threads: cores to use; all of this process when None.
        device: "cpu" or "cuda".
        memory: what the process may take at most, in bytes or as "1.5GB".
        reporter: callbacks for progress.
        settings: fields of `TuneConfig`, such as data, valid, template, labels, steps, lr.

    Raises:
        EdgezoError: one of edgezo/errors.py; whole steps are kept.
    """
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items() if value is not None}
    limit = parse_bytes(memory) if isinstance(memory, str) else memory
    if resume:
        if config is not None:
            raise ConfigError("--resume continues with the run's own settings; leave --config out and give what shall change as options")
        if task is not None:
            raise ConfigError(f"--resume continues with the run's own settings; leave --task {task} out")
        recorded = read_run(str(run)).config
        refuse_moved(str(run), recorded, {"data", "valid"} - given.keys())
        given = {**recorded.model_dump(), **given}
    recipe = task_settings(task)
    model = EdgeModel(directory, threads=threads, device=device)
    resolved = make_config(config, given, model.manifest.adapter.kind if model.manifest.adapter is not None else None, recipe)
    return tune_model(model, resolved, str(run), resume=resume, memory=limit, reporter=reporter)


def evaluate(
    directory: PathLike,
    data: PathLike,
    *,
    run: PathLike | None = None,
    step: StepChoice = "best",
    adapter: PathLike | None = None,
    task: PathLike | None = None,
    threads: int | None = None,
    device: str = "cpu",
    shots: int | None = None,
    train: PathLike | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    **settings: Any,
) -> EvalResult:
    """Evaluate an edge model, or with `run` the tuned one, on a data file.

    Args:
        directory: edge model made by `export_model`.
        data: .jsonl, .json, .csv or .tsv rows; or plain text, a .txt or .md file or a folder of them.
        run: run directory whose tuned model to evaluate; None for the edge model as it is.
        step: of the run: a number, "best" (by validation) or "last".
        adapter: PEFT folder or .onnx_adapter file to use instead of a run.
        task: name or .yaml file of a recipe, in place of the reading of the run or of the edge model.
        threads: cores to use; all of this process when None.
        device: "cpu" or "cuda".
        shots: worked rows of `train` before every prompt; fewer where the longest row leaves no space.
        train: rows to draw them from, with `seed`.
        sampling: how to draw generated answers; None is greedy.
        settings: how rows are read and measured, as `TASK_SETTINGS` of edgezo.config; where not given those of the run, or of the runs merged into the edge model,
            unless rows of another kind are given.

    Raises:
        EdgezoError: bad data, model or run.
    """
    if sampling is not None:
        check_sampling(sampling)
    if (shots is None) != (train is None):
        raise ConfigError("--shots and --train go together: how many worked rows to show, and the file they are drawn from; give both")
    config = _task_config(_reading(directory, run, {**settings, "data": data}, task), {**settings, "data": str(data)}, task)
    rows, reader = read_data(data), _reader(directory)
    train_rows = read_rows(train) if train is not None else []
    kind = task_of([*rows, *train_rows], config, reader)
    model = EdgeModel(directory, threads=threads, device=device)
    used = 0
    if shots is not None and train is not None:
        drawn = draw_shots(train_rows, kind, shots, seed)
        kind, used = add_shots(kind, rows, drawn, model.text, row_limit(model, config), kind.room)
    examples, truncated = tokenize_data(model, config, kind, config.data, rows)
    objective = Objective(Sequences(model), kind, config)
    if not objective.writes_text:
        refuse_draws(sampling, kind.kind)
    if objective.name == "dpo":
        model.use(run=run, step=0)
        examples = add_references(objective.sequences, examples)
    if run is not None or adapter is not None:
        model.use(run=run, step=step, adapter=adapter)
    with model.one_session():
        found, classes = objective.evaluate_classes(examples, sampling)
    words = () if config.labels is not None or reader.classes else tuple(kind.words)
    by_label = dict(zip(kind.classes, classes, strict=True)) if classes else {}
    return EvalResult(found, model.step, truncated, used, words, by_label)


def predict(
    directory: PathLike,
    *,
    texts: Sequence[str] | None = None,
    data: PathLike | None = None,
    run: PathLike | None = None,
    step: StepChoice = "best",
    adapter: PathLike | None = None,
    task: PathLike | None = None,
    threads: int | None = None,
    device: str = "cpu",
    sampling: Sampling | None = None,
    **settings: Any,
) -> list[Prediction]:
    """The likeliest label or choice, or the answer, of every text or of every row of a data file, which needs neither.

    Args:
        directory: edge model made by `export_model`.
        texts: what the template's only field is filled with, or for a run without template the prompts; or
        data: .jsonl, .json, .csv or .tsv rows with the template's fields.
        run: run directory whose tuned model and reading of rows to use; None for the edge model as it is.
        step: of the run: a number, "best" (by validation) or "last".
        adapter: PEFT folder or .onnx_adapter file to use instead of a run.
        task: name or .yaml file of a recipe, in place of the reading of the run or of the edge model.
        threads: cores to use; all of this process when None.
        device: "cpu" or "cuda".
        sampling: how to draw answers; None is greedy.
        settings: how rows are read, as `TASK_SETTINGS` of edgezo.config; where not given those of the run, or of the runs merged into the edge model,
            unless rows of another kind are given.

    Raises:
        EdgezoError: bad data, model or run; it is not said what to predict; a template of several fields for a text.
    """
    if (texts is None) == (data is None):
        raise ConfigError("predict needs either a text (--text) or a file of rows (--data), and not both")
    if isinstance(texts, str):
        raise ConfigError("texts is one string; give a list of texts")
    reading = _reading(directory, run, {**settings, "data": data}, task)
    config = _task_config(reading, {**settings, "data": str(data)}, task)
    reader = _reader(directory)
    if texts is not None:
        if config.template is None and reading is None:
            raise ConfigError("a text fills a template; give --template with --labels, --choices or --answer-field, or a --run or --task")
        names = template_fields(config.template, reader) if config.template is not None else ["prompt"]
        if len(names) != 1:
            raise ConfigError(f"--template {config.template!r}: has {len(names)} fields, a text fills one; give a data file")
        rows = [Row({names[0]: text}, f"text {number}") for number, text in enumerate(texts, 1)]
    else:
        rows = read_rows(str(data))
    if not rows:
        return []
    kind = task_to_predict(rows, config, reader, reading is not None)
    model = EdgeModel(directory, threads=threads, device=device, run=run, step=step, adapter=adapter)
    return predict_rows(model, rows, kind, row_limit(model, config), sampling)


def probe(
    directory: PathLike,
    data: PathLike,
    test: PathLike,
    *,
    valid: PathLike | None = None,
    rows: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda stage: None,
    task: PathLike | None = None,
    **settings: Any,
) -> ProbeResult:
    """A linear probe of the base: logistic regression on its final hidden states, one forward a row. Needs the extra `probe`.

    Args:
        directory: edge model made by `export_model`.
        data: .jsonl, .json, .csv or .tsv training rows of a classification.
        test: rows to evaluate on.
        valid: rows to choose the strength of the penalty by; None: cross-validation on the training rows.
        rows: use the first so many training rows; None: all.
        threads: cores to use; all of this process when None.
        device: "cpu" or "cuda".
        progress: told every stage.
        task: name of a recipe, or a file of one.
        settings: template, labels, label_field and max_length.

    Raises:
        EdgezoError: bad data or model, no classification, a label without training rows, or scikit-learn is missing.
    """
    require_scikit_learn()
    reader = _reader(directory)
    config = _task_config(None, {**settings, "data": str(data)}, task)
    everything = read_rows(data)
    kind = task_of(everything, config, reader)
    if kind.kind != "classification":
        raise DataError(f"a probe learns the labels of a classification, this is {kind.kind}; give --template and --labels")
    if rows is not None and not 1 <= rows <= len(everything):
        raise DataError(f"--rows {rows}: {data} has {len(everything)} rows; give 1 to {len(everything)}")
    files = [everything[:rows], read_rows(test), *([read_rows(valid)] if valid is not None else [])]
    model = EdgeModel(directory, threads=threads, device=device)
    made = [make_examples(part, kind, model.text, row_limit(model, config)) for part in files]
    refuse_rare_labels(made[0].examples, kind, least=2 if valid is None else 1)
    return run_probe(Sequences(model), made[0], made[1], made[2] if valid is not None else None, progress)


def _reader(directory: PathLike) -> ModelFacts:
    """What reading rows needs to know of an edge model."""
    return ModelFacts.of(read_manifest(Path(directory)))


def recorded_reading(directory: PathLike, run: PathLike | None = None) -> dict[str, Any] | None:
    """How a run reads rows, or without one the runs merged into an edge model; None where there are none."""
    return task_settings_of(read_run(run).config) if run is not None else read_manifest(Path(directory)).reading


def _reading(directory: PathLike, run: PathLike | None, given: Mapping[str, Any], recipe: PathLike | None = None) -> dict[str, Any] | None:
    """What is recorded, unless a recipe is given, or what is given is of rows of another kind."""
    recorded = recorded_reading(directory, run)
    if recorded is None or recipe is not None:
        return None
    other = any(given.get(name) is not None and name not in recorded for name in KIND_SETTINGS)
    plain = given["data"] is not None and is_corpus(given["data"]) and "template" in recorded
    return None if other or plain or given.get("template") == "" else recorded


def _task_config(reading: dict[str, Any] | None, settings: dict[str, Any], recipe: PathLike | None = None) -> TuneConfig:
    """How to read rows: as given, else as the recipe says, without one as it is recorded."""
    given = {**(reading or {}), **{name: value for name, value in settings.items() if value is not None}}
    return make_config(None, given, task=task_settings(recipe))
