"""The command line. Defaults come from the configuration; every expected failure is one line and exit code 1."""

import io
import math
import os
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from edgezo import __version__, baseline_commands, chat, export_command, rate, run_commands, terminal, use_commands
from edgezo.config import DEFAULT_PATIENCE, DEFAULT_STEPS, choices_of
from edgezo.errors import ConfigError, EdgezoError
from edgezo.options import (
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
    Stop,
    TaskName,
    Template,
    Threads,
    as_typed,
    setting,
)
from edgezo.storage import is_run

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy that typer 0.29 carries


class OneLineGroup(typer.core.TyperGroup):
    """Tells in one line that a command cannot be read (click: three, exit code 2) or was interrupted (typer 0.29: none)."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Read what stands before the command's name."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except UsageError as error:
            raise _in_one_line(error) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _in_one_line(error) from None
        except KeyboardInterrupt as interrupt:
            sys.stderr.write(f"{'; '.join(['interrupted', *map(str, interrupt.args)])}\n")
            raise typer.Exit(130) from None


def _in_one_line(error: Any) -> ConfigError:
    told = " ".join(error.format_message().split()).removesuffix(".")
    where = f"{'' if told.endswith('?') else ';'} see: {error.ctx.command_path} --help" if error.ctx is not None else ""
    return ConfigError(f"{told}{where}")


FEW_STEPS = 8  # whose mean loss is told of a run without validation rows
app = typer.Typer(
    name="edgezo",
    cls=OneLineGroup,
    help="Fine-tune language models with nothing but an inference engine.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

if TYPE_CHECKING:
    from edgezo.runtime.tune import TuneResult


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Fine-tune language models with nothing but an inference engine."""
    if version:
        typer.echo(f"edgezo {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app.command("export")(export_command.export_command)


@app.command("tune")
def tune_command(
    directory: EdgeDir,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Run directory to make, or with --resume to continue.")],
    data: Annotated[str | None, setting("data")] = None,
    valid: Annotated[
        str | None, setting("valid", text="validation rows; the best state by these is kept.", shown="some of the training rows")
    ] = None,
    valid_share: Annotated[
        float | None,
        setting(
            "valid_share",
            text="share of the training rows set aside for validation without --valid, by default none of fewer than 100; 0 sets none aside.",
        ),
    ] = None,
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
    steps: Annotated[int | None, setting("steps", text="steps in all.", shown=f"{DEFAULT_STEPS} unless --minutes is given")] = None,
    minutes: Annotated[
        float | None,
        setting(
            "minutes",
            text="time budget of the run in all, from reading its rows on; an exact start and measuring are finished once begun; with --steps whichever ends first.",
        ),
    ] = None,
    lr: Annotated[float | None, setting("lr", text="learning rate.", shown="measured at the start")] = None,
    eps: Annotated[float | None, setting("eps", text="perturbation scale.", shown="measured at the start")] = None,
    directions: Annotated[int | None, setting("directions")] = None,
    batch: Annotated[int | None, setting("batch")] = None,
    estimator: Annotated[str | None, setting("estimator", text=f"of projected gradients: {', '.join(choices_of('estimator'))}.")] = None,
    rule: Annotated[
        str | None,
        setting(
            "rule",
            text=f"of the update: {', '.join(choices_of('rule'))}; normalized has root mean square lr in every weight, hizoo takes --estimator curvature.",
        ),
    ] = None,
    beta_m: Annotated[float | None, setting("beta_m")] = None,
    beta_v: Annotated[float | None, setting("beta_v")] = None,
    anchor_every: Annotated[int | None, setting("anchor_every")] = None,
    anchor_batches: Annotated[int | None, setting("anchor_batches")] = None,
    hessian_smooth: Annotated[float | None, setting("hessian_smooth")] = None,
    sampler: Annotated[str | None, setting("sampler", text=f"which weights a direction moves: {', '.join(choices_of('sampler'))}.")] = None,
    share: Annotated[float | None, setting("share")] = None,
    z_rank: Annotated[int | None, setting("z_rank")] = None,
    redraw_every: Annotated[int | None, setting("redraw_every")] = None,
    rank: Annotated[int | None, setting("rank")] = None,
    alpha: Annotated[float | None, setting("alpha")] = None,
    tune_a: Annotated[bool | None, setting("tune_a")] = None,
    init: Annotated[str | None, setting("init")] = None,
    start: Annotated[
        str | None,
        setting(
            "start",
            text="exact: put what a linear model learns from a forward or two a row into the weights first; head: into rows of the head alone, for label words so that other texts stay as they are; none. [default: exact where rows have label words or texts to write]",
        ),
    ] = None,
    start_rows: Annotated[int | None, setting("start_rows")] = None,
    seed: Annotated[int | None, setting("seed")] = None,
    noise: Annotated[str | None, setting("noise", text=f"distribution of z: {', '.join(choices_of('noise'))}.")] = None,
    schedule: Annotated[str | None, setting("schedule", text="of the learning rate: constant, linear or cosine.")] = None,
    warmup: Annotated[float | None, setting("warmup")] = None,
    weight_decay: Annotated[float | None, setting("weight_decay")] = None,
    eval_every: Annotated[int | None, setting("eval_every")] = None,
    patience: Annotated[
        int | None,
        setting(
            "patience",
            text="evaluations in a row without a new best that end the run, 0 for never.",
            shown=f"{DEFAULT_PATIENCE} when neither --steps nor --minutes is given, else 0",
        ),
    ] = None,
    eval_rows: Annotated[int | None, setting("eval_rows")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML or JSON file of these settings; options override it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue RUN; more --steps or --minutes may be given.")] = False,
    threads: Threads = None,
    device: Device = "cpu",
    memory: Annotated[
        str | None, typer.Option("--memory", show_default=False, help="Peak memory to stay below, as 1.5GB: forwards are cut to fit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tune an edge model with forward passes only; Ctrl-C finishes the step and saves."""
    from edgezo import api
    from edgezo.runtime.signals import interrupted_by_terminate

    settings = as_typed(
        data=data, valid=valid, valid_share=valid_share, template=template, labels=labels, label_field=label_field, max_length=max_length,
        choices=choices, answer_field=answer_field, replace=replace, stop=stop, calibrate=calibrate, objective=objective,
        beta=beta, metrics=metrics, max_tokens=max_tokens,
        steps=steps, minutes=minutes, lr=lr, eps=eps, directions=directions,
        batch=batch, estimator=estimator, rule=rule, beta_m=beta_m, beta_v=beta_v, anchor_every=anchor_every,
        anchor_batches=anchor_batches, hessian_smooth=hessian_smooth, sampler=sampler, share=share, z_rank=z_rank, redraw_every=redraw_every, rank=rank,
        alpha=alpha, tune_a=tune_a, init=init, start=start, start_rows=start_rows, seed=seed, noise=noise, schedule=schedule,
        warmup=warmup, weight_decay=weight_decay, eval_every=eval_every, patience=patience, eval_rows=eval_rows,
    )  # fmt: skip
    how: dict[str, Any] = {"resume": resume, "config": config, "task": task, "threads": threads, "device": device, "memory": memory}
    try:
        with terminal.tuning() as reporter, interrupted_by_terminate():
            result = api.tune(directory, output, reporter=reporter, **how, **settings)
    except KeyboardInterrupt:  # outside the loop, which ends by itself
        kept = "whole steps are kept, go on with --resume" if is_run(output) else "nothing was kept, it was before the first step"
        raise KeyboardInterrupt(kept) from None
    if as_json:
        shown = {name: value.as_dict() if hasattr(value, "as_dict") else value for name, value in result._asdict().items()}
        terminal.print_json({**shown, "directory": str(result.directory)})
    else:
        terminal.print_rows(tune_rows(directory, output, result))
    if result.ended == "interrupted":
        raise typer.Exit(130)


def tune_rows(directory: Path, output: Path, result: "TuneResult") -> list[tuple[str, str]]:
    """How a run ended, and what to do with it."""
    from edgezo.runtime.evaluation import evaluations_waited
    from edgezo.runtime.run import read_run

    run = read_run(output)
    peak = f", peak memory {result.peak_bytes / 1e6:.0f} MB" if result.peak_bytes is not None else ""
    rows = [("run", f"{output}, {result.steps} step{'s' if result.steps != 1 else ''}, {result.ended}, {result.seconds:.0f} s{peak}")]
    if undos := run.journal.undos:
        assert run.config.lr is not None  # a run with steps has one
        lower = run.config.lr * run.journal.lr_scale
        times = f"{undos} time{'s' if undos > 1 else ''}"
        rows.append(("gone back", f"{times}, the loss rose or was not finite; lr {run.config.lr:.3g}, at the end {lower:.3g}"))
    if result.before is not None:
        rows.append(("before", terminal.evaluation_text(result.before)))
    if result.start is not None:
        rows.append(("exact start", terminal.evaluation_text(result.start)))
    if result.best is not None and result.best_step > 0:
        rows.append((f"step {result.best_step}", f"{terminal.evaluation_text(result.best)}, kept as best"))
    elif result.best is not None and result.steps:
        why = f"no evaluated step was better by {result.best.ranked_by}" if max(run.evaluations) > 0 else "no later step was evaluated"
        start = f"step 0, the {'exact ' if result.start is not None else ''}start"
        rows.append(("best", f"{start}: {why}; --step last uses step {result.steps}"))
    few = min(FEW_STEPS, result.steps // 2)
    if result.best is None and few:
        first, last = (fmean(record.loss for record in part) for part in (run.records[:few], run.records[-few:]))
        rows.append(("training loss", f"{first:.4f} over the first {few} step{'s' if few > 1 else ''}, {last:.4f} over the last"))
    config = run.config
    command, given = ("predict", "--text '...'") if config.labels is not None else ("generate", "--prompt '...'")
    if config.choices is not None or config.answer_field is not None:
        command, given = "predict", "--data ROWS"
    waited = 0 < config.allowed_patience <= evaluations_waited(run.evaluations, config.eval_every, result.steps)
    more = {
        "interrupted": "",
        "finished": f" --steps {2 * result.steps or DEFAULT_STEPS}{' --patience 0' if waited else ''}",
        "out of time": f" --minutes {math.ceil(20 * max(config.minutes or 0.0, result.seconds / 60)) / 10:g}",
        "no longer better": " --patience 0",
    }[result.ended]
    unseen = result.best is not None and result.start is None and result.steps and not max(run.evaluations)  # the best is the base
    edge, made = terminal.typed(directory), terminal.typed(output)
    rows.append(("use it", f"edgezo {command} {edge} --run {made}{' --step last' if unseen else ''} {given}"))
    rows.append(("go on", f"edgezo tune {edge} -o {made} --resume{more}"))
    return rows


app.command("eval")(use_commands.eval_command)
app.command("predict")(use_commands.predict_command)
app.command("generate")(use_commands.generate_command)
app.command("tasks")(use_commands.tasks_command)


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Edge model or run directory.")], as_json: Json = False
) -> None:
    """Show what an edge model or run directory holds, and check its files."""
    from edgezo.inspection import inspect_path

    facts = inspect_path(path)
    if not as_json and "ended" in facts:
        facts["ended"] = (
            facts["ended"] or f"not recorded, it was cut off or failed; go on with: edgezo tune DIR -o {terminal.typed(path)} --resume"
        )
    terminal.print_facts(facts, as_json)


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where to put the edge model and the run.")] = Path("demo"),
    model: Annotated[
        str | None, typer.Option("--model", show_default=False, help="Another model to try. [default: SmolLM2-135M-Instruct]")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Fewer or more steps than the demo's own.")] = None,
    as_json: Json = False,
) -> None:
    """Export the default model, tune it to sort short personal notes, and show what it learned."""
    from edgezo.demo import run_demo

    if not run_demo(output, model, steps, as_json):
        raise typer.Exit(130)


app.command("probe")(baseline_commands.probe_command)
app.command("replay")(run_commands.replay_command)
app.command("merge")(run_commands.merge_command)
app.command("verify")(run_commands.verify_command)
app.command("diff")(run_commands.diff_command)
app.command("chat")(chat.chat_command)
app.command("rate")(rate.rate_command)


def main() -> None:
    """Entry point: expected failures in one line, exit code 1; EDGEZO_DEBUG=1 shows the traceback."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):  # a console of another encoding shows ? for what it lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="edgezo")
    except (EdgezoError, OSError) as error:
        if os.environ.get("EDGEZO_DEBUG"):
            raise
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        told = f"{where}{error.strerror or error}" if isinstance(error, OSError) else error
        sys.stderr.write(f"error: {told}\n")
        sys.exit(1)


def _open_closed_streams() -> None:
    """The null device in place of streams that the shell closed (`>&-`): else a file opened later has their number, and the engine writes to it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
