"""Passes over the values of tunable tensors: what they do wherever the values lie, and with NumPy on all threads for those in memory."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgezo.runtime import noise
from edgezo.runtime.noise import BLOCK, Direction, Distribution, Floats

RUN_BLOCKS = 16  # blocks one task of a thread works through: 4 MB of float32
SIGNIFICAND_BITS = 24
Additions = Mapping[Direction, Mapping[float, int]]  # scales of every direction, and how many times each


@dataclass
class GridTensor:
    """A tensor whose values lie on the grid d = 2**(exponent - 24)."""

    name: str
    id: int
    size: int
    decays: bool  # matrices decay, biases and norms do not
    exponent: int = 0
    bound: float = 0.0  # max |theta| is at most this

    @property
    def quantum(self) -> float:
        """d, the step of the grid."""
        return 2.0 ** (self.exponent - SIGNIFICAND_BITS)


class Passes(Protocol):
    """The values of some tensors and what is done to them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by its Hugging Face name."""

    def largest(self, tensor: GridTensor) -> float:
        """max |theta| of one tensor; NaN when it holds NaN."""

    def round_to_grid(self, tensor: GridTensor) -> None:
        """theta <- d * rint(theta / d)."""

    def add(self, tensors: Sequence[GridTensor], additions: Additions, distribution: Distribution) -> None:
        """theta += sum of times * q_d(scale * z), q_d(x) = d * floor(x / d + dither) (docs/noise.md)."""

    def decay(self, tensors: Sequence[GridTensor], rate: float, dither: float) -> None:
        """theta -= d * floor(rate * theta / d + dither) in the tensors that decay."""


def direction_dither(direction: Direction) -> float:
    """The one number that all additions along a direction are rounded with."""
    return noise.uniform(direction.seed, noise.DITHER, direction.step, direction.number)


def sign_values(direction: Direction, scales: Mapping[float, int], quantum: float) -> tuple[float, float]:
    """What is added where z is +1 and where it is -1: sums of times * q_d(+-scale)."""
    dither = direction_dither(direction)
    plus = sum(times * math.floor(scale / quantum + dither) for scale, times in scales.items()) * quantum
    minus = sum(times * math.floor(-scale / quantum + dither) for scale, times in scales.items()) * quantum
    return plus, minus


class NumPyPasses:
    """Arrays in memory, changed in place.

    Args:
        arrays: float32 C-contiguous by Hugging Face name.
        threads: of every pass.
    """

    def __init__(self, arrays: Mapping[str, Floats], threads: int) -> None:
        self.shapes: Mapping[str, tuple[int, ...]] = {name: array.shape for name, array in arrays.items()}
        self.flat: dict[str, Floats] = {name: array.reshape(-1) for name, array in arrays.items()}
        for name, flat in self.flat.items():
            if not np.shares_memory(flat, arrays[name]):
                raise ValueError(f"{name}: not C-contiguous, cannot be changed in place")
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def largest(self, tensor: GridTensor) -> float:
        """As `Passes`."""
        with np.errstate(invalid="ignore"):  # NaN stays NaN, without a warning
            return float(np.max([(part.max(), -part.min()) for part in _parts(self.flat[tensor.name])]))

    def round_to_grid(self, tensor: GridTensor) -> None:
        """As `Passes`."""
        inverse, quantum = np.float32(1 / tensor.quantum), np.float32(tensor.quantum)
        for part in _parts(self.flat[tensor.name]):
            part *= inverse
            np.rint(part, out=part)
            part *= quantum

    def add(self, tensors: Sequence[GridTensor], additions: Additions, distribution: Distribution) -> None:
        """As `Passes`: every direction's windows are added to a block while it lies in cache."""
        tables = {
            exponent: [(direction, noise_values(distribution, direction, scales, quantum)) for direction, scales in additions.items()]
            for exponent, quantum in {tensor.exponent: tensor.quantum for tensor in tensors}.items()
        }
        self.each_share(tensors, lambda tensor, first, last: self._add_windows(tensor, first, last, tables[tensor.exponent]))

    def decay(self, tensors: Sequence[GridTensor], rate: float, dither: float) -> None:
        """As `Passes`."""

        def shrink(tensor: GridTensor, first: int, last: int) -> None:
            for part in _parts(self.flat[tensor.name][first * BLOCK : last * BLOCK]):
                change = part * np.float32(rate / tensor.quantum)
                change += np.float32(dither)
                np.floor(change, out=change)
                change *= np.float32(tensor.quantum)
                part -= change

        self.each_share([tensor for tensor in tensors if tensor.decays], shrink)

    def each_share(self, tensors: Sequence[GridTensor], work: Callable[[GridTensor, int, int], None]) -> None:
        """Run `work(tensor, first block, last block)` over all blocks on all threads."""
        shares = _share_out(tensors)
        if self._pool is None:
            for part in shares:
                _each(work, part)
        else:
            for _ in self._pool.map(lambda part: _each(work, part), shares):
                pass

    def _add_windows(self, tensor: GridTensor, first: int, last: int, tables: list[tuple[Direction, Floats]]) -> None:
        flat = self.flat[tensor.name]
        drawn = [(values, *noise.block_draws(direction, tensor.id, first, last - first)) for direction, values in tables]
        for index in range(last - first):
            block = flat[(first + index) * BLOCK : (first + index + 1) * BLOCK]
            for values, offsets, negated in drawn:
                window = values[offsets[index] : offsets[index] + block.size]
                if negated[index]:
                    np.subtract(block, window, out=block)
                else:
                    np.add(block, window, out=block)


def noise_values(distribution: Distribution, direction: Direction, scales: Mapping[float, int], quantum: float) -> Floats:
    """Sum of times * q_d(scale * table) over the additions of one direction, float32 like the shared table."""
    shared = noise.table(distribution)
    with np.errstate(over="ignore"):  # infinity is found when the grid is fitted
        if distribution == "rademacher":  # two values: round them, not the table
            plus, minus = sign_values(direction, scales, quantum)
            signs: Floats = np.where(shared > 0, np.float32(plus), np.float32(minus))
            return signs
        total = np.zeros(len(shared))
        for scale, times in scales.items():
            total += times * np.floor(scale / quantum * shared.astype(np.float64) + direction_dither(direction))
        values: Floats = (total * quantum).astype(np.float32)
        return values


def _share_out(tensors: Sequence[GridTensor]) -> list[list[tuple[GridTensor, int, int]]]:
    """Shares of about RUN_BLOCKS blocks; small tensors join in one. Tensors of one grid follow each other: their table stays in cache."""
    shares: list[list[tuple[GridTensor, int, int]]] = [[]]
    held = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.exponent):
        blocks = -(-tensor.size // BLOCK)
        for first in range(0, blocks, RUN_BLOCKS):
            last = min(first + RUN_BLOCKS, blocks)
            shares[-1].append((tensor, first, last))
            held += last - first
            if held >= RUN_BLOCKS:
                shares.append([])
                held = 0
    return [share for share in shares if share]


def _each(work: Callable[[GridTensor, int, int], None], share: list[tuple[GridTensor, int, int]]) -> None:
    for tensor, first, last in share:
        work(tensor, first, last)


def _parts(flat: Floats) -> Iterator[Floats]:
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]
