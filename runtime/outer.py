"""Tunable matrices whose directions are outer products of signs: z = r s^T, r + s numbers for rows * columns elements.

E[z z^T] = I as for fresh signs, and (r^T G s)^2 has the mean |G|^2 as (z . G)^2 has; a direction of all LoRA matrices of SmolLM2-135M is 157,000
bits instead of 1.2 million signs. Q directions are added as one product R^T diag(m) S of integers, exact in float64 in any order.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.runtime import noise
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.passes import Additions, direction_dither
from edgezo.runtime.weights import MutableWeights

Signs = npt.NDArray[np.int8]


class Layout(NamedTuple):
    """The matrices [rows[i], columns[i]] that follow each other in one flat tensor."""

    rows: list[int]
    columns: list[int]


class OuterWeights(MutableWeights):
    """`MutableWeights` whose tensors are rows of matrices, z = r s^T for each. Rademacher signs alone.

    Args:
        tensors: flat float32 arrays by name; they are changed in place.
        layouts: of every tensor.
        eps: largest perturbation the run will ask for.
    """

    def __init__(self, tensors: Mapping[str, Floats], layouts: Mapping[str, Layout], *, eps: float) -> None:
        super().__init__(tensors, eps=eps, threads=1)
        self._flat = {name: array.reshape(-1) for name, array in tensors.items()}
        self.layouts = dict(layouts)
        for tensor in self.tensors:
            tensor.decays = True

    def signs(self, directions: Sequence[Direction], name: str) -> tuple[Signs, Signs]:
        """r of all matrices of a tensor, int8 [directions, sum of rows], and s, int8 [directions, sum of columns]; r is drawn first."""
        layout, tensor = self.layouts[name], noise.tensor_id(name)
        rows, size = sum(layout.rows), sum(layout.rows) + sum(layout.columns)
        drawn = [noise.signs(direction, tensor, size) for direction in directions]
        return np.stack([signs[:rows] for signs in drawn]), np.stack([signs[rows:] for signs in drawn])

    def _apply(self, additions: Additions) -> None:
        """theta += d * sum_q m_q r_q s_q^T, m_q the scale on the grid."""
        for tensor in self.tensors:
            levels = [_level(direction, scales, tensor.quantum) for direction, scales in additions.items()]
            drawn, columns = self.signs(list(additions), tensor.name)
            rows = drawn * np.array(levels)[:, None]
            row = column = start = 0
            for height, width in zip(*self.layouts[tensor.name], strict=True):
                part = self._flat[tensor.name][start : start + height * width].reshape(height, width)
                total = rows[:, row : row + height].T @ columns[:, column : column + width].astype(np.float64)
                part[...] = part + total * tensor.quantum  # float64: exact on the grid, so the cast is too
                row, column, start = row + height, column + width, start + height * width


def _level(direction: Direction, scales: Mapping[float, int], quantum: float) -> float:
    """The integer m with z-coefficient m * d."""
    dither = direction_dither(direction)
    return float(sum(times * np.floor(scale / quantum + dither) for scale, times in scales.items()))
