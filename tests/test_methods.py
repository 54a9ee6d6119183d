"""One contract for every estimator, rule and sampler, and for all that compose: a new method is a row of a table and nothing here."""

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quadratic import EPS, LAYERS, SHAPES, Quadratic

import edgezo
from edgezo.config import SHARING, TuneConfig, choices_of, make_config
from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import liveness, noise
from edgezo.runtime import passes as passes_module
from edgezo.runtime.check import check_run
from edgezo.runtime.estimators import ESTIMATORS
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import BLOCK, Direction
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.rules import RULES
from edgezo.runtime.rules.rule import DenseRule, ScalarRule
from edgezo.runtime.samplers import SAMPLERS, Tunables, make_sampler
from edgezo.runtime.samplers.layers import LayerSubset
from edgezo.runtime.samplers.outer import Layout, Outer
from edgezo.runtime.weights import MutableWeights

DOCS = Path(__file__).parent.parent / "docs" / "methods.md"
# learning rates for the quadratic, whose curvature is about 1 and whose gradient about 10 long
LR = {
    "sgd": 0.04,
    "normalized": 0.1,
    "sign": 0.25,
    "fzoo": 0.2,
    "meazo": 0.1,
    "momentum": 0.04,
    "adam": 0.1,
    "conservative": 0.08,
    "svrg": 0.03,
}
NOISY = [("full", "rademacher"), ("full", "gaussian"), ("full", "sphere"), *((name, "rademacher") for name in SAMPLERS if name != "full")]


def configure(
    rule: str = "sgd", estimator: str = "two-sided", sampler: str = "full", noise: str = "rademacher", **settings: Any
) -> TuneConfig:
    made = {"directions": 4, "batch": 1, "share": 0.5, "z_rank": 2, "redraw_every": 3, "anchor_every": 3, "anchor_batches": 4, **settings}
    return make_config(None, {"data": "none", "rule": rule, "estimator": estimator, "sampler": sampler, "noise": noise, **made})


def test_every_choice_of_the_settings_is_a_row_of_its_table() -> None:
    assert choices_of("rule") == tuple(RULES) == tuple(LR)
    assert choices_of("estimator") == tuple(ESTIMATORS)
    assert choices_of("sampler") == tuple(SAMPLERS)


def test_every_method_is_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name in (*RULES, *ESTIMATORS, *SAMPLERS, *choices_of("noise")):
        assert f"| `{name}` |" in text, name


# whole steps


@pytest.mark.parametrize(("sampler", "noise"), NOISY)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rule", RULES)
def test_steps_lower_a_quadratic_and_a_replay_gives_their_bits(rule: str, estimator: str, sampler: str, noise: str) -> None:
    config = configure(rule, estimator, sampler, noise, weight_decay=1e-3)
    problem, again = Quadratic(config), Quadratic(config, threads=2)
    before, start = problem.loss(), problem.digest
    problem.run(25, LR[rule])
    assert problem.loss() < (0.8 if sampler == "full" else 0.9) * before
    again.replay(problem.records)
    assert again.digest == problem.digest != start


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_goes_on_from_its_records_is_the_run_that_never_stopped(rule: str, estimator: str) -> None:
    whole, parts = (Quadratic(configure(rule, estimator)) for _ in range(2))
    whole.run(9, LR[rule])
    parts.replay(whole.records[:5])  # in the middle of what svrg keeps
    parts.run(4, LR[rule])
    assert parts.records == whole.records[5:]
    assert parts.digest == whole.digest


@pytest.mark.parametrize(("sampler", "noise"), NOISY)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_scalars_give_the_same_bits_on_any_threads_in_any_pieces(
    rule: str, sampler: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"layers.0.w": (300, 500), "layers.1.w": (7, BLOCK // 5), "norm": (40,)}
    random = np.random.default_rng(0)
    records = [(np.float32(random.standard_normal(3) * 10).tolist(), 1e-3) for _ in range(5)]
    digests = set()
    for threads, run_blocks in ((1, 16), (2, 1), (3, 2)):
        monkeypatch.setattr(passes_module, "RUN_BLOCKS", run_blocks)
        problem = Quadratic(configure(rule, sampler=sampler, noise=noise, directions=3), threads, shapes)
        problem.replay(records)
        digests.add(problem.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("rule", RULES)
def test_a_learning_rate_scales_the_first_step(rule: str) -> None:
    moved = {}
    for lr in (0.0, 1e-3, 2e-3):
        problem = Quadratic(configure(rule))
        before = problem.theta
        problem.replay([([3.0, -4.0, 0.5, 1.0], lr)])
        moved[lr] = problem.theta - before
    assert not moved[0.0].any()
    assert np.abs(moved[1e-3]).max() > 1e-5
    assert moved[2e-3] == pytest.approx(2 * moved[1e-3], abs=1e-6)


@pytest.mark.parametrize("fault", ["raise", "nan"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rule", RULES)
def test_a_failing_loss_leaves_theta_as_it_was(rule: str, estimator: str, fault: str) -> None:
    """At every call of the loss, in the first step and in one after it."""
    for done in (0, 1):
        counted = Quadratic(configure(rule, estimator, directions=2))
        counted.run(done, LR[rule])
        counted.calls = 0
        counted.measure(LR[rule])
        for call in range(1, counted.calls + 1):
            problem = Quadratic(configure(rule, estimator, directions=2), threads=1)
            problem.run(done, LR[rule])
            before = problem.digest
            problem.calls, problem.fails_at, problem.fault = 0, call, fault
            if fault == "nan" and rule == "conservative" and call > counted.calls - 3:
                problem.measure(LR[rule])  # a trial that is not finite is not chosen
            else:
                with pytest.raises((RuntimeError, NonFiniteLossError), match=r"engine out of memory|step \d: the loss at theta.* is nan"):
                    problem.measure(LR[rule])
            problem.weights.flush()
            assert problem.digest == before, call
    assert counted.calls >= ESTIMATORS[estimator].forwards(2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_costs_the_forwards_it_says(estimator: str) -> None:
    problem = Quadratic(configure(estimator=estimator, directions=5))
    problem.run(1, 0.01)
    assert problem.calls == ESTIMATORS[estimator].forwards(5) == {"two-sided": 10, "one-sided": 6, "curvature": 11}[estimator]


# estimators


@pytest.mark.parametrize("name", ["two-sided", "one-sided"])
def test_an_estimate_is_unbiased_over_all_signs(name: str) -> None:
    """Exactly, on a quadratic: the mean of g z over all 2^6 sign vectors is the gradient."""
    random = np.random.default_rng(0)
    gradient, root = random.standard_normal(6), random.standard_normal((6, 6))
    estimator, eps = ESTIMATORS[name], 0.25
    z = np.array(list(itertools.product((1.0, -1.0), repeat=6)))
    losses = np.array([[eps * side * (row @ gradient) + 0.5 * eps**2 * ((root @ row) ** 2).sum() for side in estimator.sides] for row in z])
    directions = [Direction(0, 0, number) for number in range(len(z))]
    grads = np.array([estimate.projected_grad for estimate in estimator.estimates(losses, 0.0, directions, eps)])
    assert (grads @ z) / len(z) == pytest.approx(gradient)


def test_curvature_weighs_a_direction_down_where_the_loss_curves() -> None:
    estimator, eps = ESTIMATORS["curvature"], 0.5
    losses = np.array([[1 + eps * 3 + 0.5 * eps**2 * c, 1 - eps * 3 + 0.5 * eps**2 * c] for c in (0.0, 0.5, 1024.0, -1024.0)])
    directions = [Direction(0, 0, number) for number in range(4)]
    found = [estimate.projected_grad for estimate in estimator.estimates(losses, 1.0, directions, eps)]
    assert found == pytest.approx([3, 3, 3 / 2, 3 / 2])  # 1024^0.1 = 2


# rules


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
    problem.replay([(grads.tolist(), problem.rule.rate(3e-3, rms, 16))])
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


def test_one_direction_has_no_spread() -> None:
    with pytest.raises(ConfigError) as caught:
        configure("fzoo", directions=1)
    assert str(caught.value) == "--rule fzoo: divides by the spread over the directions, and there is one; give --directions 2 or more"


# samplers


@pytest.mark.parametrize(("sampler", "noise"), NOISY)
def test_the_second_moment_of_z_is_the_identity_where_it_moves(sampler: str, noise: str) -> None:
    shapes = {"layers.0.w": (2, 3), "layers.1.w": (3, 2), "norm": (2,)}
    config = configure(sampler=sampler, noise=noise, redraw_every=1)
    problem, count = Quadratic(config, shapes=shapes), 2500
    second, moves = np.zeros((14, 14)), np.zeros(14)
    for step in range(count):
        direction = Direction(step if sampler == "tezo" else 0, step)  # factors of a run are fixed
        z = np.concatenate([problem.weights.sampler.draw(direction, name, array.size) for name, array in problem.arrays.items()])
        own = [problem.weights.sampler.moves(name, direction) for name, array in problem.arrays.items() for _ in range(array.size)]
        assert not z[~np.array(own)].any()
        assert np.abs(z).max() <= problem.weights.sampler.largest + 1e-6
        second += np.outer(z, z)
        moves += z != 0
    mask = np.ones(14) if sampler != "magnitude" else (moves > 0).astype(float)
    expected = {"layers": np.diag([0.5] * 12 + [1, 1]), "magnitude": np.diag(mask)}.get(sampler, np.eye(14))
    assert np.abs(second / count - expected).max() < 0.16
    assert mask.sum() == (7 if sampler == "magnitude" else 14)


def test_the_sphere_is_one() -> None:
    sampler = make_sampler(configure(noise="sphere"), Tunables(SHAPES, {}, Quadratic(configure()).arrays))
    for step in range(20):
        z = np.concatenate([sampler.draw(Direction(0, step), name, int(np.prod(shape))) for name, shape in SHAPES.items()])
        assert np.linalg.norm(z) == pytest.approx(len(z) ** 0.5, rel=1e-6)


def test_a_step_moves_its_share_of_the_layers_and_in_the_end_all() -> None:
    subset = LayerSubset({f"layers.{number}.w": number for number in range(10)} | {"norm": None}, 0.25)
    seen = [{layer for layer in range(10) if subset.holds(f"layers.{layer}.w", Direction(3, step, 1))} for step in range(60)]
    assert {len(layers) for layers in seen} == {3}
    assert set.union(*seen) == set(range(10))
    assert subset.holds("norm", Direction(3, 0))
    assert all(subset.chosen(3, step) == layers for step, layers in enumerate(seen)), "one subset for all directions of a step"


def test_the_mask_is_of_the_smallest_weights_at_the_start() -> None:
    problem = Quadratic(configure(sampler="magnitude", share=0.25))
    start = {name: array.copy() for name, array in problem.arrays.items()}
    problem.run(3, 0.04)
    for name, array in problem.arrays.items():
        sizes, changed = np.abs(start[name]).reshape(-1), (array != start[name]).reshape(-1)
        assert changed.sum() == np.ceil(0.25 * sizes.size)
        assert sizes[changed].max() < sizes[~changed].min()


@pytest.mark.parametrize(("sampler", "rank"), [("lozo", 2), ("subzero", 2), ("tezo", 2)])
def test_directions_of_low_rank_have_it_and_keep_what_they_say(sampler: str, rank: int) -> None:
    made = make_sampler(configure(sampler=sampler, redraw_every=4), Tunables({"w": (9, 8)}, {}, {}))
    drawn = [made.draw(Direction(0, step), "w", 72).reshape(9, 8) for step in range(8)]
    assert {np.linalg.matrix_rank(z, tol=1e-3) for z in drawn} <= {1, rank}  # signs may repeat
    spans = [np.linalg.matrix_rank(np.concatenate(drawn[first : first + 4]), tol=1e-3) for first in (0, 4)]
    assert spans == [rank, rank], "rows of four steps lie in one space"
    both = np.linalg.matrix_rank(np.concatenate(drawn), tol=1e-3)
    assert both == (rank if sampler == "tezo" else 2 * rank)


@pytest.mark.parametrize("sampler", ["lozo", "subzero", "tezo"])
def test_factors_are_the_documented_streams(sampler: str) -> None:
    made = make_sampler(configure(sampler=sampler, redraw_every=4, z_rank=3), Tunables({"w": (9, 8)}, {}, {}))

    def factor(domain: int, step: int, rows: int, columns: int) -> np.ndarray:
        return noise.signs(Direction(5, step, 1), noise.tensor_id("w"), rows * columns, domain).reshape(rows, columns).astype(np.float64)

    u = {"lozo": factor(noise.LEFT, 6, 9, 3), "subzero": factor(noise.LEFT, 4, 9, 3), "tezo": factor(noise.LEFT, 0, 9, 3)}[sampler]
    v = factor(noise.RIGHT, 0 if sampler == "tezo" else 4, 3, 8)
    core = {"lozo": np.eye(3), "subzero": factor(noise.CORE, 6, 3, 3), "tezo": np.diag(factor(noise.CORE, 6, 1, 3)[0])}[sampler]
    scale = 3 if sampler == "subzero" else 3**0.5
    assert made.draw(Direction(5, 6, 1), "w", 72).reshape(9, 8) == pytest.approx(u @ core @ v / scale, abs=1e-5)


def test_layers_of_lora_that_rest_have_no_signs() -> None:
    layout, modules = Layout([2, 2, 2, 2], [3, 3, 5, 5]), ["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"]
    subset = LayerSubset({"layers.0.a": 0, "layers.0.b": 0, "layers.1.a": 1, "layers.1.b": 1}, 0.5)
    outer, whole = Outer({"lora_B": layout}, modules, subset), Outer({"lora_B": layout})
    for step in range(6):
        directions = [Direction(0, step, number) for number in range(3)]
        rows, columns = outer.signs(directions, "lora_B")
        own = np.repeat([layer in subset.chosen(0, step) for layer in (0, 1)], 4)
        assert np.array_equal(rows, whole.signs(directions, "lora_B")[0] * own)
        assert np.array_equal(columns, whole.signs(directions, "lora_B")[1])
        z = outer.draw(directions[0], "lora_B", 32)
        assert np.array_equal(z != 0, np.repeat(own[[0, 4]], [12, 20]))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("layers", "--sampler layers: none of the tunable tensors belongs to a layer; leave it out"),
        ("lozo", "--sampler lozo: none of the tunable tensors is a matrix; leave it out"),
    ],
)
def test_a_sampler_with_nothing_to_move_is_refused(sampler: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_sampler(configure(sampler=sampler), Tunables({"norm": (4,)}, {"norm": None}, {}))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "gaussian", "sampler": "lozo"}, "--noise gaussian: the factors of --sampler lozo are signs; leave --noise out"),
        ({"noise": "sphere", "sampler": "layers"}, "--noise sphere: is of all weights, --sampler layers moves some; leave one of them out"),
    ],
)
def test_noise_and_sampler_that_do_not_compose_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(**settings)
    assert str(caught.value) == message


# the bits, for ever: they are docs/noise.md and docs/journal.md as of noise version 1

BITS = {
    "sgd full rademacher": "6c10731b21ea9318",
    "normalized full rademacher": "cd1b51be44653b88",
    "sign full rademacher": "356588ba11dc5b99",
    "fzoo full rademacher": "3f1b8dbdce667254",
    "meazo full rademacher": "f06b4e7864b7f03e",
    "momentum full rademacher": "46bde18c57285ca5",
    "adam full rademacher": "6d9d734007e20cf1",
    "conservative full rademacher": "6c10731b21ea9318",
    "svrg full rademacher": "050c6d6fbb809ad3",
    "sgd full gaussian": "7861fbcb8cd40e7b",
    "sgd full sphere": "c2193db228e79a0e",
    "sgd layers rademacher": "471ab44c185c2358",
    "sgd magnitude rademacher": "5681194ee35170e0",
    "sgd lozo rademacher": "b96264821d103be2",
    "sgd subzero rademacher": "9b23300a1fb72740",
    "sgd tezo rademacher": "731cb74249d0f2ba",
}


def bits_of(rule: str, sampler: str, noise: str) -> str:
    """SHA-256 of what three steps make of known values."""
    shapes = {"layers.0.w": (30, 50), "layers.1.w": (50, 20), "norm": (40,)}
    problem = Quadratic(configure(rule, sampler=sampler, noise=noise, directions=3, redraw_every=2, seed=7), shapes=shapes)
    arrays = {name: np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    sampler_made = make_sampler(problem.config, Tunables(shapes, LAYERS, arrays))
    weights = MutableWeights(arrays, eps=EPS, sampler=sampler_made)
    for step, grads in enumerate(([1.5, -2.0, 0.25], [0.5, 3.0, -1.0], [-0.125, 0.75, 2.0])):
        zo_step(weights, [Direction(7, step, number) for number in range(3)], grads, 2.0**-6, problem.rule, 0.125)
    weights.flush()
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()[:16]


@pytest.mark.parametrize(
    ("rule", "sampler", "noise"), [*((rule, "full", "rademacher") for rule in RULES), *(("sgd", *pair) for pair in NOISY[1:])]
)
def test_three_steps_give_the_same_bits_for_ever(rule: str, sampler: str, noise: str) -> None:
    assert bits_of(rule, sampler, noise) == BITS[f"{rule} {sampler} {noise}"]


# runs

TUNING: dict[str, Any] = {
    "start": "none",
    "template": "{text} It was",
    "labels": "terrible,great",
    "schedule": "constant",
    "eval_every": 3,
    "threads": 1,
}
LORA = {"eps": 1e-2, "lr": 1e-2, "directions": 4, "batch": 1}
FULL = {"eps": 1e-3, "lr": 1e-4, "directions": 2, "batch": 2}
RUNS = [
    *(("lora_dir", {**LORA, "rule": rule}) for rule in RULES),
    *(("lora_dir", {**LORA, "rule": "fzoo", "estimator": estimator, "batch": 3}) for estimator in ESTIMATORS),
    ("lora_dir", {**LORA, "sampler": "layers", "tune_a": True, "share": 0.5}),
    ("prefix_dir", {**LORA, "rule": "adam", "noise": "sphere"}),
    ("prefix_dir", {**LORA, "rule": "svrg", "sampler": "magnitude", "estimator": "one-sided"}),
    *(("exported_dir", {**FULL, "rule": rule}) for rule in ("meazo", "momentum", "adam", "conservative", "svrg")),
    *(("exported_dir", {**FULL, "estimator": estimator}) for estimator in ("one-sided", "curvature")),
    *(("exported_dir", {**FULL, "sampler": sampler, "noise": noise, "rule": "momentum"}) for sampler, noise in NOISY[2:]),
]


@pytest.mark.parametrize(
    ("edge", "settings"), RUNS, ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value
)
def test_a_run_is_its_journal(request: pytest.FixtureRequest, edge: str, settings: dict[str, Any], reviews: str, tmp_path: Path) -> None:
    """Stopped and resumed it is the run that never stopped, and forward passes at the replayed weights give its scalars again."""
    directory, extra = request.getfixturevalue(edge), {"anchor_every": 2, "anchor_batches": 2, "redraw_every": 2, **TUNING, **settings}
    for name, stops in (("whole", (7,)), ("parts", (3, 7))):
        for number, steps in enumerate(stops):
            given = {"steps": steps, "threads": 1}
            edgezo.tune(directory, tmp_path / name, **(given if number else {**extra, **given, "data": reviews}), resume=bool(number))
    whole, parts = (EdgeModel(directory, run=tmp_path / name, step="last", threads=2) for name in ("whole", "parts"))
    arrays = [[*model.weights.values(), *([model.adapter.a, model.adapter.b] if edge == "lora_dir" else [])] for model in (whole, parts)]  # type: ignore[union-attr]
    start = EdgeModel(directory, run=tmp_path / "whole", step=0, threads=1)
    moved = [start.adapter.b] if edge == "lora_dir" else start.weights.values()  # type: ignore[union-attr]
    assert all(np.array_equal(one, other) for one, other in zip(*arrays, strict=True))
    assert not all(
        np.array_equal(one, other) for one, other in zip(moved, arrays[0][-1:] if edge == "lora_dir" else arrays[0], strict=True)
    )
    findings = check_run(tmp_path / "whole", EdgeModel(directory, threads=1), every=1)
    assert (findings.problems, findings.derived) == ([], 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "magnitude"}, "--sampler magnitude: LoRA's B begins at zero; give --sampler layers, or leave it out"),
        ({"sampler": "tezo"}, "--sampler tezo: directions of LoRA are of rank one already; give --sampler layers, or leave it out"),
        ({"noise": "sphere"}, "--noise sphere: directions of LoRA are outer products of signs; leave it out"),
    ],
)
def test_samplers_that_lora_has_no_use_for_are_refused(
    lora_dir: Path, reviews: str, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=1, **TUNING, **settings)
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_a_prefix_has_neither_layers_nor_matrices(prefix_dir: Path, reviews: str, tmp_path: Path) -> None:
    for sampler, what in (("layers", "belongs to a layer"), ("lozo", "is a matrix")):
        with pytest.raises(ConfigError) as caught:
            edgezo.tune(prefix_dir, tmp_path / "run", data=reviews, steps=1, sampler=sampler, **TUNING)
        assert str(caught.value) == f"--sampler {sampler}: none of the tunable tensors {what}; leave it out"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_proof_that_tensors_are_live_moves_all_of_them(sampler: str) -> None:
    problem = Quadratic(configure(sampler=sampler, share=0.01))
    before = {name: array.copy() for name, array in problem.arrays.items()}
    with liveness._perturbed(problem.weights):
        assert all((array != before[name]).all() for name, array in problem.arrays.items())
    assert all(np.array_equal(array, before[name]) for name, array in problem.arrays.items())


def test_eps_of_the_quadratic_is_on_every_grid() -> None:
    assert Quadratic(configure()).weights.eps == EPS


def test_the_configuration_knows_which_estimators_share_rows() -> None:
    assert set(SHARING) == {name for name, estimator in ESTIMATORS.items() if estimator.shared}
