"""Tunable weights, changed in place, exactly.

Every tensor k lies on a power-of-two grid d_k = 2**(e_k - 24), where 2**e_k bounds its values. Multiples of d_k below 2**e_k are float32
numbers and their sums are exact, so a perturbation taken back leaves no trace, the order of additions does not matter, and the
weights after a step are a function of the scalars that made it.
"""

import math
from collections.abc import Mapping, Sequence

from edgezo.errors import ConfigError, EdgezoError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.machine import default_threads
from edgezo.runtime.noise import Direction, Distribution, Floats
from edgezo.runtime.passes import Additions, GridTensor, NumPyPasses, Passes


class MutableWeights:
    """The tunable tensors of a model as theta, with exact in-place addition of scaled noise.

    Args:
        tensors: float32 C-contiguous arrays by Hugging Face name, or the passes over values that lie elsewhere; they are changed in
            place, at once by rounding to the grid.
        eps: largest perturbation the run will ask for; room is left for it below 2**e_k.
        distribution: of z.
        threads: threads for the passes over arrays.

    Raises:
        ConfigError: eps is smaller than the grid of some tensor, so that the perturbation would vanish.
    """

    def __init__(
        self, tensors: Mapping[str, Floats] | Passes, *, eps: float, distribution: Distribution = "rademacher", threads: int | None = None
    ) -> None:
        self.distribution = distribution
        self.passes: Passes = NumPyPasses(tensors, threads or default_threads()) if isinstance(tensors, Mapping) else tensors
        self._asked_eps = eps
        self.reach = 4 * eps * noise.largest(distribution)
        self.tensors = [
            GridTensor(name, noise.tensor_id(name), math.prod(shape), len(shape) > 1) for name, shape in self.passes.shapes.items()
        ]
        for tensor in self.tensors:
            self._fit(tensor, "export the model again")
        self._pending: dict[Direction, dict[float, int]] = {}
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
        """Apply what was added, in one pass over the weights."""
        if self._pending:
            pending, self._pending = self._pending, {}
            self._apply(pending)

    def _apply(self, additions: Additions) -> None:
        self.passes.add(self.tensors, additions, self.distribution)

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
