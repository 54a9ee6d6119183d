"""What a person sees: progress on standard error, results on standard output."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from edgezo.runtime.class_metrics import ClassCounts
    from edgezo.runtime.evaluation import Evaluation
    from edgezo.runtime.predict import Prediction
    from edgezo.runtime.tune import Reporter, StepReport

BAR_WIDTH = 12  # at most, so that stages fit into 80 columns
LINES_PER_RUN = 20  # progress lines of a run whose output is a file or pipe


def stderr() -> Console:
    """A console on today's standard error (tests replace it)."""
    return Console(file=sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def stdout() -> Console:
    """A console on today's standard output."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)


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


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns, aligned, one line each; the last is never padded or cut."""
    rows = [tuple(cell.replace("\n", "\\n") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for *cells, last in rows:
        sys.stdout.write("".join(f"{cell.ljust(width)}  " for cell, width in zip(cells, widths, strict=True)) + last + "\n")


def print_classes(classes: Mapping[str, "ClassCounts"]) -> None:
    """Counts and figures of every class, a line each; - where there is no figure."""
    lines: list[tuple[str, ...]] = [("class", "rows", "predicted", "precision", "recall", "F1")]
    for label, found in classes.items():
        shares = [f"{100 * share:.1f} %" if share is not None else "-" for share in (found.precision, found.recall)]
        lines.append((label, str(found.rows), str(found.predicted), *shares, f"{found.f1:.3f}" if found.f1 is not None else "-"))
    print_table(lines)


def typed(path: str | os.PathLike[str]) -> str:
    """A path as it is typed in a command."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Facts as a JSON object, or one line a fact."""
    if as_json:
        print_json(facts)
    else:
        print_rows([(name.replace("_", " "), _fact_text(value, _mark(name))) for name, value in facts.items()])


def _mark(name: str) -> str:
    """What stands between the names and values of a fact: --labels and --replace are shown as they are given."""
    return "=" if name in {"labels", "replace"} else " "


def _fact_text(value: Any, mark: str = " ") -> str:
    if isinstance(value, dict):
        return (
            ", ".join(f"{name}{' ' if isinstance(part, dict) else mark}{_fact_text(part, mark)}" for name, part in value.items()) or "none"
        )
    if isinstance(value, list):
        return ", ".join(_fact_text(part) for part in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def changed_text(name: str, first: Any, second: Any) -> str:
    """Two values of the setting of this name."""
    shown = [_fact_text(value, _mark(name)) for value in (first, second)]
    return " -> ".join(shown if shown[0] != shown[1] else map(repr, (first, second)))  # 1.0000001 and 1


def evaluation_text(evaluation: "Evaluation") -> str:
    """An evaluation in a few words."""
    parts = [f"loss {evaluation.loss:.4f}"]
    if evaluation.macro_f1 is not None:
        parts = [f"macro F1 {evaluation.macro_f1:.3f}", *parts]
    if evaluation.accuracy is not None:
        parts = [f"accuracy {100 * evaluation.accuracy:.1f} %", *parts]
    parts = [*(f"{name.replace('_', ' ')} {value:.3f}" for name, value in evaluation.others.items()), *parts]
    if evaluation.perplexity is not None:
        parts.append(f"perplexity {evaluation.perplexity:.2f}")
    return f"{', '.join(parts)} ({evaluation.rows} row{'s' if evaluation.rows != 1 else ''})"


def prediction_text(prediction: "Prediction", alone: bool) -> str:
    """Labels or choices, the likeliest first, or the answer: in one line unless it is `alone`."""
    if not prediction.probabilities:
        answer = (prediction.text or "").strip()
        return answer if alone else " ".join(answer.split())
    ranked = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])
    return "  ".join(f"{label} {100 * probability:.1f} %" for label, probability in ranked)


def labels_note(
    directory: str | os.PathLike[str], run: str | os.PathLike[str] | None, step: int | str, reading: Mapping[str, Any] | None
) -> str | None:
    """For whoever has text written by what learned labels, by how it reads rows: what to use instead; None where it learned text."""
    if reading is None or "labels" not in reading or reading.get("objective") == "likelihood":
        return None
    of, known = ("model", "") if run is None else ("run", f" --run {typed(run)}")
    chosen = "" if run is None or step == "best" else f" --step {step}"
    use = f"edgezo predict {typed(directory)}{known}{chosen} --text '...'"
    return f"note: this {of} learned to choose among labels, not to write text; for a label: {use}"


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Show one stage after another; yields the function to call at the start of each."""
    console = stderr()
    if not console.is_terminal:
        yield lambda text: console.print(f"  {text}")
        return
    columns = (SpinnerColumn(), _column("description"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting")

        def show(text: str) -> None:
            progress.print(f"  {text}")
            progress.update(task, description=text)

        yield show


@contextmanager
def tuning() -> Iterator["Reporter"]:
    """Progress of a run: a live bar on a terminal, some lines elsewhere."""
    from edgezo.runtime.tune import Reporter

    console = stderr()
    live = console.is_terminal
    bar = BarColumn(bar_width=BAR_WIDTH)
    columns = (_column("description"), bar, _column("fields[count]"), _column("fields[note]"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not live) as progress:
        task = progress.add_task("starting", total=1.0, count="", note="")
        say = (progress.console if live else console).print
        total: int | None = None
        shown = 0.0
        loss, pace, seen = 0.0, 0.0, 0  # of all steps at first, of some twenty later
        first_step, first_seconds, last_step = 0, 0.0, 0  # before the steps that are shown: a start takes time and makes none

        def begin(step: int, total_steps: int | None) -> None:
            nonlocal total
            total = total_steps

        def stage(text: str) -> None:
            progress.update(task, description=text)
            if not live and text != "evaluating":
                say(f"  {text}")

        def step(report: "StepReport") -> None:
            nonlocal shown, loss, pace, seen, first_step, first_seconds, last_step
            if not seen or report.step <= last_step:  # begun, or gone back
                first_step, first_seconds = report.step - 1, report.seconds - report.step_seconds
                shown, seen = -1.0 if seen else 0.0, 0  # a step after going back is shown
            last_step = report.step
            seen += 1
            share = max(1 / seen, 0.05)
            loss += (report.loss - loss) * share
            pace += (report.step_seconds - pace) * share
            left = (report.seconds - report.opening_seconds) / report.progress * (1 - report.progress) if 0 < report.progress < 1 else 0.0
            if total is not None:
                left = min(left, (report.seconds - first_seconds) / (report.step - first_step) * (total - report.step))
            note = f"training loss {loss:.4f}  {pace:.2f} s/step  {_clock(left)} left"
            count = f"{report.step}/{total}" if total else f"step {report.step}"
            progress.update(task, description="tuning", completed=report.progress, count=count, note=note)
            if not live and (report.progress - shown >= 1 / LINES_PER_RUN or report.progress >= 1):
                shown = report.progress
                say(f"  step {report.step}  {note}")

        def evaluation(number: int, found: "Evaluation", best: bool) -> None:
            say(f"  step {number}: {evaluation_text(found)}{'  best so far' if best and number else ''}")

        yield Reporter(stage=stage, notice=lambda text: say(f"  {text}"), begin=begin, step=step, evaluation=evaluation)
        progress.update(task, description="ended", note="")


def _column(name: str) -> TextColumn:
    """Text of a task as it is: a path may hold what markup would read as a style."""
    return TextColumn(f"{{task.{name}}}", markup=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
