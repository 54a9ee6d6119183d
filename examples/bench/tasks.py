"""One table over tasks and methods: zero-shot, in-context, linear probe, and tuned for some minutes each; every cell a command of its own.

    python -m examples.bench.tasks RESULTS --data DATA --lora EDGE --full EDGE --prefix EDGE --tasks sst2,trec --minutes 10
    python -m examples.bench.tasks RESULTS --data DATA --classifier 'minilm-{task}' --classifier-full 'minilm-full-{task}' --tasks sst2,trec

A cell that is in RESULTS already is not run again, so that the bench can be stopped and go on. The data folder has TASK/train.jsonl,
TASK/validation.jsonl and TASK/test.jsonl, with the fields of the task's recipe. A classifier is exported with the classes of one task, {task}
in its path stands for that; --classifier has LoRA, --classifier-full all weights tunable. Options that are not of this command are those of `edgezo tune`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.recipe import read_recipe, recipe_path, summarize
from edgezo.runtime.run import read_run
from edgezo.storage import is_run

TUNED = ("full", "lora", "prefix", "classifier", "classifier-full")
# of each method the attribute of the options that gives its edge model
METHODS = {
    "zero-shot": "lora",
    "in-context": "lora",
    "probe": "lora",
    **{name: name for name in TUNED[:3]},
    "classifier-probe": "classifier",
    "classifier": "classifier",
    "classifier-full": "classifier_full",
}
SHOTS = 8
# what classifiers read of a row
TEXTS = {
    "sst2": "{sentence}",
    "trec": "{question}",
    "rte": "{premise} {hypothesis}",
    "agnews": "{text}",
    "sms_spam": "{text}",
}


class Cell(NamedTuple):
    """What one method gave on one task: test metrics, rows of forward spent on learning, seconds, and the most memory of its processes."""

    metrics: dict[str, float]
    learning_rows: int
    seconds: float
    peak_bytes: int


def run_cell(method: str, task: str, options: argparse.Namespace) -> Cell:
    """Learn on the training rows and measure on the test rows."""
    folder = options.data / task
    test = str(_first_rows(folder / "test.jsonl", options.results / f"{task}.test.jsonl", options.test_rows))
    recipe = ["--template", TEXTS[task]] if METHODS[method].startswith("classifier") else ["--task", _recipe(task)]
    edge = str(getattr(options, METHODS[method])).format(task=task)
    begun = time.monotonic()
    if method in TUNED:
        run = options.results / f"{task}.{method}.run"
        files = ["--data", str(folder / "train.jsonl"), "--valid", str(folder / "validation.jsonl")]
        goes_on = is_run(run)
        before = read_run(run).seconds if goes_on else 0.0
        settings = ["--resume"] if goes_on else [*files, *recipe, *options.settings]
        tuned, tune_peak = _edgezo("tune", edge, "-o", str(run), "--minutes", str(options.minutes), *settings)
        found, peak = _edgezo("eval", edge, "--data", test, "--run", str(run))
        return Cell(found, tuned["forward_rows"], before + time.monotonic() - begun, max(peak, tune_peak))
    train, valid = str(folder / "train.jsonl"), str(folder / "validation.jsonl")
    if method.endswith("probe"):
        found, peak = _edgezo("probe", edge, "--data", train, "--valid", valid, "--test", test, *recipe)
        return Cell(found["evaluation"], found["train_rows"] + found["valid_rows"], time.monotonic() - begun, peak)
    shots = ["--shots", str(SHOTS), "--train", train] if method == "in-context" else []
    found, peak = _edgezo("eval", edge, "--data", test, *recipe, *shots)
    return Cell(found, 0, time.monotonic() - begun, peak)


def _first_rows(path: Path, copy: Path, rows: int) -> Path:
    """A file with the first rows of another, so that every method is measured on the same."""
    with open(path, encoding="utf-8") as file:
        copy.write_text("".join(itertools.islice(file, rows)), encoding="utf-8")
    return copy


def _recipe(task: str) -> str:
    """A recipe of the package, or a file beside this one."""
    own = Path(__file__).with_name(f"{task}.yaml")
    return str(own) if own.is_file() else task


def _edgezo(*arguments: str) -> tuple[dict[str, Any], int]:
    """The JSON that a command prints, and the peak memory of its process in bytes."""
    with subprocess.Popen([sys.executable, "-m", "edgezo", *arguments, "--json"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"edgezo {' '.join(arguments)} ended with {process.returncode}")
    found = {name: value for name, value in json.loads(printed).items() if name != "classes"}
    return found, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(results: Path) -> str:
    """The table of all cells, in Markdown."""
    lines = ["| task | method | test | learning rows | minutes | peak MB |", "|---|---|---|---|---|---|"]
    cells = {path.stem: Cell(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(results.glob("*.json"))}
    for name, cell in sorted(cells.items(), key=lambda item: (item[0].split(".")[0], list(METHODS).index(item[0].split(".")[1]))):
        task, method = name.split(".")
        kept = {key: value for key, value in cell.metrics.items() if key in {"accuracy", "f1", "exact_match", "rouge_l", "macro_f1"}}
        shown = ", ".join(f"{key.replace('_', ' ')} {100 * value:.1f} %" for key, value in kept.items())
        lines.append(f"| {task} | {method} | {shown} | {cell.learning_rows:,} | {cell.seconds / 60:.1f} | {cell.peak_bytes / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="sst2,trec,rte,agnews,sms_spam,copa,squad,e2e_nlg")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--test-rows", type=int, default=300)
    for name in TUNED:
        parser.add_argument(f"--{name}", help=f"edge model for the method {name}; without it the method is left out")
    arguments, settings = parser.parse_known_args()
    arguments.settings = settings
    arguments.results.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks.split(","):
        classes = summarize(read_recipe(recipe_path(_recipe(task)))).kind == "classification"
        for method, kind in METHODS.items():
            path = arguments.results / f"{task}.{method}.json"
            if path.exists() or getattr(arguments, kind) is None or (not classes and method == "probe"):
                continue
            if kind.startswith("classifier") and task not in TEXTS:
                continue
            cell = run_cell(method, task, arguments)
            path.write_text(json.dumps(cell._asdict()), encoding="utf-8")
            sys.stderr.write(f"{task} {method}: {cell.metrics}\n")
    sys.stdout.write(show(arguments.results))


if __name__ == "__main__":
    main()
