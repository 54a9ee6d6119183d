"""LoRA on a frozen base: one master copy of A and B, and what the graph is fed, for one copy or for many directions at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.adapters import A_ROWS, A_SIGNS, B_ROWS, B_SIGNS, A, B, LoraTarget
from edgezo.runtime import noise
from edgezo.runtime.head_rows import NO_ROWS
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.samplers.layers import LayerSubset
from edgezo.runtime.samplers.outer import Layout, Outer
from edgezo.runtime.weights import MutableWeights

Array = npt.NDArray[Any]


class Lora:
    """y = W x + alpha/rank * B A x at every target.

    Args:
        targets: linear layers with a branch point.
        rank: of A and B.
        alpha: numerator of the scaling.

    Attributes:
        a: all A^T as one flat float32 array, [in_features, rank] each. b: all B^T, [rank, out_features] each.
    """

    prefix_tokens = 0

    def __init__(self, targets: Sequence[LoraTarget], rank: int, alpha: float) -> None:
        self.targets, self.rank, self.alpha = list(targets), rank, alpha
        self.layouts = {
            A: Layout([target.in_features for target in targets], [rank] * len(self.targets)),
            B: Layout([rank] * len(self.targets), [target.out_features for target in targets]),
        }
        self.head = NO_ROWS  # that came with an adapter file
        self.given = {target.module for target in targets}  # layers an adapter file had tensors for
        self.a: Floats = np.zeros(sum(rank * target.in_features for target in targets), np.float32)
        self.b: Floats = np.zeros(sum(rank * target.out_features for target in targets), np.float32)

    @property
    def complete(self) -> bool:
        """Whether every target has tensors of its own."""
        return len(self.given) == len(self.targets)

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def initialise(self, seed: int) -> None:
        """A uniform in +-1/sqrt(in_features), drawn from the INIT stream of the run's seed, and B zero: the base unchanged.

        References:
            Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685); the bounds are those of PEFT.
        """
        self.a[...] = noise.uniforms(seed, A, self.a.size)
        for target, matrix in zip(self.targets, self.matrices(A), strict=True):
            matrix *= np.float32(1 / np.sqrt(target.in_features))
        self.b[...] = 0

    def matrices(self, name: str) -> list[Floats]:
        """Views of A^T [in_features, rank] or B^T [rank, out_features], target by target."""
        return _split(self.a if name == A else self.b, self.layouts[name])

    def weights(self, eps: float, tune_a: bool, subset: LayerSubset | None = None) -> MutableWeights:
        """theta: B alone (LoRA-FA), or A and B.

        Args:
            subset: modules that a step moves; all when None.
        """
        tensors = {A: self.a, B: self.b} if tune_a else {B: self.b}
        outer = Outer({name: self.layouts[name] for name in tensors}, [target.module for target in self.targets], subset)
        weights = MutableWeights(tensors, eps=eps, sampler=outer, threads=1)
        for tensor in weights.tensors:
            tensor.decays = True
        return weights

    def feeds(self) -> dict[str, Array]:
        """One copy of every matrix, for the scoring graph and the generation graph."""
        scaled = _split(self.a * np.float32(self.scaling), self.layouts[A])
        return {
            **{target.a: matrix[None] for target, matrix in zip(self.targets, scaled, strict=True)},
            **{target.b: matrix[None] for target, matrix in zip(self.targets, self.matrices(B), strict=True)},
        }

    def stacked_feeds(self, theta: MutableWeights, directions: Sequence[Direction], sides: Sequence[int], eps: float) -> dict[str, Array]:
        """Copies theta + side * eps * z, direction after direction, its sides after each other.

        Args:
            theta: says which tensors are perturbed and by which signs.
            directions: of the groups of rows.
            sides: +1 and -1.
        """
        outer, feeds, count = theta.sampler, self.feeds(), len(self.targets)
        assert isinstance(outer, Outer)
        scale = eps * np.array(sides, np.float32)[None, :, None, None]
        if A in outer.layouts:
            rows, columns = outer.signs(directions, A)
            feeds[A_SIGNS] = rows
            columns = columns.reshape(-1, 1, count, self.rank)
            feeds[A_ROWS] = (scale * np.float32(self.scaling) * columns).astype(np.float32)
        rows, columns = outer.signs(directions, B)
        rows = rows.reshape(-1, 1, count, self.rank)
        feeds[B_ROWS] = np.ascontiguousarray((scale * rows).astype(np.float32).transpose(0, 1, 3, 2))
        feeds[B_SIGNS] = columns
        return feeds

    def whole_copies(self, theta: MutableWeights, directions: Sequence[Direction], sides: Sequence[int], eps: float) -> dict[str, Array]:
        """Copies theta + side * eps * z as `stacked_feeds`, whole: [copies, ...] of every matrix that is perturbed, for both graphs."""
        outer, feeds = theta.sampler, {}
        assert isinstance(outer, Outer)
        for name, layout in outer.layouts.items():
            factor = np.float32(self.scaling if name == A else 1)
            scale = factor * np.float32(eps) * np.array(sides, np.float32)[None, :, None, None]
            rows, columns = (
                np.split(signs, np.cumsum(sizes)[:-1], axis=1) for signs, sizes in zip(outer.signs(directions, name), layout, strict=True)
            )
            for target, matrix, row, column in zip(self.targets, self.matrices(name), rows, columns, strict=True):
                z = row[:, None, :, None] * column[:, None, None, :]
                feeds[target.a if name == A else target.b] = (factor * matrix + scale * z).reshape(-1, *matrix.shape)
        return feeds


def _split(flat: Floats, layout: Layout) -> list[Floats]:
    parts, start = [], 0
    for rows, columns in zip(*layout, strict=True):
        parts.append(flat[start : start + rows * columns].reshape(rows, columns))
        start += rows * columns
    return parts
