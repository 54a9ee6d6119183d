"""What a full-parameter step costs over two bare forwards of the same rows, and its memory over that of inference.

    python -m examples.bench.step EDGE [--rounds 9] [--device cuda] [--json]

Times are interleaved in one process, medians over rounds; peak memory is measured with each system in a process of its own;
on a device none is, since resident memory does not hold what lies there.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgezo.runtime.estimators.two_sided import two_sided
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.machine import peak_bytes
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.weights import MutableWeights

SIZES = ((8, 64), (16, 32))
EPS, LR = 1e-3, 1e-6


def make_feeds(model: EdgeModel, rows: int, tokens: int) -> dict[str, Array]:
    """Random rows without padding; one scored position a row, as in classification by label words."""
    vocabulary = model.manifest.origin.vocab_size
    feeds = {
        "input_ids": np.random.default_rng(0).integers(0, vocabulary, (rows, tokens)),
        "attention_mask": np.ones((rows, tokens), np.int64),
        "position_ids": np.tile(np.arange(tokens), (rows, 1)),
        "hidden_rows": np.arange(rows) * tokens + tokens - 1,
        "pair_rows": np.repeat(np.arange(rows), 2),
        "pair_targets": np.tile([10, 20], rows),
    }
    return {name: feeds[name].astype(np.int64) for name in model.manifest.scoring.inputs}


def make_step(model: EdgeModel, weights: MutableWeights, feeds: dict[str, Array]) -> Callable[[int], None]:
    """One whole step of ZO-SGD."""

    def loss() -> float:
        return -float(model.scoring.run(["log_probs"], feeds)[0].mean())

    def step(number: int) -> None:
        direction = Direction(0, number)
        estimate = two_sided(weights, loss, direction, weights.eps)
        zo_step(weights, [direction], [estimate.projected_grad], LR)

    return step


def measure_times(edge: Path, rounds: int, device: str = "cpu") -> list[dict[str, float]]:
    """Seconds of two forwards and of a step, medians, for every size; and of the liveness proof over a hundred steps."""
    model = EdgeModel(edge, device=device)
    weights = MutableWeights(model.on_device or model.weights, eps=EPS, threads=model.threads)
    proof = _seconds(lambda: prove_live(model, weights))
    results = []
    for rows, tokens in SIZES:
        feeds = make_feeds(model, rows, tokens)
        step = make_step(model, weights, feeds)
        forward, whole = [], []
        step(0)
        for number in range(1, rounds + 1):
            forward.append(_seconds(lambda feeds=feeds: [model.scoring.run(["log_probs"], feeds) for _ in range(2)]))
            whole.append(_seconds(lambda number=number, step=step: step(number)))
        two, one = statistics.median(forward), statistics.median(whole)
        results.append(
            {
                "rows": rows,
                "tokens": tokens,
                "two_forwards_seconds": two,
                "step_seconds": one,
                "ratio": one / two,
                "proof_over_100_steps": proof / (100 * one),
            }
        )
    return results


def measure_memory(edge: Path) -> dict[str, float]:
    """Peak resident bytes of inference and of tuning at the first size, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name in ("inference", "tune"):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_peak, args=(str(edge), name, send))
        process.start()
        send.close()  # else the parent would wait forever for a child that died
        peaks[name] = float(receive.recv())
        process.join()
    return {"inference_peak_bytes": peaks["inference"], "tune_peak_bytes": peaks["tune"], "ratio": peaks["tune"] / peaks["inference"]}


def _peak(edge: str, kind: str, send: "multiprocessing.connection.Connection") -> None:
    model = EdgeModel(edge)
    feeds = make_feeds(model, *SIZES[0])
    if kind == "tune":
        weights = MutableWeights(model.weights, eps=EPS, threads=model.threads)
        prove_live(model, weights)
        step = make_step(model, weights, feeds)
    for number in range(3):
        if kind == "tune":
            step(number)
        else:
            model.scoring.run(["log_probs"], feeds)
    send.send(peak_bytes())


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def read_arguments(about: str, device: bool = False) -> argparse.Namespace:
    """The edge model, how many rounds, whether to print JSON, and where it runs if that may be chosen."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("edge", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    if device:
        parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments(__doc__, device=True)
    times = measure_times(arguments.edge, arguments.rounds, arguments.device)
    memory = measure_memory(arguments.edge) if arguments.device == "cpu" else {}
    if arguments.json:
        print(json.dumps({"times": times, "memory": memory}))
        return
    for row in times:
        print("  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    if memory:
        print("  ".join(f"{name} {value / 1e6:.0f} MB" if "bytes" in name else f"{name} {value:.3f}" for name, value in memory.items()))


if __name__ == "__main__":
    main()
