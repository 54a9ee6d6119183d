"""Measuring several systems fairly: each in a process of its own, all alive, stepping in turns."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from edgezo.runtime.machine import peak_bytes

Step = Callable[[int], object]


class Build(NamedTuple):
    """How a process makes its step: `make(*arguments)`, both importable."""

    make: Callable[..., Step]
    arguments: tuple[Any, ...]


class Measured(NamedTuple):
    """Median seconds of a step, and the most memory its process had, from its start on."""

    seconds: float
    peak_bytes: int


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time of a call."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def in_turns(builds: Mapping[str, Build], rounds: int) -> dict[str, Measured]:
    """Every round, one system at a time, each makes two steps, of which the second counts: the first finds caches full of others' data."""
    with _workers(builds) as workers:
        times: dict[str, list[float]] = {name: [] for name in builds}
        for number in range(rounds):
            for name, worker in workers.items():
                for step in (2 * number, 2 * number + 1):
                    worker.send(step)
                    taken = worker.recv()
                times[name].append(taken)
        peaks = {}
        for name, worker in workers.items():
            worker.send(None)
            peaks[name] = worker.recv()
    return {name: Measured(statistics.median(times[name]), peaks[name]) for name in builds}


@contextmanager
def _workers(builds: Mapping[str, Build]) -> Iterator[dict[str, Connection]]:
    """A process for each system; made one after the other, since making takes all cores."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    try:
        for name, build in builds.items():
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(build, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()  # else a child that died would be waited for
            pipes[name] = mine
            mine.recv()
        yield pipes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(build: Build, pipe: Connection) -> None:
    step = build.make(*build.arguments)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        pipe.send(seconds_of(lambda number=number: step(number)))  # type: ignore[misc]
    pipe.send(peak_bytes())
