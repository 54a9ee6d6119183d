"""What each rule makes of projected gradients: its factors, its averages, its lengths, and what it keeps."""

import numpy as np
import pytest
from quadratic import Quadratic, configure, scalars

from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime.noise import Direction
from edgezo.runtime.rules import RULES
from edgezo.runtime.rules.hizoo import Hizoo
from edgezo.runtime.rules.rule import DenseRule, ScalarRule


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sgd", [-0.1 / 3, 0.2 / 3, -0.1]),
        ("normalized", [-0.1 / 14**0.5, 0.2 / 14**0.5, -0.3 / 14**0.5]),
        ("sign", [-0.1 / 3, 0.1 / 3, -0.1 / 3]),
        ("fzoo", [-0.05 / (19 / 3) ** 0.5 * factor for factor in (2 / 3, -4 / 3, 2)]),
        ("meazo", [-0.1 / 14**0.5, 0.2 / 14**0.5, -0.3 / 14**0.5]),
    ],
)
def test_the_factors_of_a_rule(rule: str, expected: list[float]) -> None:
    made = RULES[rule](configure(), {})
    assert isinstance(made, ScalarRule)
    assert made.scales([1.0, -2.0, 3.0], 0.1) == pytest.approx(expected)
    assert not any(made.scales([0.0, -0.0, 0.0], 0.1))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "momentum"])
def test_steps_at_the_rate_for_a_move_have_its_length(rule: str) -> None:
    problem = Quadratic(configure(rule, directions=16), shapes={"layers.0.w": (200, 300)})
    before, grads = problem.theta, np.float32(5 * np.random.default_rng(0).standard_normal(16))
    rms = float(np.sqrt(np.mean(grads**2)))
    problem.replay([(scalars(rule, grads.tolist()), problem.rule.rate(3e-3, rms, 16))])
    assert np.sqrt(np.mean((problem.theta - before) ** 2)) == pytest.approx(3e-3, rel=0.05)


def test_meazo_follows_the_size_of_the_gradients() -> None:
    made = RULES["meazo"](configure(beta_v=0.5), {})
    assert isinstance(made, ScalarRule)
    assert made.scales([2.0], 1.0) == pytest.approx([-1.0])
    assert made.scales([8.0], 1.0) == pytest.approx([-8 / ((0.25 * 4 + 0.5 * 64) / 0.75) ** 0.5])


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_averages_follow_a_float64_reference(rule: str) -> None:
    problem = Quadratic(configure(rule, beta_m=0.5, beta_v=0.75))
    expected, m, v = problem.theta, np.zeros(problem.size), np.zeros(problem.size)
    random, names = np.random.default_rng(3), list(problem.arrays)
    for step in range(1, 7):
        grads, directions = np.float32(random.standard_normal(4)).tolist(), problem.directions()
        z = [np.concatenate([problem.weights.sampler.draw(d, name, problem.arrays[name].size) for name in names]) for d in directions]
        gradient = sum(grad * row for grad, row in zip(grads, z, strict=True)) / 4
        m, v = 0.5 * m + 0.5 * gradient, 0.75 * v + 0.25 * gradient**2
        adam = m / (1 - 0.5**step) / (np.sqrt(v / (1 - 0.75**step)) + 1e-8)
        expected = expected - 0.01 * (m if rule == "momentum" else adam)
        problem.replay([(grads, 0.01)])
        assert problem.theta == pytest.approx(expected, abs=step * 4e-7)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_averages_take_the_memory_that_is_told(rule: str) -> None:
    made = RULES[rule](configure(), {"w": 1000, "norm": 24})
    assert isinstance(made, DenseRule)
    assert made.state_bytes == sum(array.nbytes for moment in made.moments for array in moment.values()) == 4096 * len(made.moments)


def test_updates_far_below_the_grid_are_right_on_average() -> None:
    problem = Quadratic(configure("momentum", beta_m=0.0, directions=1))
    (first, *_), start = problem.weights.tensors, problem.theta
    lr, expected = 0.2 * first.quantum, np.zeros(problem.size)
    for step in range(2000):
        z = problem.weights.sampler.draw(Direction(0, step), first.name, first.size)
        expected[: first.size] -= 0.2 * z[0] * z
        problem.replay([([float(z[0])], lr)])
    moved = (problem.theta - start)[: first.size] / first.quantum
    assert expected[0] == pytest.approx(-400)
    assert np.abs(moved - expected[: first.size]).max() < 5 * np.sqrt(0.2 * 0.8 * 2000)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_weights_that_outgrow_their_grid_get_a_coarser_one_and_in_the_end_are_refused(rule: str) -> None:
    problem = Quadratic(configure(rule))
    before = [tensor.exponent for tensor in problem.weights.tensors]
    problem.replay([([5.0, 5.0, 5.0, 5.0], 1.0)] * 5)
    assert max(tensor.exponent for tensor in problem.weights.tensors) > max(before)
    with pytest.raises(NonFiniteLossError, match=r"the weights grew too large|holds NaN or infinity"):
        problem.replay([([5.0, 5.0, 5.0, 5.0], 1e30)] * 3)


def test_conservative_never_raises_the_loss_of_its_rows() -> None:
    problem = Quadratic(configure("conservative", directions=2))
    choices = set()
    for lr in (0.05, 0.35) * 20:
        before, rows = problem.loss(problem.rows()), problem.rows()
        plain = [estimate.projected_grad for estimate in problem.estimates()]
        problem.weights.flush()
        grads = problem.measure(lr)
        choices.add(round(grads[0] / plain[0]))
        problem.apply(grads, lr)
        problem.weights.flush()
        assert problem.loss(rows) <= before + 1e-6
    assert choices == {0, 1}  # on a quadratic a step back never helps


def test_svrg_moves_by_the_difference_to_the_kept_theta_and_its_gradient() -> None:
    problem = Quadratic(configure("svrg", directions=2, anchor_every=3, anchor_batches=5))
    kept = problem.theta
    problem.run(2, 0.02)
    assert problem.calls == 2 * 2 + 2 * 2 * 2
    problem.now = 1
    directions = problem.directions()
    z = [np.concatenate([problem.weights.sampler.draw(d, n, a.size) for n, a in problem.arrays.items()]) for d in directions]
    anchor_grads, differences = (np.array(grads) for grads, _ in problem.records)
    after = kept - 0.01 * sum(
        g * np.concatenate([problem.weights.sampler.draw(Direction(0, 0, q), n, a.size) for n, a in problem.arrays.items()])
        for q, g in enumerate(anchor_grads)
    )
    # of a quadratic: (g(theta) - g(theta')) = z . H (theta - theta'), whatever the rows
    assert differences == pytest.approx([row @ (problem.curvature * (after - kept)) for row in z], abs=1e-3)
    expected = after - 0.01 * sum(g * row for g, row in zip(differences, z, strict=True)) + (after - kept)
    assert problem.theta == pytest.approx(expected, abs=1e-6)


def test_hizoo_follows_a_float64_reference() -> None:
    problem = Quadratic(configure("hizoo", noise="gaussian", hessian_smooth=0.25))
    expected, h, random = problem.theta, np.ones(problem.size), np.random.default_rng(3)
    for step in range(1, 7):
        grads, curvatures = np.float32(random.standard_normal((2, 4)) * [[1], [4]])
        for direction, grad, curvature in zip(problem.directions(), grads, curvatures, strict=True):
            z = np.concatenate([problem.weights.sampler.draw(direction, name, array.size) for name, array in problem.arrays.items()])
            h = np.maximum(0.75 * h + 0.25 * abs(curvature) / 2 * z**2, 0.01)
            expected = expected - 0.01 / 4 * grad * z / h
        problem.replay([([*grads.tolist(), *curvatures.tolist()], 0.01)])
        assert problem.theta == pytest.approx(expected, rel=1e-5, abs=step * 4e-6)


def test_hizoo_finds_the_diagonal_of_a_hessian() -> None:
    problem = Quadratic(configure("hizoo", noise="gaussian", hessian_smooth=5e-4), shapes={"layers.0.w": (1, 4)})
    problem.run(3000, 1e-9)
    assert isinstance(problem.rule, Hizoo)
    found = problem.rule.h["layers.0.w"]
    assert found == pytest.approx(problem.curvature.sum() / 2 + problem.curvature, abs=0.15)  # 2.94 to 4.03


def test_hizoo_takes_the_weights_of_its_estimator_off() -> None:
    problem = Quadratic(configure("hizoo", noise="gaussian", directions=1))
    z = np.concatenate([problem.weights.sampler.draw(Direction(0, 0, 0), name, array.size) for name, array in problem.arrays.items()])
    (weighed,) = (estimate.projected_grad for estimate in problem.estimates())
    grad, curvature = problem.measure(0.01)
    assert curvature == pytest.approx(z @ (problem.curvature * z), rel=1e-3)
    assert grad == pytest.approx(weighed * curvature**0.1)
    assert abs(grad) > 1.3 * abs(weighed)


def test_hizoo_keeps_its_average_above_zero_where_nothing_curves() -> None:
    """By signs, so that every weight moves as far; the first direction of a step alone has a gradient."""
    flat, moves = [1.0, 0.0, 0.0, 0.0] + [0.0] * 4, []
    problem = Quadratic(configure("hizoo", hessian_smooth=0.5))
    for lr in (4e-4, *[0.0] * 8, 4e-4):
        before = problem.theta
        problem.replay([(flat, lr)])
        moves.append(np.abs(problem.theta - before))
    assert moves[0] == pytest.approx(2e-4, abs=1e-6)
    assert moves[-1] == pytest.approx(1e-2, abs=1e-6)


def test_hizoo_takes_curvatures_from_an_estimator_that_has_them() -> None:
    assert RULES["hizoo"](configure("hizoo"), {"w": 1000, "norm": 24}).state_bytes == 4096
    with pytest.raises(ConfigError) as caught:
        configure("hizoo", "two-sided")
    assert str(caught.value) == "--rule hizoo: takes the curvature along every direction; give --estimator curvature"


def test_one_direction_has_no_spread() -> None:
    with pytest.raises(ConfigError) as caught:
        configure("fzoo", directions=1)
    assert str(caught.value) == "--rule fzoo: divides by the spread over the directions, and there is one; give --directions 2 or more"
