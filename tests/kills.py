"""Kill a tuning process at random moments until a run is done, and compare its weights with a run that was never killed.

    python tests/kills.py --kills 100 [--edge DIR --data FILE --template '{sentence} It was' --labels terrible,great] [--steps 40]

Without --edge a tiny Llama is made. Every process gets SIGKILL after a random time; a run ends when one of its processes comes to its
end; then the next run begins. Prints one JSON object.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgezo.runtime.model import EdgeModel


class Outcome(NamedTuple):
    """Processes killed, those killed before their run had a step, runs that came to their end, and how many of these had other weights."""

    kills: int
    kills_without_a_step: int
    runs: int
    different: int
    start_seconds: float


def weights_sha256(edge: Path, run: Path) -> str:
    """SHA-256 over the tuned weights of the last step."""
    model = EdgeModel(edge, run=run, step="last")
    return hashlib.sha256(b"".join(array.tobytes() for array in model.weights.values())).hexdigest()


def tune(edge: Path, run: Path, options: Sequence[str], seconds: float | None = None) -> bool:
    """Start or continue the run; kill it after `seconds`. Returns whether it came to its end."""
    journal = run / "journal.bin"
    again = ["--resume"] if journal.is_file() else options
    command = [sys.executable, "-m", "edgezo", "tune", str(edge), "-o", str(run), *again]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {told}")
    return True


def kill_runs(edge: Path, options: Sequence[str], kills: int, folder: Path, seed: int = 0) -> Outcome:
    """Kill `kills` processes; `options` of `edgezo tune` decide the run. `folder` is for the runs."""
    moments = random.Random(seed)
    begun = time.monotonic()
    tune(edge, folder / "whole", options)
    whole_seconds = time.monotonic() - begun
    begun = time.monotonic()
    tune(edge, folder / "whole", options)  # a finished run that goes on: start, proof, replay of all steps
    start_seconds = time.monotonic() - begun
    expected = weights_sha256(edge, folder / "whole")
    killed = without = runs = different = 0
    while killed < kills:
        run = folder / f"run{runs}"
        # some while it starts, most while it steps
        while killed < kills and not tune(
            edge, run, options, moments.uniform(0.3 * start_seconds, start_seconds + 0.4 * (whole_seconds - start_seconds))
        ):
            killed += 1
            without += not (run / "journal.bin").is_file()
        tune(edge, run, options)
        runs += 1
        different += weights_sha256(edge, run) != expected
        shutil.rmtree(run)
    return Outcome(killed, without, runs, different, round(start_seconds, 2))


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--edge", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--template", default="{text} It was")
    parser.add_argument("--labels", default="terrible,great")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgezo-kills-") as name:
        folder = Path(name)
        edge, data = arguments.edge or tiny_edge(folder), arguments.data or tiny_data(folder)
        options = ["--data", data, "--valid", data, "--template", arguments.template, "--labels", arguments.labels]
        options += ["--steps", arguments.steps, "--eval-every", arguments.eval_every, "--eval-rows", 32, "--lr", "1e-4"]
        outcome = kill_runs(edge, [str(option) for option in options], arguments.kills, folder, arguments.seed)
    print(json.dumps(outcome._asdict()))
    sys.exit(1 if outcome.different else 0)


def tiny_edge(folder: Path) -> Path:
    """A tiny Llama as an edge model."""
    import tiny

    from edgezo.export import export_model

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return export_model(str(tiny.save(folder / "source")), folder / "edge").directory


def tiny_data(folder: Path) -> Path:
    """Sixteen rows of two labels."""
    path = folder / "rows.jsonl"
    rows = [{"text": f"a {word} film {number}", "label": label} for number in range(8) for label, word in enumerate(("bad", "good"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
