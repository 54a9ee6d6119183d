"""curvature: two-sided differences, weighed down along directions in which the loss curves; all directions on the same rows."""

import numpy as np

from edgezo.runtime.estimators.estimator import Estimator, Losses, second_differences

POWER = 0.1


def grads(losses: Losses, base: float, eps: float) -> Losses:
    """g = (L+ - L-) / (2 eps) / max(1, |c|^0.1), c = (L+ - 2 L(theta) + L-) / eps^2; 2 n + 1 forwards for n directions.

    The weight is even in z: g z keeps the direction of the gradient on average, not its length. What is journalled is the weighed g.

    References:
        1.5-SPSA, as described for language models without a paper that we could cite; the curvature is that of Spall 2000, Adaptive
        Stochastic Approximation by the Simultaneous Perturbation Method.
    """
    weights = [weight(curvature) for curvature in second_differences(losses, base, eps).tolist()]
    found: Losses = (losses[:, 0] - losses[:, 1]) / (2 * eps) / weights
    return found


def weight(curvature: float) -> float:
    """What g is divided by: max(1, |c|^0.1)."""
    return float(np.maximum(1, np.abs(curvature) ** POWER))


CURVATURE = Estimator((1, -1), True, grads)
