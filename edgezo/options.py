"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from edgezo.config import ADAPTER_DEFAULTS, ANSWER_METRICS, OBJECTIVES, Sampling, TuneConfig
from edgezo.errors import ConfigError

EdgeDir = Annotated[Path, typer.Argument(metavar="DIR", help="Edge model directory made by `edgezo export`.")]


def setting(field: str, *, text: str | None = None, shown: str | None = None) -> Any:
    """The option of one field of `TuneConfig`: its name, its description and its default come from there."""
    info = TuneConfig.model_fields[field]
    described = text or f"{info.description}."
    value = shown or (None if info.default is None or info.is_required() else str(info.default))
    described = f"{described[0].upper()}{described[1:]}" + (f" [default: {value}]" if value else "")
    described += "".join(f" [{kind}: {defaults[field]}]" for kind, defaults in ADAPTER_DEFAULTS.items() if field in defaults)
    name = f"--{field.replace('_', '-')}"
    return typer.Option(f"{name}/--no-{name[2:]}" if info.annotation is bool else name, show_default=False, help=described)


Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Edge model directory to make.")]
RunDir = Annotated[Path | None, typer.Option("--run", metavar="RUN", help="Use the tuned model of this run directory.")]
AdapterPath = Annotated[
    Path | None, typer.Option("--adapter", metavar="PATH", help="Use an adapter of elsewhere: a PEFT folder or an .onnx_adapter file.")
]
Step = Annotated[
    str | None, typer.Option("--step", show_default=False, help="Step of the run: a number, best (by validation) or last. [default: best]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, everything else on standard error.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, show_default=False, help="Cores to use. [default: the physical ones]")]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, or cuda with onnxruntime-gpu.")]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="How rows are read and measured, by a recipe: a name that `edgezo tasks` lists, or a .yaml file; other options override it.",
    ),
]
Template = Annotated[
    str | None,
    setting(
        "template",
        text="classification prompt with {field} names, as '{sentence} It was'; a masked model's has {mask}; \\n is a line break, '' puts aside how a run or merged model reads rows.",
    ),
]
Labels = Annotated[
    str | None,
    setting(
        "labels",
        text="label words: 'terrible,great' in the order of the integer label, or 'neg=terrible,pos=great'; of a classifier its classes.",
    ),
]
LabelField = Annotated[str | None, setting("label_field")]
Choices = Annotated[
    list[str] | None,
    setting(
        "choices",
        text="template of a choice, once for each: --choices '{choice1}' --choices '{choice2}'; else the field choices lists them.",
    ),
]
AnswerField = Annotated[
    str | None, setting("answer_field", text="field with the right choice, or the texts of a right answer.", shown="answer")
]
Replace = Annotated[
    list[str] | None, setting("replace", text="words that stand in templates for values of a field: 'question:effect=so,cause=because'.")
]
Stop = Annotated[
    str | None,
    setting(
        "stop",
        text="text that ends an answer; \\n is a line break, '' takes off that of a run, merged model or recipe.",
        shown="the end-of-text token",
    ),
]
Calibrate = Annotated[
    str | None,
    setting(
        "calibrate",
        text="neutral prompt: candidates are compared by their log-probability less that after it; '' takes off that of a run, merged model or recipe.",
    ),
]
Objective = Annotated[
    str | None,
    setting(
        "objective",
        text=f"what tuning lowers or raises: {', '.join(OBJECTIVES)}, or a function of yours as package.module:function.",
        shown="by the kind of data",
    ),
]
Beta = Annotated[float | None, setting("beta")]
Metrics = Annotated[
    str | None,
    setting("metrics", text="of generated answers: f1, exact-match, rouge-l; the first ranks states.", shown=",".join(ANSWER_METRICS)),
]
AnswerTokens = Annotated[int | None, setting("max_tokens")]
MaxLength = Annotated[
    int | None, setting("max_length", text="tokens of a row at most.", shown="the model's context; 256 for .txt and .md files")
]

Temperature = Annotated[
    float | None, typer.Option("--temperature", show_default=False, help="Sample at this temperature. [default: greedy]")
]
TopK = Annotated[int, typer.Option("--top-k", help="Sample among the k most likely; 0 is all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample among the most likely that hold this mass.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the sampling.")]
DRAW = Sampling()


def sampling_of(temperature: float | None, top_k: int, top_p: float, seed: int) -> Sampling | None:
    """How to draw; None is greedy, when nothing but a seed was asked for."""
    sampling = Sampling(DRAW.temperature if temperature is None else temperature, top_k, top_p, seed)
    return None if temperature is None and sampling._replace(seed=DRAW.seed) == DRAW else sampling


def step_of_run(text: str | None, run: Path | None) -> Any:
    """`--step` where `--run` may be left out."""
    if text is not None and run is None:
        raise ConfigError(f"--step {text}: says a step of a run, but no --run is given; add --run RUN or leave --step out")
    return step_choice(text)


def step_choice(text: str | None) -> Any:
    """`--step` as a number, 'best' or 'last'."""
    if text is None:
        return "best"
    if text in {"best", "last"}:
        return text
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ConfigError(f"--step {text!r}: a number, best or last is expected")
    return int(text)


def as_typed(**settings: Any) -> dict[str, Any]:
    """Settings of the command line: line breaks in what stands in prompts, None for an option that may be repeated and was not given."""
    for name in ("template", "stop", "calibrate"):
        settings[name] = unescape(settings.get(name))
    for name in ("choices", "replace"):
        settings[name] = settings.get(name) or None
    settings["choices"] = [unescape(choice) for choice in settings["choices"]] if settings["choices"] else None
    return settings


def unescape(text: str | None) -> str | None:
    """A shell cannot easily give a line break: \\n and \\t in a template are read as such."""
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")
