"""Passes over the values of tunable tensors: what they do wherever the values lie, and with NumPy on all threads for those in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from edgezo.runtime.grid import Additions, GridTensor
from edgezo.runtime.noise import BLOCK, Floats
from edgezo.runtime.samplers.sampler import Sampler

RUN_BLOCKS = 16  # blocks one task of a thread works through: 4 MB of float32


class Passes(Protocol):
    """The values of some tensors and what is done to them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by its Hugging Face name."""

    def largest(self, tensor: GridTensor) -> float:
        """max |theta| of one tensor; NaN when it holds NaN."""

    def round_to_grid(self, tensor: GridTensor) -> None:
        """theta <- d * rint(theta / d)."""

    def add(self, tensors: Sequence[GridTensor], additions: Additions, sampler: Sampler) -> None:
        """theta += sum of times * q_d(scale * z), q_d(x) = d * floor(x / d + dither) (docs/noise.md)."""

    def decay(self, tensors: Sequence[GridTensor], rate: float, dither: float) -> None:
        """theta -= d * floor(rate * theta / d + dither) in the tensors that decay."""


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

    def add(self, tensors: Sequence[GridTensor], additions: Additions, sampler: Sampler) -> None:
        """As `Passes`; tensors that no direction moves are not touched."""
        moving = [tensor for tensor in tensors if any(sampler.moves(tensor.name, direction) for direction in additions)]
        adder = sampler.adder(moving, additions)
        self.each_share(moving, lambda tensor, first, last: adder(tensor, first, self.part(tensor, first, last)))

    def part(self, tensor: GridTensor, first: int, last: int) -> Floats:
        """The values of blocks first .. last - 1 of a tensor, to be changed in place."""
        return self.flat[tensor.name][first * BLOCK : last * BLOCK]

    def decay(self, tensors: Sequence[GridTensor], rate: float, dither: float) -> None:
        """As `Passes`."""

        def shrink(tensor: GridTensor, first: int, last: int) -> None:
            for part in _parts(self.part(tensor, first, last)):
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
