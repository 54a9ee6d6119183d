"""two-sided: the difference of the losses on both sides, each direction on rows of its own."""

from edgezo.runtime.estimators.estimator import Estimate, Estimator, Loss, Losses, Parameters, estimate_in_place
from edgezo.runtime.noise import Direction


def grads(losses: Losses, base: float, eps: float) -> Losses:
    """g = (L(theta + eps z) - L(theta - eps z)) / (2 eps); on a quadratic exactly z . grad L.

    With a row a direction this is one direction per example.

    References:
        Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes, algorithm 1 (arXiv 2305.17333).
        Spall 1992, Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation.
        Gao et al. 2024, MobiZO (P-RGE): Enabling Efficient LLM Fine-Tuning at the Edge via Inference Engines (arXiv 2409.15520).
    """
    found: Losses = (losses[:, 0] - losses[:, 1]) / (2 * eps)
    return found


TWO_SIDED = Estimator((1, -1), False, grads)


def two_sided(parameters: Parameters, loss: Loss, direction: Direction, eps: float) -> Estimate:
    """The estimate along one direction in place; calls `loss` exactly twice. As `estimate_in_place`."""
    return estimate_in_place(TWO_SIDED, parameters, [loss], [direction], eps)[0]
