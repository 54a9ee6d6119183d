"""A minimum of a smooth convex function with its exact gradient, in NumPy: the device half has no SciPy."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float64]
MEMORY = 10  # pairs of steps and changes of the gradient
HALVINGS = 30
SUFFICIENT = 1e-4  # Armijo's constant


def minimize(
    function: Callable[[Vector], tuple[float, Vector]], start: Vector, *, iterations: int = 500, tolerance: float = 1e-6
) -> Vector:
    """Limited-memory BFGS with backtracking.

    Args:
        function: value and gradient float64 [n] at a point.
        start: float64 [n].
        iterations: at most.
        tolerance: ends where an iteration gains less than this share of the value.

    References:
        Liu and Nocedal 1989, On the Limited Memory BFGS Method for Large Scale Optimization.
    """
    point: Vector = start.copy()
    value, gradient = function(point)
    pairs: list[tuple[Vector, Vector]] = []
    for _ in range(iterations):
        direction = -_inverse_hessian_times(gradient, pairs)
        slope = float(gradient @ direction)
        length = 1.0
        for _ in range(HALVINGS):
            moved, moved_gradient = function(point + length * direction)
            if moved <= value + SUFFICIENT * length * slope:
                break
            length /= 2
        else:
            return point  # rounding leaves nothing to gain
        step: Vector = length * direction
        change: Vector = moved_gradient - gradient
        if step @ change > 1e-12 * np.linalg.norm(step) * np.linalg.norm(change):
            pairs = [*pairs[1 - MEMORY :], (step, change)]
        point += step
        gained, value, gradient = value - moved, moved, moved_gradient
        if gained <= tolerance * max(abs(value), tolerance):
            return point
    return point


def _inverse_hessian_times(gradient: Vector, pairs: list[tuple[Vector, Vector]]) -> Vector:
    """The two-loop recursion; the first step has length 1 at most."""
    if not pairs:
        short: Vector = gradient / max(1.0, float(np.linalg.norm(gradient)))
        return short
    found: Vector = gradient.copy()
    factors = []
    for step, change in reversed(pairs):
        factor = (step @ found) / (change @ step)
        found -= factor * change
        factors.append(factor)
    step, change = pairs[-1]
    found *= (step @ change) / (change @ change)
    for (step, change), factor in zip(pairs, reversed(factors), strict=True):
        found += step * (factor - (change @ found) / (change @ step))
    return found
