"""The two-sided estimator: exact on quadratics, two losses, no trace left, whatever fails."""

import math
import re

import numpy as np
import pytest

from edgezo.errors import NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.estimators.two_sided import two_sided
from edgezo.runtime.noise import Direction
from edgezo.runtime.optimizer import schedule_factor, zo_step
from edgezo.runtime.rules.normalized import Normalized
from edgezo.runtime.rules.rule import Rule
from edgezo.runtime.rules.sgd import Sgd
from edgezo.runtime.samplers.full import Full
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
    problem.weights = MutableWeights({"theta": problem.theta}, eps=2**-10, sampler=Full(distribution))
    before = problem.loss()
    for step in range(50):
        direction = Direction(seed, step)
        estimate = two_sided(problem.weights, problem.loss, direction, problem.weights.eps)
        zo_step(problem.weights, [direction], [estimate.projected_grad], lr=2e-3)
    problem.weights.flush()
    assert problem.loss() < 0.9 * before


def test_the_same_seed_gives_the_same_steps_and_another_does_not() -> None:
    def run(seed: int) -> bytes:
        problem = Quadratic()
        for step in range(5):
            direction = Direction(seed, step)
            estimate = two_sided(problem.weights, problem.loss, direction, problem.weights.eps)
            zo_step(problem.weights, [direction], [estimate.projected_grad], lr=1e-3, weight_decay=0.1)
        problem.weights.flush()
        return problem.theta.tobytes()

    assert run(0) == run(0)
    assert run(0) != run(1)


NUMBERS = [0.7, -3.1e4, 2e-6, -55.0]  # projected gradients of four directions


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_a_step_along_several_directions_is_the_sum_of_steps_along_each(distribution: noise.Distribution) -> None:
    directions = [Direction(2, 5, number) for number in range(len(NUMBERS))]

    def run(steps: list[tuple[list[Direction], list[float]]], lr: float) -> bytes:
        theta = np.linspace(-1, 1, 1000, dtype=np.float32).reshape(10, 100)
        weights = MutableWeights({"theta": theta}, eps=2**-10, sampler=Full(distribution))
        before = theta.tobytes()
        for along, grads in steps:
            zo_step(weights, along, grads, lr)
        weights.flush()
        assert theta.tobytes() != before
        return theta.tobytes()

    together = run([(directions, NUMBERS)], 2e-6)
    pairs = list(zip(directions, NUMBERS, strict=True))
    assert run([([direction], [grad]) for direction, grad in pairs], 2e-6 / 4) == together
    assert run([([direction], [grad]) for direction, grad in reversed(pairs)], 2e-6 / 4) == together


def moved(grads: list[float], lr: float = 3e-3, rule: Rule | None = None) -> np.ndarray:
    """How far a step moves each of 50,000 weights."""
    theta = np.random.default_rng(0).uniform(-0.5, 0.5, 50_000).astype(np.float32)
    weights = MutableWeights({"theta": theta}, eps=2**-10)
    before = theta.astype(np.float64)
    zo_step(weights, [Direction(1, 9, number) for number in range(len(grads))], grads, lr, rule or Normalized())
    weights.flush()
    return np.asarray(theta - before)


@pytest.mark.parametrize("grads", [[5.0], [-1e-30], NUMBERS, [1.0] * 16])
def test_a_normalized_step_has_root_mean_square_lr(grads: list[float]) -> None:
    change = moved(grads)
    assert np.sqrt((change**2).mean()) == pytest.approx(3e-3, rel=0.02)  # 16 directions are orthogonal up to 1 / sqrt(50,000)
    assert np.array_equal(moved([grad * 2**40 for grad in grads]), change), "the scale of the loss does not matter"
    assert np.sqrt((moved(grads, rule=Sgd()) ** 2).mean()) != pytest.approx(3e-3, rel=0.02)


def test_a_normalized_step_is_the_sum_of_directions_by_their_projected_gradients() -> None:
    expected = sum(-3e-3 * grad / 5 * noise.draw(Direction(1, 9, number), "theta", 50_000) for number, grad in enumerate([3.0, -4.0]))
    assert moved([3.0, -4.0]) == pytest.approx(expected, abs=2**-22)


def test_a_normalized_step_without_any_slope_moves_nothing() -> None:
    assert not moved([0.0, -0.0, 0.0]).any()


def test_schedules() -> None:
    assert [schedule_factor("constant", p) for p in (0, 0.5, 1)] == [1, 1, 1]
    assert [schedule_factor("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert schedule_factor("cosine", 0.5) == pytest.approx(0.5)
    assert schedule_factor("linear", 0.05, warmup=0.1) == pytest.approx(0.5)
    assert schedule_factor("linear", 0.1, warmup=0.1) == 1
    assert schedule_factor("cosine", 1.0, warmup=0.1) == pytest.approx(0)
