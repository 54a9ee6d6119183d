"""adam: averages of the gradients and of their squares."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.rules.rule import DenseRule, Updatable

STABILITY = 1e-8  # added to the root


class Adam(DenseRule):
    """m <- beta_m m + (1 - beta_m) G, v <- beta_v v + (1 - beta_v) G^2, theta <- theta - lr m' / (sqrt(v') + 1e-8), G = 1/Q sum_q g_q z_q.

    m' = m / (1 - beta_m^t), v' = v / (1 - beta_v^t). Eight bytes an element.

    Args:
        sizes: elements of every tensor.
        beta_m: of the average of gradients.
        beta_v: of that of squares.

    References:
        Kingma and Ba 2014, Adam: A Method for Stochastic Optimization (arXiv 1412.6980); Malladi et al. 2023, arXiv 2305.17333, appendix B.
    """

    def __init__(self, sizes: Mapping[str, int], beta_m: float, beta_v: float) -> None:
        super().__init__(sizes, 2)
        self.beta_m, self.beta_v = beta_m, beta_v
        self.power1, self.power2 = 1.0, 1.0  # beta^t, by multiplications: pow has other last bits elsewhere

    def step(
        self, parameters: Updatable, directions: Sequence[Direction], projected_grads: Sequence[float], lr: float, decay: float = 0.0
    ) -> None:
        """As `Rule`."""
        self.power1 *= self.beta_m
        self.power2 *= self.beta_v
        super().step(parameters, directions, projected_grads, lr, decay)

    def change(self, name: str, place: slice, gradient: Floats, lr: float) -> Floats:
        """As `DenseRule`."""
        m, v = (moment[name][place] for moment in self.moments)
        m *= np.float32(self.beta_m)
        m += gradient * np.float32(1 - self.beta_m)
        gradient *= gradient
        gradient *= np.float32(1 - self.beta_v)
        v *= np.float32(self.beta_v)
        v += gradient
        root = np.sqrt(v * np.float32(1 / (1 - self.power2)))
        root += np.float32(STABILITY)
        moved: Floats = np.divide(m * np.float32(-lr / (1 - self.power1)), root, out=root)
        return moved

    def rate(self, move: float, grad_rms: float, directions: int) -> float:
        """As `Rule`."""
        return move
