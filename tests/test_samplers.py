"""What each sampler draws: whom it moves, by how much, in which spaces, and with what it does not compose."""

import numpy as np
import pytest
from quadratic import NOISY, SHAPES, Quadratic, configure

from edgezo.errors import ConfigError
from edgezo.runtime import liveness, noise
from edgezo.runtime.noise import Direction
from edgezo.runtime.samplers import SAMPLERS, Tunables, make_sampler
from edgezo.runtime.samplers.layers import LayerSubset
from edgezo.runtime.samplers.outer import Layout, Outer


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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_proof_that_tensors_are_live_moves_all_of_them(sampler: str) -> None:
    problem = Quadratic(configure(sampler=sampler, share=0.01))
    before = {name: array.copy() for name, array in problem.arrays.items()}
    with liveness._perturbed(problem.weights):
        assert all((array != before[name]).all() for name, array in problem.arrays.items())
    assert all(np.array_equal(array, before[name]) for name, array in problem.arrays.items())
