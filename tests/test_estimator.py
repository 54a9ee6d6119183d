"""The two-sided estimator: exact on quadratics, two losses, no trace left, whatever fails."""

import math
import re

import numpy as np
import pytest

from edgezo.errors import NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.estimator import two_sided
from edgezo.runtime.noise import Direction
from edgezo.runtime.optimizer import schedule_factor, sgd_step
from edgezo.runtime.weights import MutableWeights

SIZE = 200


class Quadratic:
    """L(theta) = 1/2 sum curvature_i (theta_i - target_i)^2, in float64."""

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self.theta = random.standard_normal(SIZE).astype(np.float32)
        self.target = random.standard_normal(SIZE)
        self.curvature = random.uniform(0.5, 2, SIZE)
        self.weights = MutableWeights({"theta": self.theta}, eps=2**-10)
        self.calls = 0

    def loss(self) -> float:
        self.calls += 1
        return float(0.5 * (self.curvature * (self.theta - self.target) ** 2).sum())

    @property
    def gradient(self) -> np.ndarray:
        return np.asarray(self.curvature * (self.theta - self.target))


def test_the_estimate_is_z_dot_grad_on_a_quadratic() -> None:
    problem = Quadratic()
    direction = Direction(4, 2)
    expected = float(noise.draw(direction, "theta", SIZE) @ problem.gradient)
    estimate = two_sided(problem.weights, problem.loss, direction, problem.weights.eps)
    assert estimate.projected_grad == pytest.approx(expected, rel=1e-6)
    assert estimate.loss == pytest.approx((estimate.loss_plus + estimate.loss_minus) / 2)


def test_the_loss_is_called_exactly_twice_and_theta_comes_back() -> None:
    problem = Quadratic()
    before = problem.theta.tobytes()
    two_sided(problem.weights, problem.loss, Direction(0, 0), problem.weights.eps)
    problem.weights.flush()
    assert problem.calls == 2
    assert problem.theta.tobytes() == before


@pytest.mark.parametrize("call", [1, 2])
def test_a_loss_that_raises_leaves_theta_as_it_was(call: int) -> None:
    problem = Quadratic()
    before = problem.theta.tobytes()

    def loss() -> float:
        value = problem.loss()
        if problem.calls == call:
            raise RuntimeError("engine out of memory")
        return value

    with pytest.raises(RuntimeError, match="engine out of memory"):
        two_sided(problem.weights, loss, Direction(0, 0), problem.weights.eps)
    assert problem.theta.tobytes() == before
    assert problem.calls == call


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("call", [1, 2])
def test_a_loss_that_is_not_finite_leaves_theta_as_it_was(bad: float, call: int) -> None:
    problem = Quadratic()
    before = problem.theta.tobytes()
    side = "+" if call == 1 else "-"

    def loss() -> float:
        value = problem.loss()
        return bad if problem.calls == call else value

    with pytest.raises(NonFiniteLossError, match=re.escape(f"theta {side} eps z is {bad}; the weights are as before the step")):
        two_sided(problem.weights, loss, Direction(0, 7), problem.weights.eps)
    assert problem.theta.tobytes() == before


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_fifty_steps_lower_a_quadratic(seed: int, distribution: noise.Distribution) -> None:
    problem = Quadratic()
    problem.weights = MutableWeights({"theta": problem.theta}, eps=2**-10, distribution=distribution)
    before = problem.loss()
    for step in range(50):
        direction = Direction(seed, step)
        estimate = two_sided(problem.weights, problem.loss, direction, problem.weights.eps)
        sgd_step(problem.weights, direction, estimate.projected_grad, lr=2e-3)
    problem.weights.flush()
    assert problem.loss() < 0.9 * before


def test_the_same_seed_gives_the_same_steps_and_another_does_not() -> None:
    def run(seed: int) -> bytes:
        problem = Quadratic()
        for step in range(5):
            direction = Direction(seed, step)
            estimate = two_sided(problem.weights, problem.loss, direction, problem.weights.eps)
            sgd_step(problem.weights, direction, estimate.projected_grad, lr=1e-3, weight_decay=0.1)
        problem.weights.flush()
        return problem.theta.tobytes()

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_schedules() -> None:
    assert [schedule_factor("constant", p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [schedule_factor("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert schedule_factor("cosine", 0.5) == pytest.approx(0.5)
    assert schedule_factor("linear", 0.05, warmup=0.1) == pytest.approx(0.5)
    assert schedule_factor("linear", 0.1, warmup=0.1) == 1
    assert schedule_factor("cosine", 1.0, warmup=0.1) == pytest.approx(0)
