"""What noise and the grid cost: passes over the weights against bare memory bandwidth, and what rounding to the grid changes.

    python -m examples.bench.passes EDGE [--rounds 9] [--json]

Passes are interleaved in one process, medians over rounds. The grid is measured on the exported weights and on the same weights with
random last bits, since a model from a quantised or bfloat16 file has short significands.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import BLOCK, Direction
from edgezo.runtime.passes import GridTensor, NumPyPasses
from edgezo.runtime.weights import MutableWeights
from examples.bench.step import make_feeds, read_arguments

EPS, UPDATE = 1e-3, 1e-5


def measure_passes(edge: Path, rounds: int) -> dict[str, float]:
    """Median seconds of one pass over all tunable weights, by kind."""
    model = EdgeModel(edge)
    passes = NumPyPasses(model.weights, model.threads)
    weights = MutableWeights(passes, eps=EPS)
    kinds: dict[str, Callable[[int], object]] = {
        "bandwidth": lambda number: add_constant(passes, weights),
        "perturb": lambda number: _add(weights, Direction(0, number)),
        "update_and_perturb": lambda number: _add(weights, Direction(0, number), Direction(0, number + 1)),
        "fresh_bits": lambda number: _add_fresh_bits(passes, weights, number),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, action in kinds.items():
            begun = time.perf_counter()
            action(2 * number)
            if number:  # the first round fills caches
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _add(weights: MutableWeights, *directions: Direction) -> None:
    for direction in directions:
        weights.add(direction, UPDATE)
    weights.flush()


def add_constant(passes: NumPyPasses, weights: MutableWeights) -> None:
    """A pass at memory bandwidth: one read and one write of every weight."""

    def add(tensor: GridTensor, first: int, last: int) -> None:
        part = passes.flat[tensor.name][first * BLOCK : last * BLOCK]
        part += np.float32(0)

    passes.each_share(weights.tensors, add)


def _add_fresh_bits(passes: NumPyPasses, weights: MutableWeights, number: int) -> None:
    """One Philox bit a weight, eight signs at a time from a table of bytes; the fastest found with NumPy."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    expansion = np.where(bits, np.float32(2**-16), np.float32(-(2**-16)))

    def add(tensor: GridTensor, first: int, last: int) -> None:
        for block in range(first, last):
            part = passes.flat[tensor.name][block * BLOCK : (block + 1) * BLOCK]
            raw = np.random.Philox(key=number, counter=[block, tensor.id, 0, 0]).random_raw(-(-part.size // 64))
            part += expansion.take(raw.view(np.uint8), axis=0).reshape(-1)[: part.size]

    passes.each_share(weights.tensors, add)


def measure_grid(edge: Path) -> list[dict[str, object]]:
    """Share of weights that rounding to the grid changes, and the largest change of a log-probability over 8 x 64 random tokens."""
    found: list[dict[str, object]] = []
    for kind in ("as exported", "random last bits"):
        model = EdgeModel(edge)
        feeds = make_feeds(model, 8, 64)
        feeds["hidden_rows"] = np.arange(8 * 64)
        feeds["pair_rows"] = np.arange(8 * 64)
        feeds["pair_targets"] = np.roll(feeds["input_ids"].reshape(-1), -1)
        random = np.random.default_rng(1)
        for array in model.weights.values() if kind != "as exported" else ():
            bits = array.reshape(-1).view(np.uint32)
            bits[...] = (bits & ~np.uint32(0xFFFF)) | random.integers(0, 1 << 16, bits.size, dtype=np.uint32)
        before = model.scoring.run(["log_probs"], feeds)[0]
        old = {name: array.copy() for name, array in model.weights.items()}
        MutableWeights(model.weights, eps=EPS, threads=model.threads)
        changed = sum(int((old[name] != array).sum()) for name, array in model.weights.items())
        after = model.scoring.run(["log_probs"], feeds)[0]
        share = changed / sum(array.size for array in old.values())
        found.append({"weights": kind, "changed_share": share, "largest_log_prob_change": float(np.abs(after - before).max())})
    return found


def main() -> None:
    arguments = read_arguments(__doc__)
    passes, grid = measure_passes(arguments.edge, arguments.rounds), measure_grid(arguments.edge)
    if arguments.json:
        print(json.dumps({"passes": passes, "grid": grid}))
        return
    for name, seconds in passes.items():
        print(f"{name:20} {seconds:.3f} s, {seconds / passes['bandwidth']:.2f} x bandwidth")
    for row in grid:
        print("  ".join(f"{name} {value:.2e}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
