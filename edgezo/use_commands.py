"""Commands that use a model: eval, predict, generate; and tasks, which lists how to read rows."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgezo import terminal
from edgezo.config import MAX_TOKENS, ROW_FORMATS
from edgezo.errors import ConfigError
from edgezo.options import (
    DRAW,
    AdapterPath,
    AnswerField,
    AnswerTokens,
    Beta,
    Calibrate,
    Choices,
    Device,
    EdgeDir,
    Json,
    LabelField,
    Labels,
    MaxLength,
    Metrics,
    Objective,
    Replace,
    RunDir,
    Seed,
    Step,
    Stop,
    TaskName,
    Temperature,
    Template,
    Threads,
    TopK,
    TopP,
    as_typed,
    sampling_of,
    step_of_run,
    unescape,
)


def eval_command(
    directory: EdgeDir,
    data: Annotated[str, typer.Option("--data", help=f"Rows to evaluate on: {ROW_FORMATS}; or plain text: .txt, .md or a folder.")],
    run: RunDir = None,
    step: Step = None,
    adapter: AdapterPath = None,
    task: TaskName = None,
    template: Template = None,
    labels: Labels = None,
    label_field: LabelField = None,
    max_length: MaxLength = None,
    choices: Choices = None,
    answer_field: AnswerField = None,
    replace: Replace = None,
    stop: Stop = None,
    calibrate: Calibrate = None,
    objective: Objective = None,
    beta: Beta = None,
    metrics: Metrics = None,
    max_tokens: AnswerTokens = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=1, metavar="K", show_default=False, help="Put K worked rows of --train before every prompt."),
    ] = None,
    train: Annotated[str | None, typer.Option("--train", help="Rows to draw the shots from.")] = None,
    temperature: Temperature = None,
    top_k: TopK = DRAW.top_k,
    top_p: TopP = DRAW.top_p,
    seed: Annotated[int, typer.Option("--seed", min=0, max=(1 << 64) - 1, help="Of shots that are drawn, and of the sampling.")] = 0,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Evaluate the edge model, or with --run the tuned one; template and labels are those of the run, or of one that was merged into the model."""
    from edgezo import api
    from edgezo.manifest_reader import read_manifest
    from edgezo.runtime.corpus import sha256_data
    from edgezo.runtime.run import read_run

    if train is not None and Path(train).is_file() and Path(data).is_file() and sha256_data(train) == sha256_data(data):
        terminal.stderr().print(f"warning: --train {train} has the very rows that are evaluated, so that a row may be its own example")
    result = api.evaluate(
        directory,
        data,
        run=run,
        step=step_of_run(step, run),
        adapter=adapter,
        task=task,
        threads=threads,
        device=device,
        shots=shots,
        train=train,
        seed=seed,
        sampling=sampling_of(temperature, top_k, top_p, seed),
        **as_typed(
            template=template,
            labels=labels,
            label_field=label_field,
            max_length=max_length,
            choices=choices,
            answer_field=answer_field,
            replace=replace,
            stop=stop,
            calibrate=calibrate,
            objective=objective,
            beta=beta,
            metrics=metrics,
            max_tokens=max_tokens,
        ),
    )
    if result.truncated:
        terminal.stderr().print(f"{result.truncated} of {result.evaluation.rows} rows were cut to fit")
    if result.labels:
        terminal.stderr().print(f"the labels compared are those of the rows: {', '.join(result.labels)}; --labels names others")
    if as_json:
        shown = {} if shots is None else {"shots": result.shots}
        classes = {"classes": {label: counts.as_dict() for label, counts in result.classes.items()}} if result.classes else {}
        terminal.print_json({**result.evaluation.as_dict(), **classes, "step": result.step, "truncated": result.truncated, **shown})
    else:
        start = f"step 0, the {read_run(run).start_name}" if run is not None else ""
        untuned = "merged" if read_manifest(directory).tuned else "base"
        model = {None: untuned if adapter is None else str(adapter), 0: start}.get(result.step, f"step {result.step}")
        rows = [(model, terminal.evaluation_text(result.evaluation))]
        if shots is not None:
            rows.append(
                (
                    "shots",
                    f"{result.shots} of {train}{'' if result.shots == shots else f'; more of the {shots} do not fit before the longest row'}",
                )
            )
        terminal.print_rows(rows)
        if result.classes:
            terminal.print_classes(result.classes)


def predict_command(
    directory: EdgeDir,
    text: Annotated[
        str | None, typer.Option("--text", help="What the template's field is filled with; - reads it from standard input.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help=f"Or rows without label or answer: {ROW_FORMATS}.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write the rows of --data here as .jsonl, each with its prediction in a field of its own; nothing else is printed of them.",
        ),
    ] = None,
    run: RunDir = None,
    step: Step = None,
    adapter: AdapterPath = None,
    task: TaskName = None,
    template: Template = None,
    labels: Labels = None,
    max_length: MaxLength = None,
    choices: Choices = None,
    answer_field: AnswerField = None,
    replace: Replace = None,
    stop: Stop = None,
    calibrate: Calibrate = None,
    max_tokens: AnswerTokens = None,
    temperature: Temperature = None,
    top_k: TopK = DRAW.top_k,
    top_p: TopP = DRAW.top_p,
    seed: Seed = DRAW.seed,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Tell the likeliest label or choice of a text or of rows, or their answer; how rows are read is that of the run, or of one that was merged into the model, unless given."""
    from edgezo import api
    from edgezo.predictions import rows_to_write, write_predictions

    rows = rows_to_write(output, data) if output is not None else []
    text = read_standard_input().rstrip("\n") if text == "-" else text
    found = api.predict(
        directory,
        texts=None if text is None else [text],
        data=data,
        run=run,
        step=step_of_run(step, run),
        adapter=adapter,
        task=task,
        threads=threads,
        device=device,
        sampling=sampling_of(temperature, top_k, top_p, seed),
        **as_typed(
            template=template,
            labels=labels,
            max_length=max_length,
            choices=choices,
            answer_field=answer_field,
            replace=replace,
            stop=stop,
            calibrate=calibrate,
            max_tokens=max_tokens,
        ),
    )
    if cut := sum(prediction.truncated for prediction in found):
        terminal.stderr().print(f"{cut} of {len(found)} {'texts' if data is None else 'rows'} were cut to fit")
    if output is not None:
        write_predictions(output, rows, found)
        terminal.print_facts({"written": str(output), "rows": len(rows)}, as_json)
        return
    if as_json:
        terminal.print_json({"predictions": [prediction.as_dict() for prediction in found]})
        return
    for prediction in found:
        sys.stdout.write(f"{terminal.prediction_text(prediction, alone=text is not None)}\n")


def generate_command(
    directory: EdgeDir,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue; - reads it from standard input.")],
    run: RunDir = None,
    step: Step = None,
    adapter: AdapterPath = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to write at most.")] = MAX_TOKENS,
    stop: Annotated[
        str | None,
        typer.Option(
            "--stop",
            show_default=False,
            help="Text to end before; \\n is a line break, '' takes off that of the run. [default: that of the run, or of one merged into the model]",
        ),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = DRAW.top_k,
    top_p: TopP = DRAW.top_p,
    seed: Seed = DRAW.seed,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write text with the edge model or, with --run, the tuned one."""
    from edgezo.api import recorded_reading
    from edgezo.runtime.generate import generate, until
    from edgezo.runtime.model import EdgeModel

    text = read_standard_input() if prompt == "-" else prompt
    model = EdgeModel(directory, threads=threads, device=device, run=run, step=step_of_run(step, run), adapter=adapter)
    model.generation_facts  # noqa: B018  a model that writes no text says so
    if chat:
        text = model.text.chat([{"role": "user", "content": text}], reply=True)
    pieces = generate(model, text, max_tokens, sampling_of(temperature, top_k, top_p, seed), special=not chat)
    reading = (recorded_reading(directory, run) if run is not None or adapter is None else None) or {}
    if (note := terminal.labels_note(directory, run, step_of_run(step, run), reading)) is not None:
        terminal.stderr().print(note)
    ending = reading.get("stop") if stop is None else unescape(stop)
    if ending:
        pieces = until(pieces, ending)
    if as_json:
        terminal.print_json({"prompt": text, "text": "".join(pieces), "step": model.step})
        return
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def tasks_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Recipe to print, as YAML; without it all are listed.")] = None,
    as_json: Json = False,
) -> None:
    """List the task recipes that --task takes, or print one."""
    from edgezo.recipe import read_recipe, recipe_names, recipe_path, summarize

    if name is not None:
        path = recipe_path(name, "edgezo tasks")
        recipe = read_recipe(path)
        if as_json:
            terminal.print_json(recipe.model_dump())
        else:
            sys.stdout.write(path.read_text(encoding="utf-8"))
        return
    found = [summarize(read_recipe(recipe_path(known))) for known in recipe_names()]
    if as_json:
        terminal.print_json({"tasks": [summary._asdict() for summary in found]})
    else:
        terminal.print_table([(task.name, task.kind, task.metric, task.description) for task in found])


def read_standard_input() -> str:
    """All of standard input as text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
