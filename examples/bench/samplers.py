"""CPU time of one addition by every sampler, and of one update by averages, over that of signs for every element.

    python -m examples.bench.samplers

Twelve matrices of 1536 x 576, one thread, medians over rounds.
"""

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from edgezo.config import SCALARS, choices_of, make_config
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.rules import make_rule
from edgezo.runtime.samplers import Tunables, make_sampler
from edgezo.runtime.weights import MutableWeights

LAYERS, SHAPE, ROUNDS, EPS = 12, (1536, 576), 15, 1e-3


def make_weights(**settings: str) -> MutableWeights:
    """Fresh weights under a sampler."""
    random = np.random.default_rng(0)
    arrays: dict[str, Floats] = {f"w{layer}": (0.02 * random.standard_normal(SHAPE)).astype(np.float32) for layer in range(LAYERS)}
    tunables = Tunables(dict.fromkeys(arrays, SHAPE), {name: layer for layer, name in enumerate(arrays)}, arrays)
    sampler = make_sampler(make_config(None, {"data": "none", **settings}), tunables)
    return MutableWeights(arrays, eps=EPS, sampler=sampler, threads=1)


def seconds(action: Callable[[int], None]) -> float:
    """Median CPU time of a call."""
    times = []
    for number in range(ROUNDS):
        begun = time.process_time()
        action(number)
        times.append(time.process_time() - begun)
    return statistics.median(times)


def addition(weights: MutableWeights) -> float:
    """One perturbation."""

    def add(number: int) -> None:
        weights.add(Direction(0, number), weights.eps)
        weights.flush()

    return seconds(add)


def update(rule: str) -> float:
    """One update by a rule along one direction."""
    weights = make_weights()
    made = make_rule(make_config(None, {"data": "none", "rule": rule, "estimator": "curvature"}), weights.sizes)

    def step(number: int) -> None:
        zo_step(weights, [Direction(0, number)], [1.0] * SCALARS.get(rule, 1), 1e-6, made)
        weights.flush()

    return seconds(step)


def main() -> None:
    base = addition(make_weights())
    for setting, names in (("sampler", choices_of("sampler")), ("noise", choices_of("noise"))):
        for name in names:
            print(f"--{setting} {name}: {addition(make_weights(**{setting: name})) / base:.1f}", flush=True)
    for name in ("sgd", "momentum", "adam", "hizoo"):
        print(f"--rule {name}: {update(name) / base:.1f}", flush=True)


if __name__ == "__main__":
    main()
