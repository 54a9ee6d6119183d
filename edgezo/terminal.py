"""What a person sees: progress on standard error, results on standard output."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from edgezo.runtime.objective import Evaluation
    from edgezo.runtime.tune import Reporter, StepReport

LINES_PER_RUN = 20  # progress lines of a run whose output is a file or pipe


def stderr() -> Console:
    """A console on today's standard error (tests replace it)."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def stdout() -> Console:
    """A console on today's standard output."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object, alone on standard output."""
    ascii_only = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=ascii_only, allow_nan=False) + "\n")


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Names and values, aligned, one line each; values are never cut."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        shown = value.replace("\n", "\\n")
        sys.stdout.write(f"{name.ljust(width)}  {shown}\n")


def evaluation_text(evaluation: "Evaluation") -> str:
    """An evaluation in a few words."""
    parts = [f"loss {evaluation.loss:.4f}"]
    if evaluation.accuracy is not None and evaluation.macro_f1 is not None:
        parts = [f"accuracy {100 * evaluation.accuracy:.1f} %", f"macro F1 {evaluation.macro_f1:.3f}", *parts]
    if evaluation.perplexity is not None:
        parts.append(f"perplexity {evaluation.perplexity:.2f}")
    return f"{', '.join(parts)} ({evaluation.rows} rows)"


@contextmanager
def stages(quiet: bool = False) -> Iterator[Any]:
    """Show one stage after another; yields the function to call at the start of each."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield (lambda text: None) if quiet else lambda text: console.print(f"  {text}")
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("starting")

        def show(text: str) -> None:
            progress.print(f"  {text}")
            progress.update(task, description=text)

        yield show


@contextmanager
def tuning(total_steps: int | None) -> Iterator["Reporter"]:
    """Progress of a run: a live bar on a terminal, some lines elsewhere."""
    from edgezo.runtime.tune import Reporter

    console = stderr()
    live = console.is_terminal
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if total_steps else TextColumn("{task.percentage:.0f} %"),
    ]
    with Progress(
        *columns,
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not live,
    ) as progress:
        task = progress.add_task("starting", total=total_steps or 1.0, note="")
        shown = 0.0
        smooth: float | None = None

        def stage(text: str) -> None:
            progress.update(task, description=text)
            if not live and text != "evaluating":
                console.print(f"  {text}")

        def step(report: "StepReport") -> None:
            nonlocal shown, smooth
            smooth = report.estimate.loss if smooth is None else 0.95 * smooth + 0.05 * report.estimate.loss
            note = f"loss {smooth:.4f}  {report.step_seconds:.2f} s/step"
            progress.update(task, description="tuning", completed=report.step if total_steps else report.progress, note=note)
            if not live and (report.progress - shown >= 1 / LINES_PER_RUN or report.progress >= 1):
                shown = report.progress
                left = report.seconds / report.progress * (1 - report.progress) if report.progress < 1 else 0.0
                console.print(f"  step {report.step}  {note}  {_clock(left)} left")

        def evaluation(number: int, found: "Evaluation", best: bool) -> None:
            (progress.console if live else console).print(
                f"  step {number}: {evaluation_text(found)}{'  best so far' if best and number else ''}"
            )

        yield Reporter(stage=stage, step=step, evaluation=evaluation)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
