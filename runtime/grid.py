"""The grid that a tensor's values lie on, and what an addition along a direction is there (docs/noise.md)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgezo.runtime import noise
from edgezo.runtime.noise import Direction

SIGNIFICAND_BITS = 24
Additions = Mapping[Direction, Mapping[float, int]]  # scales of every direction, and how many times each


@dataclass
class GridTensor:
    """A tensor whose values lie on the grid d = 2**(exponent - 24)."""

    name: str
    id: int
    size: int
    decays: bool  # matrices decay, biases and norms do not
    exponent: int = 0
    bound: float = 0.0  # max |theta| is at most this

    @property
    def quantum(self) -> float:
        """d, the step of the grid."""
        return 2.0 ** (self.exponent - SIGNIFICAND_BITS)


def direction_dither(direction: Direction) -> float:
    """The one number that all additions along a direction are rounded with."""
    return noise.uniform(direction.seed, noise.DITHER, direction.step, direction.number)


def level(direction: Direction, scales: Mapping[float, int], quantum: float, factor: float = 1.0) -> int:
    """The integer m = sum of times * floor(factor * scale / d + u) that a z of integers is multiplied with."""
    dither = direction_dither(direction)
    return sum(times * math.floor(factor * scale / quantum + dither) for scale, times in scales.items())


def sign_values(direction: Direction, scales: Mapping[float, int], quantum: float) -> tuple[float, float]:
    """What is added where z is +1 and where it is -1: sums of times * q_d(+-scale)."""
    dither = direction_dither(direction)
    plus = sum(times * math.floor(scale / quantum + dither) for scale, times in scales.items()) * quantum
    minus = sum(times * math.floor(-scale / quantum + dither) for scale, times in scales.items()) * quantum
    return plus, minus
