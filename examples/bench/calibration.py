"""What `edgezo tune` chooses by itself, against other learning rates at the same rows, and against settings that make no sense.

    python -m examples.bench.calibration RESULTS EDGE --data DATA --tasks sst2,trec --steps 80
    python -m examples.bench.calibration RESULTS EDGE --data DATA --tasks sst2 --steps 60 --start none --grid 0.001,0.004,0.016,0.064 0.001,0.004,0.016
    python -m examples.bench.calibration RESULTS EDGE --data DATA --tasks sst2 --steps 30 --eval-rows 64 --start none --overrides

The data folder has TASK/train.jsonl and TASK/validation.jsonl. Every run is a command of its own; one that is in RESULTS, which is for one set of options, is not run again, and one that was stopped goes on. `--before 'nice -n 5'`
stands before every command.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgezo.storage import is_run

FACTORS = "0.25,4"
BEGUN = time.monotonic()
OWN_RECIPES = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("edge")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="sst2,trec,sms_spam")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--eval-rows", type=int, default=256)
    parser.add_argument("--start", help="of every run, as edgezo tune takes it")
    parser.add_argument("--factors", default=FACTORS, help="of the measured rate: what it is compared with")
    parser.add_argument("--grid", nargs=2, metavar=("LRS", "EPSS"), help="rates and eps, every one with every one, in place of factors")
    parser.add_argument("--overrides", action="store_true", help="compare with settings that make no sense, instead")
    parser.add_argument("--seed", type=int, help="of every run")
    parser.add_argument("--before", default="")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which no run is begun")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    print(
        "| task | settings | lr | eps | at the start | at the end | best step | taken back | ended |\n|---|---|---|---|---|---|---|---|---|"
    )
    for task in options.tasks.split(","):
        chosen = run(options, task, "chosen", [])
        if options.overrides:
            settings = overrides(chosen["config"])
        elif options.grid:
            settings = grid(*([float(number) for number in numbers.split(",")] for numbers in options.grid))
        else:
            settings = rates(chosen["config"], map(float, options.factors.split(",")))
        for name, given in settings.items():
            run(options, task, name, given)


def rates(config: dict[str, Any], factors: Iterable[float]) -> dict[str, list[str]]:
    """Others than the measured rate, at the measured eps."""
    return {f"lr x {factor:g}": ["--lr", str(config["lr"] * factor), "--eps", str(config["eps"])] for factor in factors}


def grid(lrs: Iterable[float], scales: Sequence[float]) -> dict[str, list[str]]:
    """What is tried where nothing is measured: every rate at every eps."""
    return {f"lr {lr:g}, eps {eps:g}": ["--lr", str(lr), "--eps", str(eps)] for lr in lrs for eps in scales}


def overrides(config: dict[str, Any]) -> dict[str, list[str]]:
    """One setting each that makes no sense, or that a curious person would try."""
    lr, eps = config["lr"], config["eps"]
    return {
        "lr x 1000": ["--lr", str(lr * 1000)],
        "one direction of one row": ["--directions", "1", "--batch", "1"],
        "eps x 1000": ["--eps", str(eps * 1000)],
        "sgd with the normalized lr": ["--rule", "sgd", "--lr", str(lr)],
        "lr x 30": ["--lr", str(lr * 30)],
        "A and B": ["--tune-a"],
        "constant schedule with the cosine's lr": ["--schedule", "constant", "--lr", str(lr)],
        "rank 1": ["--rank", "1"],
        "lr / 1000": ["--lr", str(lr / 1000)],
        "eps / 1000": ["--eps", str(eps / 1000)],
        "seed 1": ["--seed", "1"],
        "seed 2": ["--seed", "2"],
    }


def run(options: argparse.Namespace, task: str, name: str, settings: list[str]) -> dict[str, Any]:
    """Tune once, or take what an earlier call found; prints a row of the table."""
    kept = options.results / f"{task}.{name.replace(' ', '_').replace('/', 'by')}.json"
    if not kept.is_file() and time.monotonic() - BEGUN > options.stop_after:
        raise SystemExit(f"not begun: {task}, {name}")
    if not kept.is_file():
        kept.write_text(json.dumps(tune(options, task, settings, kept.with_suffix(".run"))), encoding="utf-8")
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    config = found["config"]
    first, last = (shown(found["evaluations"][place]) if found["evaluations"] else "" for place in (0, -1))
    numbers = f"{config['lr']:.3g} | {config['eps']:.3g} | {first} | {last}"
    print(f"| {task} | {name} | {numbers} | {found['best_step']} | {found['undone']} | {found['ended']} |", flush=True)
    return found


def tune(options: argparse.Namespace, task: str, settings: list[str], output: Path) -> dict[str, Any]:
    """One `edgezo tune`, and what its run directory and its last lines say."""
    folder, recipe = options.data / task, OWN_RECIPES / f"{task}.yaml"
    files = ["--data", str(folder / "train.jsonl"), "--valid", str(folder / "validation.jsonl")]
    how = ["--task", str(recipe) if recipe.is_file() else task, "--steps", str(options.steps), "--eval-rows", str(options.eval_rows)]
    how += ["--start", options.start] if options.start else []
    how += ["--seed", str(options.seed)] if options.seed is not None else []
    goes_on = is_run(output)
    given = ["--resume"] if goes_on else [*files, *how, *settings]
    command = [*shlex.split(options.before), sys.executable, "-m", "edgezo", "tune", options.edge, "-o", str(output), *given]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if not (output / "config.json").is_file():
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    if done.returncode in (130, -15):
        raise SystemExit("stopped; call again to go on")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8")) if (output / "summary.json").is_file() else {}
    return {
        "config": json.loads((output / "config.json").read_text(encoding="utf-8")),
        "evaluations": [line["valid"] for line in lines if "valid" in line],
        "undone": sum("undone_to" in line for line in lines),
        "best_step": summary.get("best_step"),
        "ended": summary.get("ended") or done.stderr.strip().splitlines()[-1],
        "told": done.stderr,
        "seconds": summary.get("seconds"),
    }


def shown(evaluation: dict[str, float]) -> str:
    """Accuracy and loss."""
    return f"{100 * evaluation['accuracy']:.1f} %, {evaluation['loss']:.3f}"


if __name__ == "__main__":
    main()
