"""Test accuracy against rows of forward, method by method: a table and a plot. Every cell is a process of its own.

    python -m examples.bench.convergence RESULTS.jsonl --lora EDGE --full EDGE --source MODEL --data DATA --tasks sst2,trec
    python -m examples.bench.convergence RESULTS.jsonl --lora EDGE            # the demo's own notes
    python -m examples.bench.convergence RESULTS.jsonl --lora EDGE --full EDGE --data DATA --tasks sst2 --group variants      # estimators, samplers and rules
    python -m examples.bench.convergence docs/convergence.jsonl --plot docs/convergence.png      # the measured cells again as table and plot

Methods without their model (--full, --source) are left out. The data folder has TASK/train.jsonl, TASK/validation.jsonl and TASK/test.jsonl. Settings are those of the methods (examples/bench/methods.py), and
of a grid of rates each is a method of its own. A cell whose line is in RESULTS.jsonl is not run again, so that the bench can be stopped and go on. Rows of forward are those that learning takes,
calibration and exact start with it, one for each forward of a row; backpropagation counts three for each row, since a backward pass costs about two forwards. Evaluations are not counted. Seconds are those of the last point: of backpropagation without validation, of the linear probe with its test rows.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import edgezo
from edgezo.config import make_config
from edgezo.recipe import recipe_names, task_settings
from edgezo.runtime.calibration import forward_rows
from edgezo.runtime.corpus import read_data
from edgezo.runtime.dataset import task_of, tokenize_data
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.masked import ModelFacts
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.reports import TuneResult
from edgezo.runtime.run import METRICS, read_run
from edgezo.runtime.scoring import Sequences
from examples.bench.methods import GROUPS, METHODS

OWN = Path(__file__).parent
NOTES: dict[str, Any] = {
    "template": "Note: {text}\nTopic:",
    "labels": ",".join(f"{w}={w}" for w in ("family", "health", "money", "travel", "work")),
}
SEED_ROWS = 1.1  # a start's rows differ a little from seed to seed
LEAST_RANGE = 20  # per cent that a panel shows: a row of test rows is no cliff


# task, method, seed, test_rows, valid_rows (at most), points: test accuracy by rows of forward, seconds of the run; of steps also
# best, last: accuracy at the best and the last step, last_loss, rows: of forward
Cell = dict[str, Any]


class Files(NamedTuple):
    """Of one task: training, validation and test rows, and how they are read."""

    train: Path
    valid: Path
    test: Path
    settings: dict[str, Any]


def files_of(options: argparse.Namespace, task: str) -> Files:
    """The demo's notes, or a task of the data folder."""
    folder = Path(edgezo.__file__).parent / "demo_data" if task == "notes" else options.data / task
    names = (folder / f"{name}.jsonl" for name in ("train", "validation", "test"))
    own = OWN / f"{task}.yaml"
    settings = NOTES if task == "notes" else task_settings(task if task in recipe_names() else own)
    return Files(*names, settings)


def budgets(most: int, factor: int) -> list[int]:
    """Rows of forward at which the test rows are measured: 128, so many times that, and so on, and the last of all."""
    return [*(rows for rows in (128 * factor**power for power in range(20)) if rows < most), most]


def run_cell(options: argparse.Namespace, task: str, name: str, seed: int, folder: Path) -> Cell:
    """Learn, and measure the test rows at every number of rows of forward; accuracy by rows, and seconds of the run."""
    method, files = METHODS[name], files_of(options, task)
    files = files._replace(test=_first(files.test, options.test_rows, folder / "rows"))
    edge, run = getattr(options, method.edge), folder / "run"
    if method.edge == "source":
        from examples.bench.backpropagation import learn

        return learn(edge, options.lora, files, budgets(options.rows, 4), seed)
    points: dict[int, float] = {}
    if method.each_budget:
        available, seconds = len(read_data(str(files.train))), 0.0
        for rows in budgets(min(options.rows, available), 4):
            forwards, accuracy, seconds = _learn_once(options, edge, name, files, rows, folder / f"{rows}", seed)
            points[forwards] = accuracy
        return {"points": points, "seconds": seconds}
    given = {"data": str(files.train), **method.settings}
    config = make_config(None, given, "lora" if method.edge == "lora" else None, files.settings)
    steps = max(1, int(options.rows / forward_rows(config)))
    result = _tune_whole(
        edge, run, data=str(files.train), valid=str(files.valid), seed=seed, steps=steps, eval_every=max(1, steps // 4),
        eval_rows=options.valid_rows,
        **files.settings, **method.settings,
    )  # fmt: skip
    rows_at = rows_by_step(run)
    places = {rows: max((step for step, spent in rows_at.items() if spent <= rows), default=None) for rows in budgets(options.rows, 4)}
    chosen = {rows: step for rows, step in places.items() if step is not None}
    measured = measure(edge, run, files, {*chosen.values(), result.best_step, result.steps})
    last = measured[result.steps]
    points = {**{rows: accuracy_of(measured[step]) for rows, step in chosen.items()}, max(rows_at.values()): accuracy_of(last)}
    return {
        "points": points,
        "best": accuracy_of(measured[result.best_step]),
        "last": accuracy_of(last),
        "last_loss": last.loss,
        "rows": max(rows_at.values()),
        "seconds": result.seconds,
    }


def _learn_once(
    options: argparse.Namespace, edge: Path, name: str, files: Files, rows: int, folder: Path, seed: int
) -> tuple[int, float, float]:
    """Rows of forward, test accuracy, and seconds."""
    begun = time.monotonic()
    if name == "linear probe":
        found = edgezo.probe(edge, files.train, files.test, rows=rows, **files.settings)
        return rows, accuracy_of(found.evaluation), time.monotonic() - begun
    result = _tune_whole(
        edge, folder, data=str(files.train), valid=str(files.valid), seed=seed, start_rows=rows,
        eval_rows=options.valid_rows, **files.settings, **METHODS[name].settings,
    )  # fmt: skip
    return result.forward_rows, accuracy_of(measure(edge, folder, files, {0})[0]), result.seconds


def _tune_whole(edge: Path, run: Path, **settings: Any) -> TuneResult:
    """A run that a signal ended is no measurement."""
    result = edgezo.tune(edge, run, **settings)
    if result.ended == "interrupted":
        raise SystemExit(f"{run}: interrupted after {result.steps} steps; call again to measure this cell")
    return result


def _first(path: Path, rows: int, folder: Path) -> Path:
    """A file of the first rows of another."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, encoding="utf-8") as file:
        (folder / path.name).write_text("".join(itertools.islice(file, rows)), encoding="utf-8")
    return folder / path.name


def rows_by_step(folder: Path) -> dict[int, int]:
    """Rows of forward that a run had spent at every step."""
    lines = map(json.loads, (folder / METRICS).read_text(encoding="utf-8").splitlines())
    # the line of a process's opening has rows and no step
    return {line["step"]: line["forward_rows"] for line in lines if {"step", "forward_rows"} <= line.keys()}


def accuracy_of(evaluation: Evaluation) -> float:
    """As a number."""
    return float(evaluation.accuracy or 0.0)


def measure(edge: Path, run: Path, files: Files, steps: Iterable[int]) -> dict[int, Evaluation]:
    """What steps of a run make of the test rows."""
    model, config = EdgeModel(edge), read_run(run).config
    rows = read_data(str(files.test))
    task = task_of(rows, config, ModelFacts.of(model.manifest))
    examples = tokenize_data(model, config, task, str(files.test), rows).examples
    objective, found = Objective(Sequences(model), task, config), {}
    for step in sorted(set(steps)):
        model.use(run=run, step=step)
        found[step] = objective.evaluate(examples)
    return found


def table(cells: list[Cell]) -> str:
    """A row for every task and method, mean over seeds."""
    lines = ["| task | method | seeds | test accuracy, % (rows of forward) | test loss at the end | seconds |", "|---|---|---|---|---|---|"]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        for name in METHODS:
            own = [cell for cell in cells if (cell["task"], cell["method"]) == (task, name)]
            if own:
                points = ", ".join(f"{found:.1f} ({rows:,})" for rows, found in _means(own))
                losses = [cell["last_loss"] for cell in own if "last_loss" in cell]
                loss = f"{sum(losses) / len(losses):.3f}" if len(losses) == len(own) else ""  # of steps alone, and not in the first cells
                lines.append(f"| {task} | {name} | {len(own)} | {points} | {loss} | {sum(c['seconds'] for c in own) / len(own):,.0f} |")
    return "\n".join(lines) + "\n"


def _means(cells: list[Cell]) -> list[tuple[int, float]]:
    """Rows of forward and test accuracy in per cent; where there are several seeds, the mean of what they have at rows within SEED_ROWS of each other."""
    groups: list[list[int]] = []
    for rows in sorted({rows for cell in cells for rows in cell["points"]}):
        if len(cells) > 1 and groups and rows <= SEED_ROWS * groups[-1][0]:
            groups[-1].append(rows)
        else:
            groups.append([rows])
    found = [[cell["points"][max(own)] for cell in cells if (own := set(group) & set(cell["points"]))] for group in groups]
    return [(group[-1], 100 * sum(points) / len(points)) for group, points in zip(groups, found, strict=True)]


def plot(cells: list[Cell], path: Path) -> None:
    """A panel a task, a line a method with a faint one a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    names = [name for name in METHODS if any(cell["method"] == name for cell in cells)]
    colors = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    columns_wide = min(len(tasks), 2)
    lines_high = -(-len(tasks) // columns_wide)
    figure, grid = pyplot.subplots(lines_high, columns_wide, figsize=(6 * columns_wide, 4.5 * lines_high), squeeze=False)
    panels = grid.flat[: len(tasks)]
    for panel in grid.flat[len(tasks) :]:
        panel.set_axis_off()
    for panel, task in zip(panels, tasks, strict=True):
        for number, name in enumerate(names):
            own = [cell for cell in cells if (cell["task"], cell["method"]) == (task, name)]
            color, line = colors[number % len(colors)], "o-" if number < len(colors) else "o--"
            for cell in own if len(own) > 1 else []:
                panel.plot(*zip(*((rows, 100 * found) for rows, found in cell["points"].items()), strict=True), color=color, alpha=0.25)
            if own:
                panel.plot(*zip(*_means(own), strict=True), line, color=color, label=name, markersize=3)
        panel.set(title=task, xscale="log", xlabel="rows of forward", ylabel="test accuracy, %")
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, high - LEAST_RANGE), high + 1)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda rows, place: f"{rows:,.0f}"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_xticks(budgets(max((rows for cell in cells for rows in cell["points"]), default=128) + 1, 2)[:-1])
    figure.legend(*_unique(panels), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _unique(panels: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Lines and names of all panels, each name once."""
    found = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def read_cells(results: Path) -> list[Cell]:
    """The cells of a file, one a line; none where there is no file."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    cells = [json.loads(line) for line in lines]
    return [{**cell, "points": {int(rows): found for rows, found in cell["points"].items()}} for cell in cells]


def main() -> None:
    """Run what is missing, each cell as a process of its own; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a line of JSON for every cell")
    parser.add_argument("--lora", type=Path, help="export with --adapter lora")
    parser.add_argument("--full", type=Path, help="export without an adapter")
    parser.add_argument("--source", type=Path, help="what they were exported from, for backpropagation")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", default="notes")
    parser.add_argument(
        "--group", choices=list(GROUPS), default="ways", help="whole ways to learn, or edgezo's estimators, samplers and rules"
    )
    parser.add_argument("--methods", help="names separated by semicolons; all of the group when left out")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", type=int, default=4096, help="of forward, at most")
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--valid-rows", type=int, default=256, help="at most; fewer take less time, and may choose another step or start")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        task, name, seed = options.cell
        with tempfile.TemporaryDirectory() as folder:
            found = run_cell(options, task, name, int(seed), Path(folder))
        with options.results.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps(
                    {
                        "task": task,
                        "method": name,
                        "seed": int(seed),
                        "test_rows": options.test_rows,
                        "valid_rows": options.valid_rows,
                        **found,
                    }
                )
                + "\n"
            )
        return
    if options.results.is_dir():
        parser.error(f"{options.results} is a folder; give a file")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    names = options.methods.split(";") if options.methods else list(GROUPS[options.group])
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--methods {';'.join(unknown)}: not known, there are {'; '.join(METHODS)}")
    done = {(cell["task"], cell["method"], cell["seed"]) for cell in read_cells(options.results)}
    for task in options.tasks.split(","):
        for name in names:
            edges = {METHODS[name].edge} | (
                {"lora"} if METHODS[name].edge == "source" else set()
            )  # backpropagation reads rows as an export does
            able = all(getattr(options, edge) is not None for edge in edges)
            able = able and (METHODS[name].choices or "choices" not in files_of(options, task).settings)
            for seed in options.seeds.split(",") if able else []:
                if (task, name, int(seed)) not in done:
                    subprocess.run(
                        [sys.executable, "-m", "examples.bench.convergence", *sys.argv[1:], "--cell", task, name, seed], check=True
                    )
    cells = read_cells(options.results)
    sys.stdout.write(table(cells))
    if options.plot is not None:
        plot(cells, options.plot)


if __name__ == "__main__":
    main()
