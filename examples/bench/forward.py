"""Bare forwards of several edge models of one source, interleaved in one process: what an export option or a change of the graph gives.

    python -m examples.bench.forward EDGE EDGE... [--sizes 8x64,16x32,1x32,4x256] [--rounds 11] [--json]

Medians of seconds, and of the ratio to the first; and the largest difference of log-probabilities from the first.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np

from edgezo.runtime.model import EdgeModel
from examples.bench.measure import seconds_of
from examples.bench.step import make_feeds


def measure(edges: list[Path], rows: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds, ratios to the first and differences from it, model by model."""
    models = [EdgeModel(edge) for edge in edges]
    feeds = [make_feeds(model, rows, tokens) for model in models]
    scores = [model.scoring.run(["log_probs"], given)[0] for model, given in zip(models, feeds, strict=True)]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for place, (model, given) in enumerate(zip(models, feeds, strict=True)):
            times[place].append(seconds_of(lambda model=model, given=given: model.scoring.run(["log_probs"], given)))  # type: ignore[misc]
    return {
        "seconds": [statistics.median(taken) for taken in times],
        "over_first": [statistics.median([one / first for one, first in zip(taken, times[0], strict=True)]) for taken in times],
        "difference": [float(np.abs(found - scores[0]).max()) for found in scores],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("edges", type=Path, nargs="+")
    parser.add_argument("--sizes", default="8x64,16x32,1x32,4x256")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = {}
    for size in given.sizes.split(","):
        rows, tokens = (int(part) for part in size.split("x"))
        found[size] = measure(given.edges, rows, tokens, given.rounds)
        if not given.json:
            for edge, *values in zip(given.edges, *found[size].values(), strict=True):
                print(f"{size:8} {edge!s:40} {values[0]:.4f} s, {values[1]:.3f} of the first, differs by {values[2]:.1e}", flush=True)
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
