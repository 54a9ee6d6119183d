"""How fast a journal becomes weights: seconds for N full-parameter steps, and over the memory bandwidth limit.

    python -m examples.bench.replay EDGE [--steps 1000] [--groups 1,4,8,16,32] [--json]

The limit is one read and one write of all weights per pass, a pass applying as many steps as a group has. Groups are interleaved in one
process, medians of three.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.passes import NumPyPasses
from edgezo.runtime.replay import REPLAY_GROUP
from edgezo.runtime.weights import MutableWeights
from examples.bench.passes import add_constant

EPS, LR = 1e-3, 1e-5
ROUNDS, SAMPLE = 3, 64  # steps of one measurement


def measure(edge: Path, steps: int, groups: list[int]) -> dict[str, object]:
    """Seconds for `steps` steps by group, from samples of 64 steps; the limit; and the whole replay in the group that edgezo uses."""
    model = EdgeModel(edge)
    numpy_passes = NumPyPasses(model.weights, model.threads)
    weights = MutableWeights(numpy_passes, eps=EPS)
    scalars = np.random.default_rng(0).standard_normal(max(steps, SAMPLE))
    seconds: dict[int, list[float]] = {group: [] for group in groups}
    passes = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        add_constant(numpy_passes, weights)
        passes.append(time.perf_counter() - begun)
        for group in groups:
            seconds[group].append(_replay(weights, scalars[:SAMPLE], group) * steps / SAMPLE)
    whole = _replay(weights, scalars[:steps], REPLAY_GROUP)
    one_pass = statistics.median(passes)
    limit = one_pass * steps / REPLAY_GROUP
    return {
        "steps": steps,
        "group": REPLAY_GROUP,
        "seconds": round(whole, 2),
        "one_pass_seconds": round(one_pass, 4),
        "limit_seconds": round(limit, 2),
        "over_limit": round(whole / limit, 2),
        "seconds_by_group": {group: round(statistics.median(values), 2) for group, values in seconds.items()},
    }


def _replay(weights: MutableWeights, scalars: "np.ndarray[tuple[int], np.dtype[np.float64]]", group: int) -> float:
    begun = time.perf_counter()
    for step, projected_grad in enumerate(scalars.tolist()):
        zo_step(weights, [Direction(1, step)], [projected_grad], LR)
        if (step + 1) % group == 0:
            weights.flush()
    weights.flush()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("edge", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--groups", default="1,4,8,16,32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.edge, arguments.steps, [int(part) for part in arguments.groups.split(",")])
    print(json.dumps(found) if arguments.json else "\n".join(f"{name:18} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
