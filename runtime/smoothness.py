"""Whether the loss is smooth at the chosen eps: a projected gradient that changes with eps measures rounding or curvature, not slope."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.examples import Example
from edgezo.runtime.landscape import change_between, rms
from edgezo.runtime.noise import Direction
from edgezo.runtime.theta import Theta

LEAST, MOST = 4, 8  # directions, of one row each; 4 rows each tell the same in twice the time (SmolLM2-135M, SST-2)
FIRST, CLEAR = 2, 0.1  # enough where they agree so well; with rounding as large as the slope at eps / 2 two do so once in a hundred draws
TOLERANCE = 0.5
LARGE = 1.0  # no weights stand a perturbation of this size; rounding drowns nothing there
PROBE_STEP = (1 << 64) - 2  # no run has this step


def smoothness_warning(theta: Theta, examples: Sequence[Example]) -> str | None:
    """Compare c = (L+ - L-) / (2 eps) at eps / 2 and at 2 eps, along the same directions on the same rows.

    Args:
        theta: at its start; it is afterwards as before.
        examples: training rows to take a few of.

    Returns:
        A warning with the numbers when the root mean square of the difference exceeds half of that of c; None when it does not, or is below
        a tenth along the first two directions already.
    """
    eps, config = theta.weights.eps, theta.config
    count = min(max(config.directions, LEAST), MOST, len(examples))

    def grads(factor: float, first: int = 0, end: int = count) -> npt.NDArray[np.float64]:
        directions = [Direction(config.seed, PROBE_STEP, number) for number in range(first, end)]
        groups = [[example] for example in examples[first:end]]
        return np.array([estimate.projected_grad for estimate in theta.estimates(directions, groups, factor * eps)])

    try:
        few = min(FIRST, count)
        half, double = grads(0.5, end=few), grads(2.0, end=few)
        if few < count and change_between(half, double) > CLEAR:
            half, double = np.append(half, grads(0.5, few)), np.append(double, grads(2.0, few))
    except NonFiniteLossError:
        theta.weights.flush()
        return f"the loss is not finite at eps {eps:g} / 2 or at twice {eps:g}; try a smaller --eps"
    change = change_between(half, double)
    if change <= TOLERANCE:
        return None
    # where the loss curves, smaller steps agree; where rounding drowns, they disagree more
    curves = eps >= LARGE or change_between(grads(1 / 1024), grads(1 / 256)) <= TOLERANCE
    cause, advice = ("the loss curves", "smaller") if curves else ("rounding drowns the difference of losses", "larger")
    at_half, at_double = rms(half), rms(double)
    return (
        f"the loss is not smooth at eps {eps:g}: projected gradients of {count} directions are {at_half:.3g} at eps / 2 and {at_double:.3g} at 2 eps"
        f" (root mean square) and differ by {100 * change:.0f} %; {cause}, try a {advice} --eps"
    )
