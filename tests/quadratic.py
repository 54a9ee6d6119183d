"""A quadratic of a few tensors as the problem of a step: rows differ, the minimum is known, everything is float64."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.config import SCALARS, TuneConfig, make_config
from edgezo.runtime.estimators import ESTIMATORS
from edgezo.runtime.estimators.estimator import Estimate, estimate_in_place
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.rules import make_rule
from edgezo.runtime.samplers import SAMPLERS, Tunables, make_sampler
from edgezo.runtime.weights import MutableWeights

SHAPES = {"layers.0.w": (4, 6), "layers.1.w": (6, 3), "norm": (4,)}
LAYERS = {"layers.0.w": 0, "layers.1.w": 1, "norm": None}
SPREAD = 0.05  # of the rows' own minima around the common one
EPS = 2.0**-10
NOISY = [("full", "rademacher"), ("full", "gaussian"), ("full", "sphere"), *((name, "rademacher") for name in SAMPLERS if name != "full")]


def configure(
    rule: str = "sgd", estimator: str | None = None, sampler: str = "full", noise: str = "rademacher", **settings: Any
) -> TuneConfig:
    """Settings of a method, with numbers that suit the quadratic."""
    estimator = estimator or ("curvature" if rule == "hizoo" else "two-sided")
    made = {
        "hessian_smooth": 1e-3,
        "directions": 4,
        "batch": 1,
        "share": 0.5,
        "z_rank": 2,
        "redraw_every": 3,
        "anchor_every": 3,
        "anchor_batches": 4,
        **settings,
    }
    return make_config(None, {"data": "none", "rule": rule, "estimator": estimator, "sampler": sampler, "noise": noise, **made})


def scalars(rule: str, grads: list[float]) -> list[float]:
    """A step with these projected gradients, as the journal of a rule holds it."""
    return grads + [0.5 * number for number in range((SCALARS.get(rule, 1) - 1) * len(grads))]


class Quadratic:
    """L(theta) = mean over rows of 1/2 sum curvature (theta - target - shift_row)^2.

    Args:
        config: estimator, rule, sampler and their numbers; `directions` directions, a row for each.
    """

    def __init__(self, config: TuneConfig, threads: int = 1, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        random = np.random.default_rng(1)
        self.config = config
        self.arrays: dict[str, Floats] = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        self.size = sum(array.size for array in self.arrays.values())
        self.target, self.curvature = random.standard_normal(self.size), random.uniform(0.5, 2, self.size)
        sampler = make_sampler(config, Tunables(shapes, {name: LAYERS.get(name) for name in shapes}, self.arrays))
        self.weights = MutableWeights(self.arrays, eps=EPS, sampler=sampler, threads=threads)
        self.rule = make_rule(config, self.weights.sizes)
        self.estimator = ESTIMATORS[config.estimator]
        self.now, self.calls, self.fails_at, self.fault = 0, 0, 0, "raise"
        self.records: list[tuple[list[float], float]] = []

    @property
    def theta(self) -> npt.NDArray[np.float64]:
        """All weights, flat."""
        return np.concatenate([array.reshape(-1) for array in self.arrays.values()]).astype(np.float64)

    @property
    def digest(self) -> str:
        """SHA-256 of all weights."""
        return hashlib.sha256(b"".join(array.tobytes() for array in self.arrays.values())).hexdigest()

    def loss(self, rows: Sequence[int] = ()) -> float:
        """Over some rows; without, over all there could be."""
        shifts = [SPREAD * np.random.default_rng(row).standard_normal(self.size) for row in rows] or [np.zeros(self.size)]
        return float(np.mean([0.5 * (self.curvature * (self.theta - self.target - shift) ** 2).sum() for shift in shifts]))

    def failing_loss(self, rows: Sequence[int]) -> float:
        """`loss`, that fails at one of its calls."""
        self.calls += 1
        if self.calls == self.fails_at:
            if self.fault == "raise":
                raise RuntimeError("engine out of memory")
            return float("nan")
        return self.loss(rows)

    def directions(self) -> list[Direction]:
        """Of the present step."""
        return [Direction(self.config.seed, self.now, number) for number in range(self.config.directions)]

    def rows(self, batches: int = 1) -> list[int]:
        """Of the present step and those after it."""
        return list(range(self.now * self.config.rows, (self.now + batches) * self.config.rows))

    # what a rule asks of a problem

    def estimates(self, batches: int = 1) -> list[Estimate]:
        """As `Problem`."""
        rows, count = self.rows(batches), self.config.directions
        size = len(rows) // count
        groups = [rows] * count if self.config.shares_rows else [rows[place * size : (place + 1) * size] for place in range(count)]
        losses: Any = [lambda group=group: self.failing_loss(group) for group in groups]
        return estimate_in_place(self.estimator, self.weights, losses, self.directions(), self.weights.eps)

    def losses_at(self, scales: Sequence[float], factors: Sequence[int]) -> list[float]:
        """As `Problem`."""
        found = []
        for factor in factors:
            with self.weights.moved(self.directions(), scales, factor):
                found.append(self.failing_loss(self.rows()))
        return found

    def estimates_at_kept(self) -> list[Estimate]:
        """As `Problem`."""
        with self.weights.at_kept():
            return self.estimates()

    # steps

    def measure(self, lr: float) -> list[float]:
        """Projected gradients of the present step, as a journal holds them."""
        return [float(np.float32(estimate.projected_grad)) for estimate in self.rule.measure(self, self.directions(), lr)]

    def apply(self, grads: Sequence[float], lr: float) -> None:
        """The update of the present step."""
        zo_step(self.weights, self.directions(), grads, lr, self.rule, self.config.weight_decay)
        self.now += 1

    def run(self, steps: int, lr: float) -> None:
        """Whole steps."""
        for _ in range(steps):
            grads = self.measure(lr)
            self.records.append((grads, lr))
            self.apply(grads, lr)
        self.weights.flush()

    def replay(self, records: Sequence[tuple[Sequence[float], float]]) -> None:
        """Steps from their scalars."""
        for grads, lr in records:
            self.apply(grads, lr)
        self.weights.flush()
