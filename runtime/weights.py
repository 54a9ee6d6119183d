"""Tunable weights, changed in place, exactly.

Every tensor k lies on a power-of-two grid d_k = 2**(e_k - 24), where 2**e_k bounds its values. Multiples of d_k below 2**e_k are float32
numbers and their sums are exact, so a perturbation taken back leaves no trace, the order of additions does not matter, and the
weights after a step are a function of the scalars that made it.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edgezo.errors import ConfigError, EdgezoError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.noise import BLOCK, Direction, Distribution, Floats

RUN_BLOCKS = 16  # blocks one task of a thread works through: 4 MB of float32
SIGNIFICAND_BITS = 24


@dataclass
class _Tensor:
    name: str
    id: int
    flat: Floats
    decays: bool  # matrices decay, biases and norms do not
    exponent: int = 0
    bound: float = 0.0  # max |theta| is at most this

    @property
    def quantum(self) -> float:
        """d_k, the step of the grid."""
        return 2.0 ** (self.exponent - SIGNIFICAND_BITS)


def default_threads() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class MutableWeights:
    """The tunable tensors of a model as theta, with exact in-place addition of scaled noise.

    Args:
        tensors: float32 C-contiguous arrays by Hugging Face name; they are changed in place, at once by rounding to the grid.
        eps: largest perturbation the run will ask for; room is left for it below 2**e_k.
        distribution: of z.
        threads: threads for the passes over the weights.

    Raises:
        ConfigError: eps is smaller than the grid of some tensor, so that the perturbation would vanish.
    """

    def __init__(
        self, tensors: Mapping[str, Floats], *, eps: float, distribution: Distribution = "rademacher", threads: int | None = None
    ) -> None:
        self.distribution = distribution
        self.threads = threads or default_threads()
        self._asked_eps = eps
        self.reach = 4 * eps * noise.largest(distribution)
        self.tensors = [_Tensor(name, noise.tensor_id(name), array.reshape(-1), array.ndim > 1) for name, array in tensors.items()]
        for tensor in self.tensors:
            if not np.shares_memory(tensor.flat, tensors[tensor.name]):
                raise ValueError(f"{tensor.name}: not C-contiguous, cannot be changed in place")
            self._fit(tensor, "export the model again")
        self._pending: dict[Direction, dict[float, int]] = {}
        self._shares = self._share_out()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self.eps = 0.0
        self._choose_eps(ConfigError, "use a larger --eps or leave the tensor out at export")

    def add(self, direction: Direction, scale: float, times: int = 1) -> None:
        """theta += times * q_d(scale * z), deferred to the next `flush`; q_d rounds to the grid (docs/noise.md).

        Equal and opposite additions cancel exactly, so a restore and an update share one pass over the weights.
        """
        scales = self._pending.setdefault(direction, {})
        scales[scale] = scales.get(scale, 0) + times
        if not scales[scale]:
            del scales[scale]
        if not scales:
            del self._pending[direction]

    def flush(self) -> None:
        """Apply what was added, in one pass over the weights on all threads."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        levels = {tensor.exponent: tensor.quantum for tensor in self.tensors}
        tables = {
            exponent: [(direction, self._table(direction, scales, quantum)) for direction, scales in pending.items()]
            for exponent, quantum in levels.items()
        }
        self._parallel(lambda tensor, first, last: _add_windows(tensor, first, last, tables[tensor.exponent]))

    def update(self, directions: Sequence[Direction], scales: Sequence[float], decay: float = 0.0) -> None:
        """End a step: theta += sum of q_d(scale * z), then decay, then coarsen the grid of a tensor whose values may outgrow it.

        The result depends on theta and the step's scalars alone, never on how the step was computed: a replay does the same.

        Args:
            directions: name every z.
            scales: of every z: -lr * projected_grad, or what the update rule makes of it.
            decay: lr * weight_decay, in [0, 1).

        Raises:
            NonFiniteLossError: a weight became NaN or infinite, or outgrew the resolution that eps needs.
        """
        moved = math.fsum(map(abs, scales)) * noise.largest(self.distribution)
        for tensor in self.tensors:
            tensor.bound += moved + len(scales) * tensor.quantum
        outgrown = any(self._outgrown(tensor) for tensor in self.tensors)
        if outgrown:  # sums with the restore would leave the range that is exact: the restore first, alone, as in a replay
            self.flush()
        for direction, scale in zip(directions, scales, strict=True):
            if scale:
                self.add(direction, scale)
        if decay:
            self.flush()
            self._decay(directions[0], decay)
        if outgrown:
            self.flush()
            self._coarsen()

    def _outgrown(self, tensor: _Tensor) -> bool:
        return tensor.bound + self.reach > 2.0**tensor.exponent

    def _coarsen(self) -> None:
        for tensor in self.tensors:
            if self._outgrown(tensor):
                tensor.bound = _largest(tensor.flat)
                if not tensor.bound + self.reach <= 2.0**tensor.exponent:
                    self._fit(tensor, "use a smaller --lr")
        self._choose_eps(NonFiniteLossError, "the weights grew too large; use a smaller --lr or a larger --eps")

    def _choose_eps(self, error: type[EdgezoError], advice: str) -> None:
        """The multiple of the coarsest grid, and so of every grid, next to the eps that was asked for."""
        coarse = max(self.tensors, key=lambda tensor: tensor.exponent)
        self.eps = round(self._asked_eps / coarse.quantum) * coarse.quantum
        if not self.eps:
            raise error(f"eps {self._asked_eps:g} is below the float32 resolution {coarse.quantum:g} of {coarse.name}; {advice}")

    def _fit(self, tensor: _Tensor, advice: str) -> None:
        """Choose the grid with a quarter of headroom and round the values to it."""
        tensor.bound = _largest(tensor.flat)
        if not math.isfinite(tensor.bound):
            raise NonFiniteLossError(f"{tensor.name}: holds NaN or infinity; {advice}")
        tensor.exponent = math.ceil(math.log2(1.25 * tensor.bound + self.reach))
        inverse, quantum = np.float32(1 / tensor.quantum), np.float32(tensor.quantum)
        for part in _parts(tensor.flat):
            part *= inverse
            np.rint(part, out=part)
            part *= quantum

    def _decay(self, direction: Direction, rate: float) -> None:
        """theta -= d * floor(rate * theta / d + u): decoupled weight decay rounded without bias, u one number a step."""
        if not 0 <= rate < 1:
            raise ConfigError(f"lr * weight_decay is {rate:g}; it must lie in [0, 1)")
        dither = np.float32(noise.uniform(direction.seed, noise.DECAY, direction.step))

        def shrink(tensor: _Tensor, first: int, last: int) -> None:
            if tensor.decays:
                for part in _parts(tensor.flat[first * BLOCK : last * BLOCK]):
                    change = part * np.float32(rate / tensor.quantum)
                    change += dither
                    np.floor(change, out=change)
                    change *= np.float32(tensor.quantum)
                    part -= change

        self._parallel(shrink)

    def _table(self, direction: Direction, scales: Mapping[float, int], quantum: float) -> Floats:
        """Sum of times * q_d(scale * table) over the additions of one direction, float32 like the shared table."""
        shared = noise.table(self.distribution)
        dither = noise.uniform(direction.seed, noise.DITHER, direction.step, direction.number)
        if self.distribution == "rademacher":  # two values: round them, not the table
            plus = sum(times * math.floor(scale / quantum + dither) for scale, times in scales.items()) * quantum
            minus = sum(times * math.floor(-scale / quantum + dither) for scale, times in scales.items()) * quantum
            with np.errstate(over="ignore"):  # infinity is found when the grid is fitted
                signs: Floats = np.where(shared > 0, np.float32(plus), np.float32(minus))
            return signs
        total = np.zeros(len(shared))
        for scale, times in scales.items():
            total += times * np.floor(scale / quantum * shared.astype(np.float64) + dither)
        with np.errstate(over="ignore"):
            values: Floats = (total * quantum).astype(np.float32)
        return values

    def _parallel(self, work: Callable[[_Tensor, int, int], None]) -> None:
        """Run `work(tensor, first block, last block)` over all blocks on all threads."""
        if self._pool is None:
            for part in self._shares:
                _each(work, part)
        else:
            for _ in self._pool.map(lambda part: _each(work, part), self._shares):
                pass

    def _share_out(self) -> list[list[tuple[_Tensor, int, int]]]:
        """Shares of about RUN_BLOCKS blocks; small tensors join in one. Tensors of one grid follow each other: their table stays in cache."""
        shares: list[list[tuple[_Tensor, int, int]]] = [[]]
        held = 0
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.exponent):
            blocks = -(-tensor.flat.size // BLOCK)
            for first in range(0, blocks, RUN_BLOCKS):
                last = min(first + RUN_BLOCKS, blocks)
                shares[-1].append((tensor, first, last))
                held += last - first
                if held >= RUN_BLOCKS:
                    shares.append([])
                    held = 0
        return [share for share in shares if share]


def _each(work: Callable[[_Tensor, int, int], None], share: list[tuple[_Tensor, int, int]]) -> None:
    for tensor, first, last in share:
        work(tensor, first, last)


def _add_windows(tensor: _Tensor, first: int, last: int, tables: list[tuple[Direction, Floats]]) -> None:
    """Add every direction's windows to blocks first .. last - 1 of one tensor, block by block while the block lies in cache."""
    drawn = [(values, *noise.block_draws(direction, tensor.id, first, last - first)) for direction, values in tables]
    for index in range(last - first):
        block = tensor.flat[(first + index) * BLOCK : (first + index + 1) * BLOCK]
        for values, offsets, negated in drawn:
            window = values[offsets[index] : offsets[index] + block.size]
            if negated[index]:
                np.subtract(block, window, out=block)
            else:
                np.add(block, window, out=block)


def _parts(flat: Floats) -> Iterator[Floats]:
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


def _largest(flat: Floats) -> float:
    with np.errstate(invalid="ignore"):  # NaN stays NaN, without a warning
        return float(np.max([(part.max(), -part.min()) for part in _parts(flat)]))
