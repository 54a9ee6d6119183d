"""one-sided: the differences to the loss at theta, all directions on the same rows."""

from edgezo.runtime.estimators.estimator import Estimator, Losses


def grads(losses: Losses, base: float, eps: float) -> Losses:
    """g = (L(theta + eps z) - L(theta)) / eps = z . grad L + eps / 2 * z^T H z; n + 1 forwards for n directions.

    The second term is even in z, so that g z is unbiased up to eps^2 all the same.

    References:
        Dang et al. 2025, FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale Speed (arXiv 2506.09034).
    """
    found: Losses = (losses[:, 0] - base) / eps
    return found


ONE_SIDED = Estimator((1,), True, grads)
