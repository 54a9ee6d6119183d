"""adam: averages of the gradients and of their squares."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.rules.rule import DenseRule, Updatable

STABILITY = 1e-8  # added to the root


class Adam(DenseRule):
    """m <- beta1 m + (1 - beta1) G, v <- beta2 v + (1 - beta2) G^2, theta <- theta - lr m' / (sqrt(v') + 1e-8), G = 1/Q sum_q g_q z_q.

    m' = m / (1 - beta1^t), v' = v / (1 - beta2^t). Eight bytes an element.

    Args:
        sizes: elements of every tensor.
        beta1: of the average of gradients.
        beta2: of that of squares.

    References:
        Kingma and Ba 2014, Adam: A Method for Stochastic Optimization (arXiv 1412.6980); Malladi et al. 2023, arXiv 2305.17333, appendix B.
    """

    def __init__(self, sizes: Mapping[str, int], beta1: float, beta2: float) -> None:
        super().__init__(sizes, 2)
        self.beta1, self.beta2 = beta1, beta2
        self.power1, self.power2 = 1.0, 1.0  # beta^t, by multiplications: pow has other last bits elsewhere

    def step(
        self, parameters: Updatable, directions: Sequence[Direction], projected_grads: Sequence[float], lr: float, decay: float = 0.0
    ) -> None:
        """As `Rule`."""
        self.power1 *= self.beta1
        self.power2 *= self.beta2
        super().step(parameters, directions, projected_grads, lr, decay)

    def change(self, name: str, place: slice, gradient: Floats, lr: float) -> Floats:
        """As `DenseRule`."""
        m, v = (moment[name][place] for moment in self.moments)
        m *= np.float32(self.beta1)
        m += gradient * np.float32(1 - self.beta1)
        gradient *= gradient
        gradient *= np.float32(1 - self.beta2)
        v *= np.float32(self.beta2)
        v += gradient
        root = np.sqrt(v * np.float32(1 / (1 - self.power2)))
        root += np.float32(STABILITY)
        moved: Floats = np.divide(m * np.float32(-lr / (1 - self.power1)), root, out=root)
        return moved
