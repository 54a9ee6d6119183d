"""Only some layers move in a step."""

import functools
import math
from collections.abc import Mapping

import numpy as np

from edgezo.runtime import noise
from edgezo.runtime.noise import Direction, Distribution
from edgezo.runtime.samplers.full import Full


class LayerSubset:
    """Which layers a step moves: ceil(share * layers) of them, the same for all its directions, others at every step.

    They are the first in the stable order of the words of the SUBSET stream of the step. What belongs to no layer always moves.

    Args:
        layers: of every tensor; None for one that belongs to none.
        share: of the layers.

    References:
        Wang et al. 2024, Simultaneous Computation and Memory Efficient Zeroth-Order Optimizer for Fine-Tuning Large Language Models (LeZO,
        arXiv 2410.09823).
    """

    def __init__(self, layers: Mapping[str, int | None], share: float) -> None:
        self.layers = dict(layers)
        self.all = sorted({layer for layer in layers.values() if layer is not None})
        self.count = math.ceil(share * len(self.all))
        self.chosen = functools.lru_cache(maxsize=64)(self._chosen)

    def holds(self, name: str, direction: Direction) -> bool:
        """Whether a direction moves a tensor."""
        layer = self.layers[name]
        return layer is None or layer in self.chosen(direction.seed, direction.step)

    def _chosen(self, seed: int, step: int) -> frozenset[int]:
        order = np.argsort(noise.words(seed, noise.SUBSET, len(self.all), step=step), kind="stable")
        return frozenset(self.all[place] for place in order[: self.count])


class Layers(Full):
    """z of independent elements in some layers, 0 in the others; a pass leaves these out. E[z z^T] = I in a step's layers.

    Args:
        subset: which layers.
        distribution: of the elements that move.
    """

    def __init__(self, subset: LayerSubset, distribution: Distribution) -> None:
        super().__init__(distribution)
        self.distribution = None
        self.subset = subset

    def moves(self, name: str, direction: Direction) -> bool:
        """As `Sampler`."""
        return self.subset.holds(name, direction)
