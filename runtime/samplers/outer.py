"""Tunable matrices whose directions are outer products of signs: z = r s^T, r + s numbers for rows * columns elements.

E[z z^T] = I as for fresh signs, and (r^T G s)^2 has the mean |G|^2 as (z . G)^2 has; a direction of all LoRA matrices of SmolLM2-135M is 157,000
bits instead of 1.2 million signs. Q directions are added as one product R^T diag(m) S of integers, exact in float64 in any order.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.runtime import noise
from edgezo.runtime.grid import Additions, GridTensor, level
from edgezo.runtime.noise import BLOCK, Direction, Floats
from edgezo.runtime.samplers.layers import LayerSubset
from edgezo.runtime.samplers.sampler import Adder, Sampler

Signs = npt.NDArray[np.int8]


class Layout(NamedTuple):
    """The matrices [rows[i], columns[i]] of the layers of a model that follow each other in one flat tensor."""

    rows: list[int]
    columns: list[int]


class Outer(Sampler):
    """z = r s^T for each of the matrices in a flat tensor, r and s of signs: LOZO with rank 1 and nothing kept.

    Args:
        layouts: of every tensor.
        modules: names of the matrices, those of `subset`.
        subset: layers that a step moves; all when None. The row signs of the others are 0.

    References:
        Gao et al. 2024, MobiZO (P-RGE): Enabling Efficient LLM Fine-Tuning at the Edge via Inference Engines (arXiv 2409.15520), for the
        stacking; Chen et al. 2024, arXiv 2410.07698, for low rank.
    """

    largest = 1.0

    def __init__(self, layouts: Mapping[str, Layout], modules: Sequence[str] = (), subset: LayerSubset | None = None) -> None:
        self.layouts, self.modules, self.subset = dict(layouts), list(modules), subset

    def signs(self, directions: Sequence[Direction], name: str) -> tuple[Signs, Signs]:
        """r of all matrices of a tensor, int8 [directions, sum of rows], and s, int8 [directions, sum of columns]; r is drawn first."""
        layout, tensor = self.layouts[name], noise.tensor_id(name)
        height, size = sum(layout.rows), sum(layout.rows) + sum(layout.columns)
        drawn = [noise.signs(direction, tensor, size) for direction in directions]
        rows = np.stack([signs[:height] for signs in drawn])
        if self.subset is not None:
            for own, direction in zip(rows, directions, strict=True):
                own *= np.repeat([self.subset.holds(module, direction) for module in self.modules], layout.rows)
        return rows, np.stack([signs[height:] for signs in drawn])

    def adder(self, tensors: Sequence[GridTensor], additions: Additions) -> Adder:
        """As `Sampler`: theta += d * sum_q m_q r_q s_q^T, m_q the scale on the grid."""
        drawn = {}
        for tensor in tensors:
            rows, columns = self.signs(list(additions), tensor.name)
            levels = [float(level(direction, scales, tensor.quantum)) for direction, scales in additions.items()]
            drawn[tensor.name] = (rows * np.array(levels)[:, None], columns)

        def add(tensor: GridTensor, first: int, part: Floats) -> None:
            rows, columns = drawn[tensor.name]
            begin, row, column, start = first * BLOCK, 0, 0, 0
            for height, width in zip(*self.layouts[tensor.name], strict=True):
                low, high = max(start, begin), min(start + height * width, begin + part.size)
                if low < high:
                    total = rows[:, row : row + height].T @ columns[:, column : column + width].astype(np.float64)
                    own = part[low - begin : high - begin]
                    # float64: exact on the grid, so the cast is too
                    own[...] = own + total.reshape(-1)[low - start : high - start] * tensor.quantum
                row, column, start = row + height, column + width, start + height * width

        return add
