"""Tunable weights, changed in place, exactly.

Every tensor k lies on a power-of-two grid d_k = 2**(e_k - 24), where 2**e_k bounds its values. Multiples of d_k below 2**e_k are float32
numbers and their sums are exact, so a perturbation taken back leaves no trace, the order of additions does not matter, and the
weights after a step are a function of the scalars that made it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from edgezo.errors import ConfigError, EdgezoError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.grid import GridTensor
from edgezo.runtime.machine import default_threads
from edgezo.runtime.noise import BLOCK, Direction, Floats
from edgezo.runtime.passes import NumPyPasses, Passes
from edgezo.runtime.rules.rule import Change
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.samplers.sampler import Sampler


class MutableWeights:
    """The tunable tensors of a model as theta, with exact in-place addition of scaled noise.

    Args:
        tensors: float32 C-contiguous arrays by Hugging Face name, or the passes over values that lie elsewhere; they are changed in
            place, at once by rounding to the grid.
        eps: largest perturbation the run will ask for; room is left for it below 2**e_k.
        sampler: of z; signs of independent elements when None.
        threads: threads for the passes over arrays.

    Raises:
        ConfigError: eps is smaller than the grid of some tensor, so that the perturbation would vanish.
    """

    def __init__(
        self, tensors: Mapping[str, Floats] | Passes, *, eps: float, sampler: Sampler | None = None, threads: int | None = None
    ) -> None:
        self.sampler = sampler or Full()
        self.passes: Passes = NumPyPasses(tensors, threads or default_threads()) if isinstance(tensors, Mapping) else tensors
        self._asked_eps = eps
        self.reach = 4 * eps * self.sampler.largest
        self.tensors = [
            GridTensor(name, noise.tensor_id(name), math.prod(shape), len(shape) > 1) for name, shape in self.passes.shapes.items()
        ]
        for tensor in self.tensors:
            self._fit(tensor, "export the model again")
        self._pending: dict[Direction, dict[float, int]] = {}
        self._kept: dict[str, Floats] = {}
        self.eps = 0.0
        self._choose_eps(ConfigError, "use a larger --eps or leave the tensor out at export")

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of every tensor."""
        return {tensor.name: tensor.size for tensor in self.tensors}

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
        """Apply what was added, in one pass over the weights."""
        if self._pending:
            pending, self._pending = self._pending, {}
            self.passes.add(self.tensors, pending, self.sampler)

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
        for tensor in self.tensors:
            tensor.bound = self._bound_after(tensor, scales)
        outgrown = any(self._outgrown(tensor) for tensor in self.tensors)
        if outgrown:  # sums with the restore would leave the range that is exact: the restore first, alone, as in a replay
            self.flush()
        self._add_all(directions, scales)
        if decay:
            self.flush()
            self._decay(directions[0], decay)
        if outgrown:
            self.flush()
            self._coarsen()

    def update_by(self, directions: Sequence[Direction], coefficients: Sequence[float], change: Change, decay: float = 0.0) -> None:
        """End a step by what a rule makes of G = sum of coefficient * z: theta += d * floor(change(G) / d + u), then as `update`.

        G is a sum of multiples of 2^-24 of the largest it could be, rounded as updates are: exact in any order. Every element of theta
        changes on its own, so neither threads nor pieces matter.

        Args:
            directions: name every z.
            coefficients: of every z.
            change: elementwise.
            decay: lr * weight_decay, in [0, 1).

        Raises:
            NonFiniteLossError: a weight became NaN or infinite, or outgrew the resolution that eps needs.
        """
        self.flush()
        passes, first = self._arrays(), directions[0]
        additions = {direction: {value: 1} for direction, value in zip(directions, coefficients, strict=True) if value}
        most = math.fsum(map(abs, coefficients)) * self.sampler.largest
        exponent = math.frexp(most)[1] + 1 if most else 0  # a bit to spare for rounding
        gradients = {t.name: GridTensor(t.name, t.id, t.size, False, exponent) for t in self.tensors}
        adder = self.sampler.adder(list(gradients.values()), additions)
        dither = np.float32(noise.uniform(first.seed, noise.CHANGE, first.step, first.number))
        moved: list[tuple[GridTensor, float]] = []

        def work(tensor: GridTensor, start: int, end: int) -> None:
            part = passes.part(tensor, start, end)
            gradient = np.zeros_like(part)
            adder(gradients[tensor.name], start, gradient)
            with np.errstate(over="ignore", invalid="ignore"):  # infinity is found when the grid is fitted
                amount = change(tensor.name, slice(start * BLOCK, start * BLOCK + part.size), gradient)
                amount *= np.float32(1 / tensor.quantum)
                amount += dither
                np.floor(amount, out=amount)
                amount *= np.float32(tensor.quantum)
                part += amount
                moved.append((tensor, float(np.max(np.abs(amount)))))

        passes.each_share(self.tensors, work)
        for tensor in self.tensors:
            largest = float(np.max([most for changed, most in moved if changed is tensor]))
            tensor.bound += largest if math.isfinite(largest) else math.inf
        if decay:
            self._decay(first, decay)
        if any(self._outgrown(tensor) for tensor in self.tensors):
            self._coarsen()

    def keep(self) -> None:
        """Keep a copy of theta, for `at_kept`."""
        self.flush()
        self._kept = {name: flat.copy() for name, flat in self._arrays().flat.items()}

    @contextmanager
    def at_kept(self) -> Iterator[None]:
        """theta as it was when it was kept; afterwards as before, whatever was done in between."""
        self.flush()
        with self._restored(self.tensors):
            for name, flat in self._arrays().flat.items():
                flat[...] = self._kept[name]
            yield

    @contextmanager
    def moved(self, directions: Sequence[Direction], scales: Sequence[float], factor: int) -> Iterator[None]:
        """theta + factor * sum of q_d(scale * z); afterwards as before."""
        self.flush()
        # where the sum leaves the range that is exact, taking it back would not be
        beyond = [t for t in self.tensors if self._bound_after(t, scales) + self.reach > 2.0**t.exponent]
        with self._restored(beyond):
            self._add_all(directions, scales, factor)
            self.flush()
            try:
                yield
            finally:
                self._add_all(directions, scales, -factor)
                self.flush()

    def _add_all(self, directions: Sequence[Direction], scales: Sequence[float], times: int = 1) -> None:
        for direction, scale in zip(directions, scales, strict=True):
            if scale and times:
                self.add(direction, scale, times)

    @contextmanager
    def _restored(self, tensors: Sequence[GridTensor]) -> Iterator[None]:
        saved = {tensor.name: self._arrays().flat[tensor.name].copy() for tensor in tensors}
        try:
            yield
        finally:
            self.flush()
            for name, values in saved.items():
                self._arrays().flat[name][...] = values

    def _arrays(self) -> NumPyPasses:
        assert isinstance(self.passes, NumPyPasses), "rules that need arrays are refused before a run on a device starts"
        return self.passes

    def _bound_after(self, tensor: GridTensor, scales: Sequence[float]) -> float:
        return tensor.bound + (math.fsum(map(abs, scales)) * self.sampler.largest + len(scales) * self.sampler.entries * tensor.quantum)

    def _outgrown(self, tensor: GridTensor) -> bool:
        return tensor.bound + self.reach > 2.0**tensor.exponent

    def _coarsen(self) -> None:
        for tensor in self.tensors:
            if self._outgrown(tensor):
                tensor.bound = self.passes.largest(tensor)
                if not tensor.bound + self.reach <= 2.0**tensor.exponent:
                    self._fit(tensor, "use a smaller --lr")
        self._choose_eps(NonFiniteLossError, "the weights grew too large; use a smaller --lr or a larger --eps")

    def _choose_eps(self, error: type[EdgezoError], advice: str) -> None:
        """The multiple of the coarsest grid, and so of every grid, next to the eps that was asked for."""
        coarse = max(self.tensors, key=lambda tensor: tensor.exponent)
        self.eps = round(self._asked_eps / coarse.quantum) * coarse.quantum
        if not self.eps:
            raise error(f"eps {self._asked_eps:g} is below the float32 resolution {coarse.quantum:g} of {coarse.name}; {advice}")

    def _fit(self, tensor: GridTensor, advice: str) -> None:
        """Choose the grid with a quarter of headroom and round the values to it."""
        tensor.bound = self.passes.largest(tensor)
        if not math.isfinite(tensor.bound):
            raise NonFiniteLossError(f"{tensor.name}: holds NaN or infinity; {advice}")
        tensor.exponent = math.ceil(math.log2(1.25 * tensor.bound + self.reach))
        self.passes.round_to_grid(tensor)

    def _decay(self, direction: Direction, rate: float) -> None:
        """Decoupled weight decay rounded without bias, with one number a step."""
        if not 0 <= rate < 1:
            raise ConfigError(f"lr * weight_decay is {rate:g}; it must lie in [0, 1)")
        self.passes.decay(self.tensors, rate, noise.uniform(direction.seed, noise.DECAY, direction.step))
