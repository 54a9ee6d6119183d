"""Baselines: what a model reaches without tuning its weights."""

from typing import Annotated

import typer

from edgezo import terminal
from edgezo.config import ROW_FORMATS
from edgezo.options import Device, EdgeDir, Json, LabelField, Labels, MaxLength, TaskName, Template, Threads, unescape


def probe_command(
    directory: EdgeDir,
    data: Annotated[str, typer.Option("--data", help=f"Training rows: {ROW_FORMATS}.")],
    test: Annotated[str, typer.Option("--test", help="Rows to evaluate on.")],
    valid: Annotated[
        str | None,
        typer.Option("--valid", show_default=False, help="Rows to choose C by. [default: cross-validation on the training rows]"),
    ] = None,
    task: TaskName = None,
    template: Template = None,
    labels: Labels = None,
    label_field: LabelField = None,
    max_length: MaxLength = None,
    rows: Annotated[
        int | None, typer.Option("--rows", metavar="K", min=1, show_default=False, help="Use the first K training rows. [default: all]")
    ] = None,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Fit a linear probe on the base: logistic regression on hidden states, one forward a row (needs edgezo[probe])."""
    from edgezo import api
    from edgezo.runtime.probe import STRENGTHS

    with terminal.stages() as progress:
        found = api.probe(
            directory,
            data,
            test,
            valid=valid,
            rows=rows,
            threads=threads,
            device=device,
            progress=progress,
            task=task,
            template=unescape(template),
            labels=labels,
            label_field=label_field,
            max_length=max_length,
        )
    if found.truncated:
        terminal.stderr().print(f"{found.truncated} of {found.forward_rows} rows were cut to fit")
    if as_json:
        evaluations = {"evaluation": found.evaluation.as_dict(), "chosen_on": found.chosen_on.as_dict()}
        terminal.print_json({**found._asdict(), **evaluations})
        return
    parts = [f"{found.train_rows} training", *([f"{found.valid_rows} validation"] if found.valid_rows else [])]
    where = "the validation rows" if found.valid_rows else "held-out training rows"
    terminal.print_rows(
        [
            ("probe", terminal.evaluation_text(found.evaluation)),
            ("C", f"{found.strength:g} of {STRENGTHS[0]:g} to {STRENGTHS[-1]:g}, by {where}: {terminal.evaluation_text(found.chosen_on)}"),
            ("rows", f"{', '.join(parts)} and {found.evaluation.rows} test rows, one forward each"),
            ("took", f"{found.seconds:.1f} s, of these forwards {found.forward_seconds:.1f} s"),
        ]
    )
