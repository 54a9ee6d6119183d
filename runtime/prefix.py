"""Prefix tuning: key and value vectors before the first token of every layer, as if a few tokens had been read already."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.adapters import PREFIX, prefix_inputs
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.weights import MutableWeights

Array = npt.NDArray[Any]


class Prefix:
    """The prefix of one edge model.

    Args:
        array: float32 [layers, 2 (key, value), heads, tokens, head_dim]; theta, changed in place.

    References:
        Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation (arXiv 2101.00190).
    """

    def __init__(self, array: Floats) -> None:
        self.array = array

    complete = True

    @property
    def prefix_tokens(self) -> int:
        """How many tokens the prefix stands for; text begins at this position."""
        return int(self.array.shape[3])

    def feeds(self) -> dict[str, Array]:
        """One copy, for the scoring graph."""
        return self._by_input(self.array[:, :, None])

    def past(self) -> list[Array]:
        """Keys and values to start a cache with, [1, heads, tokens, head_dim], layer by layer, key before value."""
        return [part[None] for layer in self.array for part in layer]

    def stacked_feeds(self, theta: MutableWeights, directions: Sequence[Direction], sides: Sequence[int], eps: float) -> dict[str, Array]:
        """Copies theta + side * eps * z, direction after direction, its sides after each other."""
        return self._by_input(self._copies(theta, directions, sides, eps))

    def stacked_past(self, theta: MutableWeights, directions: Sequence[Direction], sides: Sequence[int], eps: float) -> list[Array]:
        """The same copies as `past`, [copies, heads, tokens, head_dim]."""
        return [np.ascontiguousarray(part) for layer in self._copies(theta, directions, sides, eps) for part in layer]

    def _copies(self, theta: MutableWeights, directions: Sequence[Direction], sides: Sequence[int], eps: float) -> Array:
        """[layers, 2, copies, heads, tokens, head_dim]."""
        copies = np.empty((*self.array.shape[:2], len(directions) * len(sides), *self.array.shape[2:]), np.float32)
        for place, direction in enumerate(directions):
            z = theta.sampler.draw(direction, PREFIX, self.array.size).reshape(self.array.shape)
            for offset, side in enumerate(sides):
                copies[:, :, place * len(sides) + offset] = self.array + np.float32(side * eps) * z
        return copies

    def _by_input(self, copies: Array) -> dict[str, Array]:
        """[layers, 2, copies, heads, tokens, head_dim] by the names of the graph's inputs."""
        return {name: np.ascontiguousarray(copies[i, k]) for i in range(len(copies)) for k, name in enumerate(prefix_inputs(i))}
