"""What every estimator, sampler and rule does in a few steps: one table, each cell a run of its own.

    python -m examples.bench.methods RESULTS --lora EDGE --full EDGE --data DATA/sst2 --task sst2

EDGE is an export with --adapter lora, and one without. A cell that is in RESULTS already is not run again, so that the bench can be
stopped and go on; --only runs some. Learning rates of the LoRA cells are those of `Rule.rate` for a move of 0.012 and projected gradients of about 7.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgezo.runtime.estimators import ESTIMATORS

STEPS, EVAL_ROWS = 20, 64
LORA = {"start": "none", "directions": 8, "batch": 1, "eps": 1e-2, "schedule": "cosine"}
FULL = {"start": "none", "directions": 1, "batch": 8, "eps": 1e-3, "lr": 2e-5, "schedule": "linear"}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"lora {rule}": ("lora", {**LORA, "rule": rule, "lr": lr})
        for rule, lr in {
            "normalized": 0.012, "sgd": 0.005, "sign": 0.034, "fzoo": 0.034, "meazo": 0.012, "momentum": 0.005, "adam": 0.012,
            "conservative": 0.005, "svrg": 0.005,
        }.items()
    },
    "lora one-sided": ("lora", {**LORA, "rule": "normalized", "lr": 0.012, "estimator": "one-sided", "batch": 2}),
    "lora one-sided fzoo": ("lora", {**LORA, "rule": "fzoo", "lr": 0.034, "estimator": "one-sided", "batch": 2}),
    "lora curvature": ("lora", {**LORA, "rule": "normalized", "lr": 0.012, "estimator": "curvature"}),
    "lora layers": ("lora", {**LORA, "rule": "normalized", "lr": 0.012, "sampler": "layers"}),
    **{f"full {name}": ("full", {**FULL, "sampler": name}) for name in ("full", "layers", "magnitude", "lozo", "subzero", "tezo")},
    **{f"full {name}": ("full", {**FULL, "noise": name}) for name in ("gaussian", "sphere")},
    "full momentum": ("full", {**FULL, "rule": "momentum"}),
    "full adam": ("full", {**FULL, "rule": "adam", "lr": 1e-4}),
}  # fmt: skip


def forward_rows(settings: dict[str, Any]) -> float:
    """Rows of forward that a step costs on average."""
    estimator, directions, batch = ESTIMATORS[settings.get("estimator", "two-sided")], settings["directions"], settings["batch"]
    rows = batch * estimator.forwards(directions)
    if settings.get("rule") == "conservative":
        return float(rows + 3 * directions * batch)
    return rows * (1 * 8 + 4 * 2) / 5 if settings.get("rule") == "svrg" else float(rows)  # its defaults: every 5 steps, of 8


def run_cell(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tune for a few steps; loss and accuracy on validation rows before and after."""
    kind, settings = CELLS[name]
    files = ["--data", str(options.data / "train.jsonl"), "--valid", str(options.data / "validation.jsonl"), "--task", options.task]
    run = options.results / f"{name.replace(' ', '-')}-{int(time.time())}"
    given = {**settings, "steps": options.steps, "eval_every": options.steps, "eval_rows": options.eval_rows}
    flags = [part for field, value in given.items() for part in (f"--{field.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "edgezo", "tune", str(getattr(options, kind)), "-o", str(run), *files, *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = (line["valid"] for line in found if "valid" in line)
    steps = [line["step_seconds"] for line in found if "step_seconds" in line]
    seconds, peak = sorted(steps)[len(steps) // 2], json.loads(done.stdout)["peak_bytes"]
    return {"before": before, "after": after, "rows_per_step": forward_rows(settings), "step_seconds": seconds, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--lora", type=Path, required=True)
    parser.add_argument("--full", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--eval-rows", type=int, default=EVAL_ROWS)
    parser.add_argument("--only", nargs="*", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    print("| cell | rows of forward a step | loss | accuracy |\n|---|---|---|---|")
    for name in options.only:
        path = options.results / f"{name.replace(' ', '-')}.json"
        if not path.is_file():
            path.write_text(json.dumps(run_cell(name, options)) + "\n", encoding="utf-8")
        cell = json.loads(path.read_text(encoding="utf-8"))
        before, after = cell["before"], cell["after"]
        change = [f"{before[key]:.3f} to {after[key]:.3f}" for key in ("loss", "accuracy")]
        print(f"| {name} | {cell['rows_per_step']:g} | {change[0]} | {change[1]} |", flush=True)


if __name__ == "__main__":
    main()
