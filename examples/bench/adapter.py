"""Stacked LoRA directions on frozen bases: a step over inference of the same rows, with the adapter and without, in time and memory; smoothness of the base.

    python -m examples.bench.adapter EDGE... [--data FILE --template T --labels L] [--plain EDGE] [--whole] [--rounds 7] [--device cuda] [--json]

EDGE are edge models with LoRA branch points (fp32, int8, int4 of one source); --plain is the same model without branch points (as
`--adapter norms` makes it, frozen weights packed), whose inference is the yardstick of memory and, where the weights are the same, of
the branch points nobody uses. 16 directions of one row of --data, without it of 32 random tokens, both signs: 32 rows. Times are
interleaved in one process, medians over rounds; peak memory is that of a process of its own, of these rows and of 8 x 64 random tokens.
--whole feeds whole copies of B instead of sign vectors. On a device no memory is measured: resident memory does not hold what lies there.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from edgezo.config import TuneConfig, make_config
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.examples import Example
from edgezo.runtime.lora import Lora
from edgezo.runtime.machine import peak_bytes
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.objective import Objective
from edgezo.runtime.scoring import BATCH_TOKENS, Sequences
from edgezo.runtime.tasks import Task
from edgezo.runtime.theta import Theta, mutable_weights, step_directions

DIRECTIONS, TOKENS, LR = 16, 32, 1e-3
GRADIENT_DIRECTIONS = 64
# by environment, since the measured processes are spawned
WHOLE, TASK, DEVICE = "EDGEZO_BENCH_WHOLE_COPIES", "EDGEZO_BENCH_TASK", "EDGEZO_BENCH_DEVICE"
Size = tuple[int, int] | None


def real_rows(model: EdgeModel, rows: int) -> list[Example]:
    """The rows of the first step of a run on --data, or random ones."""
    task = os.environ.get(TASK)
    if task is None:
        return make_rows(model, rows, TOKENS)
    dataset = read_dataset(model, make_config(None, {**json.loads(task), "directions": rows, "batch": 1}))
    return dataset.batch(dataset.order(), 0)


def make_rows(model: EdgeModel, rows: int, tokens: int) -> list[Example]:
    """Random rows of one length with two candidates of one token each."""
    ids = np.random.default_rng(0).integers(0, model.manifest.origin.vocab_size, (rows, tokens)).tolist()
    return [Example(pairs=[(row, [10]), (row, [20])], gold=index % 2) for index, row in enumerate(ids)]


def open_model(edge: Path, threads: int | None = None) -> EdgeModel:
    """The edge model where --device says."""
    return EdgeModel(edge, threads=threads, device=os.environ.get(DEVICE, "cpu"))


def make_theta(edge: Path, directions: int, batch: int, threads: int | None = None, batch_tokens: int = BATCH_TOKENS) -> Theta:
    """A freshly opened model with an untuned adapter."""
    if os.environ.get(WHOLE):
        Lora.stacked_feeds = lambda self, *given: {**self.feeds(), **self.whole_copies(*given)}  # type: ignore[method-assign]
    model = open_model(edge, threads)
    settings = {"data": "-", "directions": directions, "batch": batch, "lr": LR, "eps": 1e-2, "rule": "normalized"}
    config: TuneConfig = make_config(None, settings)
    objective = Objective(Sequences(model, batch_tokens), Task("classification"), config)
    return Theta(model, config, mutable_weights(model, config), objective)


def stacked_step(theta: Theta, rows: list[Example], number: int) -> None:
    """One whole step: all directions, both signs, and the update."""
    directions = step_directions(theta.config, number)
    estimates = theta.estimates(directions, [[row] for row in rows])
    theta.step(directions, [estimate.projected_grad for estimate in estimates], LR)


def plain(sequences: Sequences, rows: list[Example]) -> None:
    """Inference of the same number of rows: every row twice."""
    pairs = [pair for example in rows for pair in example.pairs]
    feeds = [(prompt, completion) for prompt, completion in pairs]
    doubled = [([*prompt[:-1], (prompt[-1] + 1) % 1000], completion) for prompt, completion in pairs]  # no row may be shared
    sequences.log_probs([*feeds, *doubled])


def measure_times(edge: Path, plain_edge: Path | None, rounds: int) -> dict[str, float]:
    """Median seconds, and their ratios: a stacked step, inference of the same rows with its adapter and without, 16 sequential two-sided steps of two rows.

    With the same base without branch points, also of inference there.
    """
    tuned, base = make_theta(edge, DIRECTIONS, 1), make_theta(edge, 1, 1)
    base.model.adapter = None
    rows = real_rows(tuned.model, DIRECTIONS)
    single = make_theta(edge, 1, 1)

    def sequential(number: int) -> None:
        for offset, row in enumerate(rows):
            stacked_step(single, [row], number * DIRECTIONS + offset)

    actions: dict[str, Callable[[int], None]] = {
        "step": lambda number: stacked_step(tuned, rows, number),
        "adapted_inference": lambda number: plain(tuned.objective.sequences, rows),
        "inference": lambda number: plain(base.sequences, rows),
        "sequential": sequential,
    }
    if plain_edge is not None and (other := open_model(plain_edge)).manifest.weights == base.model.manifest.weights:
        sequences = Sequences(other)
        actions["plain_inference"] = lambda number: plain(sequences, rows)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            begun = time.perf_counter()
            action(number)
            if number:
                seconds[name].append(time.perf_counter() - begun)
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    pairs = [("step", "adapted_inference"), ("step", "inference"), ("sequential", "step"), ("inference", "plain_inference")]
    ratios = {
        f"{one}_over_{two}": statistics.median([a / b for a, b in zip(seconds[one], seconds[two], strict=True)])
        for one, two in pairs
        if two in seconds
    }
    return {**medians, **ratios}


def projected_grads(edge: Path) -> np.ndarray:
    """Projected gradients of 64 directions, one row each, at the untuned adapter; the same rows and directions for every base."""
    theta = make_theta(edge, GRADIENT_DIRECTIONS, 1)
    rows = real_rows(theta.model, GRADIENT_DIRECTIONS)
    directions = [Direction(0, 0, number) for number in range(GRADIENT_DIRECTIONS)]
    return np.array([estimate.projected_grad for estimate in theta.estimates(directions, [[row] for row in rows])])


def _peak(edge: str, kind: str, size: Size, send: Connection) -> None:
    """Peak resident bytes of three steps, or of inference of the same number of rows."""
    count = DIRECTIONS if size is None else size[0] // 2
    theta = make_theta(Path(edge), count, 1) if kind == "step" else None
    model = theta.model if theta is not None else open_model(Path(edge))
    rows = real_rows(model, count) if size is None else make_rows(model, count, size[1])
    for number in range(3):
        if theta is not None:
            stacked_step(theta, rows, number)
        else:
            plain(Sequences(model), rows)
    send.send(peak_bytes())


def peak_of(edge: Path, kind: str, size: Size = None) -> int:
    """Peak resident bytes of a fresh process; size is rows (both signs counted) and random tokens, None the rows of the times."""
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_peak, args=(str(edge), kind, size, send))
    process.start()
    send.close()  # else the parent would wait forever for a child that died
    found = int(receive.recv())
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("edges", type=Path, nargs="+")
    for name in ("--data", "--template", "--labels"):
        parser.add_argument(name)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ[DEVICE] = arguments.device
    here = arguments.device == "cpu"
    if arguments.whole:
        os.environ[WHOLE] = "1"
    if arguments.data:
        os.environ[TASK] = json.dumps({name: getattr(arguments, name) for name in ("data", "template", "labels")})
    yardstick = peak_of(arguments.plain, "inference", (8, 64)) if arguments.plain and here else None
    first: np.ndarray | None = None
    results = []
    for edge in arguments.edges:
        grads = projected_grads(edge)
        first = grads if first is None else first
        result: dict[str, float | str] = {"edge": str(edge), **measure_times(edge, arguments.plain, arguments.rounds)}
        result["gradient_correlation_with_first"] = float(np.corrcoef(first, grads)[0, 1])
        result["gradient_rms"] = float(np.sqrt(np.mean(grads**2)))
        if here:
            step, inference = peak_of(edge, "step"), peak_of(edge, "inference")
            result |= {"step_peak_mb": step / 1e6, "inference_peak_mb": inference / 1e6, "memory_over_inference": step / inference}
        if yardstick is not None:
            small = peak_of(edge, "step", (8, 64))
            result |= {"step_8x64_peak_mb": small / 1e6, "plain_8x64_peak_mb": yardstick / 1e6, "memory_over_plain": small / yardstick}
        results.append(result)
        if not arguments.json:
            print(
                "  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in result.items()),
                flush=True,
            )
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
