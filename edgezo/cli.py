"""The command line. Defaults come from the configuration; every expected failure is one line and exit code 1."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgezo import __version__, terminal
from edgezo.config import DEFAULT_STEPS, default
from edgezo.errors import EdgezoError, ExportError

app = typer.Typer(
    name="edgezo",
    help="Fine-tune language models with nothing but an inference engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EdgeDir = Annotated[Path, typer.Argument(metavar="DIR", help="Edge model directory made by `edgezo export`.")]
RunDir = Annotated[Path | None, typer.Option("--run", metavar="RUN", help="Use the tuned model of this run directory.")]
Step = Annotated[str, typer.Option("--step", help="Which step of the run: a number, best (by validation) or last.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, everything else on standard error.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, show_default="all cores", help="Cores to use.")]
Template = Annotated[
    str | None, typer.Option("--template", help="Classification prompt with {field} names, as '{sentence} It was'; \\n is a line break.")
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", help="Label words: 'terrible,great' in the order of the integer label, or 'neg=terrible,pos=great'."),
]
LabelField = Annotated[str | None, typer.Option("--label-field", show_default=default("label_field"), help="Field that holds the label.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", show_default="the model's context", help="Tokens of a row at most.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Fine-tune language models with nothing but an inference engine."""
    if version:
        typer.echo(f"edgezo {__version__}")
        raise typer.Exit


@app.command("export")
def export_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, Hugging Face folder, .gguf file, or folder with an optimum model.onnx.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Edge model directory to make.")],
    tunable: Annotated[
        str, typer.Option("--tunable", help="all, or a regular expression over weight names: 'norm', 'self_attn', 'layers\\.2[0-9]\\.'.")
    ] = "all",
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision.")] = None,
    as_json: Json = False,
) -> None:
    """Export a model to an edge model, checked against its source (needs edgezo[export])."""
    export_model = import_export()
    with terminal.stages() as progress:
        result = export_model(model, output, tunable=tunable, revision=revision, progress=progress)
    manifest, checked = result.manifest, result.manifest.verification
    size = sum(file.bytes for file in manifest.files.values())
    if as_json:
        terminal.print_json(
            {
                "directory": str(output),
                "bytes": size,
                "tunable_parameters": manifest.tunable_size,
                "export_seconds": round(result.export_seconds, 1),
                **checked.model_dump(),
            }
        )
        return
    terminal.print_rows(
        [
            (
                "edge model",
                f"{output}, {size / 1e6:,.0f} MB, {manifest.tunable_size:,} tunable parameters in {len(manifest.tunable)} tensors",
            ),
            (
                "checked",
                f"largest log-probability difference {checked.largest_log_prob_difference:.1e}, {checked.greedy_tokens_equal} greedy tokens equal",
            ),
            ("took", f"{result.export_seconds:.0f} s"),
            ("next", f"edgezo tune {output} --data train.jsonl --valid valid.jsonl -o run"),
        ]
    )


@app.command("tune")
def tune_command(
    directory: EdgeDir,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run directory to make, or with --resume to continue.")],
    data: Annotated[str | None, typer.Option("--data", help="Training rows: .jsonl, .csv or .tsv.")] = None,
    valid: Annotated[str | None, typer.Option("--valid", help="Validation rows; the best state by these is kept.")] = None,
    template: Template = None,
    labels: Labels = None,
    label_field: LabelField = None,
    max_length: MaxLength = None,
    steps: Annotated[int | None, typer.Option("--steps", show_default=str(DEFAULT_STEPS), help="Steps in all.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Time budget; with --steps whichever ends first.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", show_default=str(default("lr")), help="Learning rate.")] = None,
    eps: Annotated[float | None, typer.Option("--eps", show_default=str(default("eps")), help="Perturbation scale.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", show_default=str(default("batch")), help="Rows of a step.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", show_default=str(default("seed")), help="Of noise and data order; 0 is an ordinary seed.")
    ] = None,
    noise: Annotated[str | None, typer.Option("--noise", show_default=default("noise"), help="rademacher or gaussian.")] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", show_default=default("schedule"), help="Learning rate: constant, linear or cosine.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option("--warmup", show_default=str(default("warmup")), help="Fraction of the run with a rising learning rate.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", show_default=str(default("weight_decay")), help="Decoupled, on matrices alone.")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", show_default=str(default("eval_every")), help="Steps between evaluations.")
    ] = None,
    eval_rows: Annotated[
        int | None, typer.Option("--eval-rows", show_default=str(default("eval_rows")), help="Validation rows used for these.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML or JSON file of these settings; options override it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue RUN; more --steps or --minutes may be given.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Tune an edge model in place of its weights, forward passes only; Ctrl-C finishes the step and saves."""
    from edgezo import api
    from edgezo.config import make_config
    from edgezo.runtime.run import read_run

    settings: dict[str, Any] = {
        "data": data, "valid": valid, "template": unescape(template), "labels": labels, "label_field": label_field, "max_length": max_length,
        "steps": steps, "minutes": minutes, "lr": lr, "eps": eps, "batch": batch, "seed": seed, "noise": noise, "schedule": schedule,
        "warmup": warmup, "weight_decay": weight_decay, "eval_every": eval_every, "eval_rows": eval_rows,
    }  # fmt: skip
    total = (steps or read_run(output).config.total_steps) if resume else make_config(config, settings).total_steps
    with terminal.tuning(total) as reporter:
        result = api.tune(directory, output, resume=resume, config=config, threads=threads, reporter=reporter, **settings)
    if as_json:
        shown = {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in result._asdict().items()}
        terminal.print_json({**shown, "directory": str(result.directory)})
    else:
        rows = [("run", f"{output}, {result.steps} steps, {result.ended}, {result.seconds:.0f} s")]
        if result.before is not None:
            rows.append(("before", terminal.evaluation_text(result.before)))
        if result.best is not None:
            rows.append((f"step {result.best_step}", f"{terminal.evaluation_text(result.best)}, kept as best"))
        ask = f"edgezo tune {directory} -o {output} --resume" + ("" if result.ended == "interrupted" else " --steps MORE")
        rows += [("use it", f"edgezo generate {directory} --run {output} --prompt '...'"), ("go on", ask)]
        terminal.print_rows(rows)
    if result.ended == "interrupted":
        raise typer.Exit(130)


@app.command("eval")
def eval_command(
    directory: EdgeDir,
    data: Annotated[str, typer.Option("--data", help="Rows to evaluate on: .jsonl, .csv or .tsv.")],
    run: RunDir = None,
    step: Step = "best",
    template: Template = None,
    labels: Labels = None,
    label_field: LabelField = None,
    max_length: MaxLength = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Evaluate the base, or with --run the tuned model; template and labels are then the run's own."""
    from edgezo import api

    result = api.evaluate(
        directory,
        data,
        run=run,
        step=step_choice(step),
        threads=threads,
        template=unescape(template),
        labels=labels,
        label_field=label_field,
        max_length=max_length,
    )
    if result.truncated:
        terminal.stderr().print(f"{result.truncated} of {result.evaluation.rows} rows were cut to fit")
    if as_json:
        terminal.print_json({**result.evaluation.as_dict(), "step": result.step, "truncated": result.truncated})
    else:
        model = "base" if result.step is None else f"step {result.step}"
        terminal.print_rows([(model, terminal.evaluation_text(result.evaluation))])


@app.command("generate")
def generate_command(
    directory: EdgeDir,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue; - reads it from standard input.")],
    run: RunDir = None,
    step: Step = "best",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float | None, typer.Option("--temperature", show_default="greedy", help="Sample at this temperature.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample among the k most likely; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample among the most likely that hold this mass.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampling.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write text with the base or, with --run, the tuned model."""
    from edgezo.runtime.generate import Sampling, generate
    from edgezo.runtime.model import EdgeModel

    text = sys.stdin.read() if prompt == "-" else prompt
    model = EdgeModel(directory, threads=threads, run=run, step=step_choice(step))
    if chat:
        text = model.text.chat([{"role": "user", "content": text}], reply=True)
    sampled = temperature is not None or top_k or top_p < 1
    pieces = generate(model, text, max_tokens, Sampling(temperature or 1.0, top_k, top_p, seed) if sampled else None)
    if as_json:
        terminal.print_json({"prompt": text, "text": "".join(pieces), "step": model.step})
        return
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Edge model or run directory.")], as_json: Json = False
) -> None:
    """Show what an edge model or run directory holds, and check its files."""
    from edgezo.inspection import inspect_path

    facts = inspect_path(path)
    if as_json:
        terminal.print_json(facts)
    else:
        terminal.print_rows(
            [
                (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
                for name, value in facts.items()
            ]
        )


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where to put the edge model and the run.")] = Path("demo"),
    model: Annotated[str | None, typer.Option("--model", show_default="SmolLM2-135M-Instruct", help="Another model to try.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Fewer or more steps than the demo's own.")] = None,
    as_json: Json = False,
) -> None:
    """Export the default model, tune it to sort short personal notes, and show what it learned."""
    from edgezo.demo import run_demo

    run_demo(output, model, steps, as_json)


def import_export() -> Any:
    """The workstation half, or one line on how to get it."""
    try:
        from edgezo.export import export_model
    except ModuleNotFoundError as error:
        raise ExportError(
            f"exporting needs the package {error.name!r}; install the workstation half with: pip install 'edgezo[export]'"
        ) from None
    return export_model


def step_choice(text: str) -> Any:
    """`--step` as a number, 'best' or 'last'."""
    if text in {"best", "last"}:
        return text
    if not text.isdigit():
        raise typer.BadParameter("a number, best or last is expected", param_hint="--step")
    return int(text)


def unescape(text: str | None) -> str | None:
    """A shell cannot easily give a line break: \\n and \\t in a template are read as such."""
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")


def main() -> None:
    """Entry point: expected failures in one line, exit code 1; EDGEZO_DEBUG=1 shows the traceback."""
    try:
        app(prog_name="edgezo")
    except EdgezoError as error:
        if os.environ.get("EDGEZO_DEBUG"):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except OSError as error:
        if os.environ.get("EDGEZO_DEBUG"):
            raise
        sys.stderr.write(f"error: {error.filename or ''}: {error.strerror or error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
