"""The configuration of a run: the one source of its defaults, checked, and saved resolved."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgezo.errors import ConfigError, first_line, nearest

AdapterKind = Literal["lora", "prefix"]
ALL_LINEAR = "all-linear"  # targets of LoRA
PREFIX_TOKENS = 5
RANK_LIMIT, ALPHA_LIMIT = 4096, 1e6
CONFIG_BYTES_LIMIT = 1 << 20
DEFAULT_STEPS = 500
LARGEST_LR = 1e6
DEFAULT_PATIENCE = 3
# rows of a direction that an adapter has for the objective accuracy: one row changes it along hardly any direction. F1 and exact match of written
# answers would take four times as long a step, and were not measured
ACCURACY_BATCH = 4
SCALARS = {"hizoo": 2}  # numbers a direction that the journal holds, one where a rule is not named here
SHARING = ("one-sided", "curvature")  # estimators whose directions all see the same rows
ANSWER_METRICS = ("f1", "exact-match")  # of generated answers, unless --metrics says otherwise
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
ROW_FORMATS = f"{', '.join(ROW_SUFFIXES[:-1])} or {ROW_SUFFIXES[-1]}"
OBJECTIVES = ("likelihood", "cross-entropy", "accuracy", "f1", "exact-match", "rouge-l", "preference", "dpo")


NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})
MAX_TOKENS = 64  # of a generated text


class Sampling(NamedTuple):
    """How to draw a token: p_i ~ exp(logit_i / temperature) over the `top_k` most likely (0: all) that make up `top_p` of the mass."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class TuneConfig(BaseModel):
    """Everything that decides a run. Field names are the command line's, with `_` for `-`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = Field(description=f"training rows: {ROW_FORMATS}; or plain text: a .txt or .md file, or a folder of them")
    valid: str | None = Field(None, description="validation rows; the best state by these is kept; when unset some of the training rows")
    valid_share: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="share of the training rows set aside for validation when valid is unset, by default none of fewer than 100 rows; 0 sets none aside",
    )
    template: str | None = Field(
        None, description="classification prompt with {field} names; the label word continues it, or stands at the {mask} of a masked model"
    )
    labels: dict[str, str] | None = Field(None, description="label as written in the data: label word")
    label_field: str = Field("label", description="field that holds the label")
    choices: list[str] | None = Field(None, description="templates of a row's choices; else its field choices lists them")
    answer_field: str | None = Field(None, description="field that holds the right choice or the texts of a right answer")
    replace: dict[str, dict[str, str]] | None = Field(None, description="values of a field that stand in templates as other words")
    stop: str | None = Field(
        None, min_length=1, description="text that ends an answer, learned and obeyed; the end-of-text token when unset"
    )
    calibrate: str | None = Field(
        None, min_length=1, description="neutral prompt, whose score of a candidate is taken off its own when candidates are compared"
    )
    objective: str | None = Field(None, description="what tuning lowers or raises; by the kind of data when unset")
    beta: float = Field(0.1, gt=0, le=1e3, allow_inf_nan=False, description="of preference and dpo: inverse temperature")
    metrics: list[Literal["f1", "exact-match", "rouge-l"]] | None = Field(
        None, description="of generated answers: f1, exact-match, rouge-l; the first ranks states"
    )
    max_tokens: int = Field(50, gt=0, description="of an answer that is generated to evaluate")
    max_length: int | None = Field(
        None, gt=1, description="tokens of a row at most; when unset the model's context, and 256 for plain text files"
    )
    steps: int | None = Field(
        None, ge=0, description=f"steps in all, 0 for an exact start alone; {DEFAULT_STEPS} when neither steps nor minutes is given"
    )
    minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="time budget in minutes, of reading rows, checking that the engine sees changes, an exact start, measuring, steps and evaluations; a step that has begun and the last evaluation are finished",
    )
    lr: float | None = Field(None, gt=0, le=LARGEST_LR, allow_inf_nan=False, description="learning rate; measured at the start when unset")
    eps: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False, description="perturbation scale; measured at the start when unset")
    directions: int = Field(1, gt=0, le=1024, description="directions of a step, each with rows of its own")
    batch: int = Field(16, gt=0, description=f"rows of a direction; with an adapter {ACCURACY_BATCH} where the objective is accuracy")
    estimator: Literal["two-sided", "one-sided", "curvature"] = Field(
        "two-sided", description="of projected gradients; with one-sided and curvature all directions share the rows of one"
    )
    rule: Literal["sgd", "normalized", "sign", "fzoo", "meazo", "momentum", "adam", "conservative", "svrg", "hizoo"] = Field(
        "sgd", description="of the update; normalized has root mean square lr in every weight"
    )
    beta_m: float = Field(0.9, ge=0, lt=1, description="of rules momentum and adam: average of gradients")
    beta_v: float = Field(0.99, ge=0, lt=1, description="of rules adam and meazo: average of squares")
    anchor_every: int = Field(5, gt=0, description="of rule svrg: steps between estimates over many rows")
    anchor_batches: int = Field(8, gt=0, le=1024, description="of rule svrg: steps whose rows such an estimate has")
    hessian_smooth: float = Field(
        1e-6, gt=0, lt=1, description="of rule hizoo: share of a direction's curvature in the average that steps are divided by"
    )
    sampler: Literal["full", "layers", "magnitude", "lozo", "subzero", "tezo"] = Field(
        "full", description="which weights a direction moves"
    )
    share: float = Field(
        0.25, gt=0, le=1, description="of samplers layers and magnitude: fraction of layers, or of a tensor's weights, that move"
    )
    z_rank: int = Field(4, gt=0, le=64, description="of samplers lozo, subzero and tezo: rank of a direction in a matrix")
    redraw_every: int = Field(50, gt=0, description="of samplers lozo and subzero: steps for which factors are kept")
    rank: int = Field(8, gt=0, le=RANK_LIMIT, description="of LoRA")
    alpha: float = Field(16.0, gt=0, le=ALPHA_LIMIT, allow_inf_nan=False, description="of LoRA, whose scaling is alpha / rank")
    tune_a: bool = Field(False, description="tune LoRA's A too; else B alone (LoRA-FA)")
    init: str | None = Field(None, description="adapter to start from: a PEFT folder or an .onnx_adapter file")
    start: Literal["exact", "head", "none"] | None = Field(
        None,
        description="exact: what a linear model learns from forwards of the rows is put into the weights first; head: into rows of the head alone; exact for label words and texts when unset, else none",
    )
    start_rows: int = Field(2048, gt=1, description="training rows that an exact start reads at most, one or two forwards each")
    seed: int = Field(0, ge=0, lt=1 << 64, description="of noise and data order; 0 is an ordinary seed")
    noise: Literal["rademacher", "gaussian", "sphere"] = Field("rademacher", description="distribution of z")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="of the learning rate")
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the run with a rising learning rate")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="decoupled, on matrices alone")
    eval_every: int = Field(100, gt=0, description="steps between evaluations")
    patience: int | None = Field(
        None,
        ge=0,
        description=f"evaluations in a row without a new best that end a run, 0 for never; {DEFAULT_PATIENCE} when neither steps nor minutes is given, else 0",
    )
    eval_rows: int = Field(256, gt=0, description="validation rows used for these; all when fewer")

    @model_validator(mode="after")
    def _encodable(self) -> "TuneConfig":
        for name, value in self:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # as Python reads a path of other bytes
                raise ValueError(
                    f"--{name.replace('_', '-')} {value!r}: is not UTF-8, which a run is kept in; rename the file or give other text"
                ) from None
        return self

    @model_validator(mode="after")
    def _bounded(self) -> "TuneConfig":
        if self.objective is not None and self.objective not in OBJECTIVES and not re.fullmatch(r"[\w.]+:\w+", self.objective):
            raise ValueError(f"--objective {self.objective}: give {', '.join(OBJECTIVES)}, or package.module:function")
        if self.lr is not None and self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"--lr {self.lr:g} times --weight-decay {self.weight_decay:g} is {self.lr * self.weight_decay:g}, and must be below 1; lower one of them"
            )
        if self.rule == "fzoo" and self.directions < 2:
            raise ValueError("--rule fzoo: divides by the spread over the directions, and there is one; give --directions 2 or more")
        if self.rule == "hizoo" and self.estimator != "curvature":
            raise ValueError("--rule hizoo: takes the curvature along every direction; give --estimator curvature")
        if self.noise != "rademacher" and self.sampler in ("lozo", "subzero", "tezo"):
            raise ValueError(f"--noise {self.noise}: the factors of --sampler {self.sampler} are signs; leave --noise out")
        if self.noise == "sphere" and self.sampler != "full":
            raise ValueError(f"--noise sphere: is of all weights, --sampler {self.sampler} moves some; leave one of them out")
        return self

    @property
    def shares_rows(self) -> bool:
        """Whether all directions of a step see the same rows."""
        return self.estimator in SHARING

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.batch if self.shares_rows else self.directions * self.batch

    @property
    def table(self) -> Literal["rademacher", "gaussian"]:
        """Distribution of the independent elements."""
        return "rademacher" if self.noise == "rademacher" else "gaussian"

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None when time alone ends it."""
        return self.steps if self.steps is not None or self.minutes is not None else DEFAULT_STEPS

    @property
    def allowed_patience(self) -> int:
        """Evaluations in a row without a new best that end the run; 0: none do."""
        if self.patience is not None:
            return self.patience
        return DEFAULT_PATIENCE if self.steps is None and self.minutes is None else 0


# how rows are read and measured: what an evaluation takes from the run
TASK_SETTINGS = (
    "template", "labels", "label_field", "max_length", "choices", "answer_field", "replace", "stop", "calibrate", "objective", "beta",
    "metrics", "max_tokens",
)  # fmt: skip

# of these, what a merged model is read by later: not what was learned from, which may name code to import
READING_SETTINGS = tuple(name for name in TASK_SETTINGS if name not in ("objective", "beta"))
KIND_SETTINGS = ("labels", "choices", "answer_field")  # that say what continues a template


def task_settings_of(config: "TuneConfig", names: Iterable[str] = TASK_SETTINGS) -> dict[str, Any]:
    """Those of `names` that a configuration has."""
    return {name: value for name in names if (value := getattr(config, name)) is not None}


TAKEN_OFF = ("template", "stop", "calibrate")  # of these an empty text takes off what a run or a recipe has

# what differs from the fields' defaults where an adapter is tuned: measured in docs/adapters.md
ADAPTER_DEFAULTS: dict[AdapterKind, dict[str, Any]] = {
    "lora": {"directions": 16, "batch": 1, "rule": "normalized", "schedule": "cosine"},
    "prefix": {"directions": 16, "batch": 1, "rule": "normalized", "schedule": "cosine"},
}


def choices_of(field: str) -> tuple[str, ...]:
    """What a setting of `TuneConfig` may be."""
    return get_args(TuneConfig.model_fields[field].annotation)


def make_config(
    file: str | os.PathLike[str] | None,
    options: dict[str, Any],
    kind: AdapterKind | None = None,
    task: Mapping[str, Any] = NO_SETTINGS,
) -> TuneConfig:
    """A configuration: defaults < those of the adapter < the rows that an adapter has for accuracy < task < file < options.

    Args:
        file: YAML or JSON settings, or None.
        options: by name; None means not given, an empty text takes off what the others say where `TAKEN_OFF` has it.
        kind: adapter that the edge model is prepared for; it has defaults of its own.
        task: settings of a recipe (edgezo/recipe.py).

    Raises:
        ConfigError: the file cannot be read, or a value is unknown or out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    off = {name for name in TAKEN_OFF if given.get(name) == ""}
    chosen = {**task, **(read_settings(Path(file)) if file is not None else {}), **given}
    chosen = {name: value for name, value in chosen.items() if name not in off}
    defaults = ADAPTER_DEFAULTS[kind] if kind is not None else {}
    if kind is not None and chosen.get("objective") == "accuracy":
        defaults = {**defaults, "batch": ACCURACY_BATCH}
    values = parse_values({**defaults, **chosen})
    try:
        return TuneConfig.model_validate(values)
    except ValidationError as error:
        blamed = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
        raise ConfigError(describe(error, str(file) if file and blamed not in given else None)) from None


def parse_values(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with labels, replace and metrics in the form of `TuneConfig`, whichever form they were written in.

    Raises:
        ConfigError: labels or replace are written otherwise.
    """
    parsed = dict(values)
    if values.get("labels") is not None:
        parsed["labels"] = parse_labels(values["labels"])
    if isinstance(values.get("replace"), list):
        parsed["replace"] = {}
        for field, words in map(parse_replacement, values["replace"]):
            parsed["replace"].setdefault(field, {}).update(words)
    if isinstance(values.get("metrics"), str):
        parsed["metrics"] = [name.strip() for name in values["metrics"].split(",")]
    return parsed


def parse_labels(given: Any) -> dict[str, str]:
    """Label as written in the data to label word.

    Args:
        given: `terrible,great` or a list (words in the order of the integer label), `neg=terrible,pos=great` or a mapping, in which
            labels may share a word, as 0 and neg, but not all of them.

    Raises:
        ConfigError: a word is missing, given twice in a list or to all labels of a mapping, or two forms are mixed.
    """
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(",")]
        mapped = ["=" in part for part in parts]
        if any(mapped) and not all(mapped):
            raise ConfigError(f"--labels {given!r}: mixes words and label=word; use one form")
        pairs = [part.split("=", 1) for part in parts] if any(mapped) else list(enumerate(parts))
    elif isinstance(given, list | dict):
        pairs = list(given.items() if isinstance(given, dict) else enumerate(given))
    else:
        raise ConfigError(f"--labels {given!r}: a {type(given).__name__}; give words, or label=word pairs")
    if any(isinstance(part, bool) for pair in pairs for part in pair):
        raise ConfigError(f"--labels {given!r}: YAML reads yes, no, on and off as true and false; put them in quotes")
    labels = {str(key).strip(): "" if word is None else str(word).strip() for key, word in pairs}
    words, distinct = list(labels.values()), len(set(labels.values()))
    listed = isinstance(given, list) or (isinstance(given, str) and "=" not in given)
    if all(labels) and not all(words):
        empty = next(label for label, word in labels.items() if not word)
        which = f"word {int(empty) + 1}" if listed else f"the word of {empty!r}"
        raise ConfigError(f"--labels {given!r}: {which} is empty; give every label its word")
    if len(labels) != len(pairs) or not all(labels) or distinct < (len(words) if listed else min(len(words), 2)):
        raise ConfigError(f"--labels {given!r}: every label needs one word of its own")
    return labels


def parse_replacement(given: Any) -> tuple[str, dict[str, str]]:
    """`question:effect=so,cause=because` as the field and its words.

    Raises:
        ConfigError: it is written otherwise.
    """
    field, colon, words = str(given).partition(":")
    pairs = [part.partition("=") for part in words.split(",")]
    if not field or not colon or not all(value and equals for value, equals, _ in pairs):
        raise ConfigError(f"--replace {given!r}: write it as field:value=word,value=word")
    return field, {value.strip(): word.strip() for value, _, word in pairs}


PLAIN = {
    "int_parsing": "write a whole number",
    "float_parsing": "write a number",
    "bool_parsing": "write true or false",
}  # by pydantic's type


def describe(error: ValidationError, file: str | None = None, known: Iterable[str] = ()) -> str:
    """The first problem of a validation in one line.

    Args:
        file: where the value came from, None for an option.
        known: names of the settings; those of `TuneConfig` when empty.
    """
    first = next((entry for entry in error.errors() if entry["type"] == "extra_forbidden"), error.errors()[0])
    name = ".".join(str(part) for part in first["loc"])
    shown = f"--{str(first['loc'][0] if first['loc'] else '').replace('_', '-')}" if file is None else f"{file}: {name}"
    if first["type"] == "missing":
        return f"{shown}: not given; it is needed"
    if first["type"] == "extra_forbidden":
        settings = list(known or TuneConfig.model_fields)
        return f"{shown}: no such setting{nearest(name, settings)}; the settings are {', '.join(settings)}"
    message = PLAIN.get(first["type"], first["msg"].removeprefix("Value error, "))
    return f"{shown} {first['input']!r}: {message[0].lower()}{message[1:]}" if name else message


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by name, of a YAML or JSON file.

    Raises:
        ConfigError: missing, too large, malformed, or no mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.stat().st_size > CONFIG_BYTES_LIMIT:
        raise ConfigError(f"{path}: larger than {CONFIG_BYTES_LIMIT} bytes; this is no configuration")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as {'JSON' if path.suffix == '.json' else 'YAML'} ({_reason(error)})") from None
    if values is None:
        raise ConfigError(f"{path}: empty; write settings as name: value")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, not settings by name")
    return values


def _reason(error: Exception) -> str:
    """What a parser says, in one line, with the line it stopped at."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return first_line(error)
