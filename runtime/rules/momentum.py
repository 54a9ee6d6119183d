"""momentum: an average of the gradients so far."""

from collections.abc import Mapping

import numpy as np

from edgezo.runtime.noise import Floats
from edgezo.runtime.rules.rule import DenseRule


class Momentum(DenseRule):
    """m <- beta_m m + (1 - beta_m) / Q * sum_q g_q z_q, theta <- theta - lr m. Four bytes an element.

    Args:
        sizes: elements of every tensor.
        beta_m: of the average.

    References:
        Zhang et al. 2024, Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark (arXiv 2402.11592),
        ZO-SGD-MMT.
    """

    def __init__(self, sizes: Mapping[str, int], beta_m: float) -> None:
        super().__init__(sizes, 1)
        self.beta_m = beta_m

    def change(self, name: str, place: slice, gradient: Floats, lr: float) -> Floats:
        """As `DenseRule`."""
        m = self.moments[0][name][place]
        gradient *= np.float32(1 - self.beta_m)
        m *= np.float32(self.beta_m)
        m += gradient
        moved: Floats = np.multiply(m, np.float32(-lr), out=gradient)
        return moved
