"""Seconds from the command to the first step of `edgezo tune`, liveness proof and smoothness check included: a new process every time.

Without an exact start, validation or measuring, which are forwards as many as were asked for.

python -m examples.bench.start EDGE --data FILE --template '{sentence} It was' --labels terrible,great
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgezo.runtime.run import METRICS

SETTINGS = ["--start", "none", "--valid-share", "0", "--eps", "1e-3", "--lr", "1e-5", "--steps", "1"]


def seconds_to_first_step(edge: Path, options: list[str]) -> float:
    """Run one step; its line in the metrics is the last one."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        begun = time.time()
        subprocess.run(
            [sys.executable, "-m", "edgezo", "tune", str(edge), *options, *SETTINGS, "-o", str(run)], check=True, capture_output=True
        )
        line = (run / METRICS).read_text(encoding="utf-8").splitlines()[-1]
        return (run / METRICS).stat().st_mtime - float(json.loads(line)["step_seconds"]) - begun


def main() -> None:
    """Print the median of several starts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("edge", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, options = parser.parse_known_args()
    found = [seconds_to_first_step(arguments.edge, options) for _ in range(arguments.rounds)]
    sys.stdout.write(f"{statistics.median(found):.1f} s, the median of {', '.join(f'{seconds:.1f}' for seconds in found)}\n")


if __name__ == "__main__":
    main()
