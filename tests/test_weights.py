"""Weights change in place, exactly, whatever the order, the threads and the pieces."""

import numpy as np
import pytest

from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime import passes as passes_module
from edgezo.runtime.noise import BLOCK, Direction, Distribution, Floats
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.weights import MutableWeights

DISTRIBUTIONS: tuple[Distribution, ...] = ("rademacher", "gaussian")


def make_tensors(seed: int = 0) -> dict[str, Floats]:
    """Tensors of several scales; one spans more than two blocks."""
    random = np.random.default_rng(seed)
    return {
        "wide": (random.standard_normal((3, BLOCK - 7)) * 0.02).astype(np.float32),
        "norm": (1 + random.standard_normal(64)).astype(np.float32),
        "outlier": np.array([[250.0, -3e-3], [1e-9, 0.0]], np.float32),
    }


def snapshot(tensors: dict[str, Floats]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_walk_of_a_step_leaves_no_trace(distribution: Distribution) -> None:
    tensors = make_tensors()
    weights = MutableWeights(tensors, eps=1e-3, sampler=Full(distribution), threads=2)
    before = snapshot(tensors)
    for step in range(5):
        for times in (1, -2, 1):
            weights.add(Direction(3, step), weights.eps, times)
            weights.flush()
            assert times == 1 or snapshot(tensors) != before
    assert snapshot(tensors) == before


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_addition_is_noise_times_scale_on_the_grid(distribution: Distribution) -> None:
    tensors = make_tensors()
    weights = MutableWeights(tensors, eps=1e-3, sampler=Full(distribution))
    quanta = {tensor.name: tensor.quantum for tensor in weights.tensors}
    before = {name: array.astype(np.float64) for name, array in tensors.items()}
    direction = Direction(1, 2, 3)
    weights.add(direction, 0.01)
    weights.flush()
    for name, array in tensors.items():
        z = noise.draw(direction, name, array.size, distribution).reshape(array.shape)
        assert np.abs(array - (before[name] + 0.01 * z)).max() <= quanta[name]
        assert np.array_equal(np.rint(array / quanta[name]), array / quanta[name])


def test_rounding_to_the_grid_moves_a_weight_by_at_most_half_a_quantum() -> None:
    tensors = make_tensors()
    before = {name: array.astype(np.float64) for name, array in tensors.items()}
    weights = MutableWeights(tensors, eps=1e-3)
    for tensor in weights.tensors:
        assert np.abs(tensors[tensor.name] - before[tensor.name]).max() <= tensor.quantum / 2
        assert tensor.quantum <= 2.0**-22 * max(np.abs(before[tensor.name]).max(), 1e-2)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_threads_pieces_and_order_do_not_matter(distribution: Distribution, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(threads: int, run_blocks: int, flush_each: bool, reverse: bool) -> dict[str, bytes]:
        monkeypatch.setattr(passes_module, "RUN_BLOCKS", run_blocks)
        tensors = make_tensors()
        weights = MutableWeights(tensors, eps=1e-3, sampler=Full(distribution), threads=threads)
        additions = [(Direction(9, step, number), 1e-4 * (step + 1)) for step in range(3) for number in range(2)]
        for direction, scale in reversed(additions) if reverse else additions:
            weights.add(direction, scale)
            if flush_each:
                weights.flush()
        weights.flush()
        return snapshot(tensors)

    expected = run(1, 16, True, False)
    assert run(2, 16, False, False) == expected
    assert run(3, 1, False, True) == expected
    assert run(1, 2, True, True) == expected


def test_opposite_additions_cancel_before_any_pass() -> None:
    tensors = make_tensors()
    weights = MutableWeights(tensors, eps=1e-3)
    weights.add(Direction(0, 0), 0.5)
    weights.add(Direction(0, 0), 0.5, -1)
    assert not weights._pending


def test_small_updates_are_rounded_without_bias() -> None:
    """Updates of a fifth of the grid, signed so that the first element always goes up: it rises by a fifth of the grid a step."""
    tensors = {"outlier": np.array([250.0, 3.0, -7.0, 0.0], np.float32)}
    weights = MutableWeights(tensors, eps=1e-3)
    (tensor,) = weights.tensors
    start = tensors["outlier"].astype(np.float64)
    expected = np.zeros(4)
    steps = 2000
    for step in range(steps):
        z = noise.draw(Direction(0, step), "outlier", 4)
        weights.update([Direction(0, step)], [0.2 * z[0] * tensor.quantum])
        expected += 0.2 * z[0] * z
    weights.flush()
    assert expected[0] == pytest.approx(0.2 * steps)
    moved = (tensors["outlier"] - start) / tensor.quantum
    assert np.abs(moved - expected).max() < 5 * np.sqrt(0.2 * 0.8 * steps)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_values_that_outgrow_their_grid_get_a_coarser_one(distribution: Distribution) -> None:
    tensors = {"w": np.full((2, 8), 0.9, np.float32)}
    weights = MutableWeights(tensors, eps=1e-3, sampler=Full(distribution))
    exponent = weights.tensors[0].exponent
    reference = tensors["w"].astype(np.float64)
    for step in range(60):
        direction = Direction(0, step)
        weights.update([direction], [0.2])
        reference += 0.2 * noise.draw(direction, "w", 16, distribution).reshape(2, 8)
    weights.flush()
    assert weights.tensors[0].exponent > exponent
    assert np.abs(tensors["w"]).max() < 2.0 ** weights.tensors[0].exponent
    assert np.abs(tensors["w"] - reference).max() < 60 * weights.tensors[0].quantum


def test_coarsening_does_not_depend_on_when_passes_happen() -> None:
    def run(flush_each: bool) -> bytes:
        tensors = {"w": np.linspace(-0.9, 0.9, 4096, dtype=np.float32).reshape(64, 64)}
        weights = MutableWeights(tensors, eps=1e-3)
        for step in range(40):
            direction = Direction(0, step)
            weights.add(direction, weights.eps)
            if flush_each:
                weights.flush()
            weights.add(direction, weights.eps, -1)
            weights.update([direction], [0.07])
        weights.flush()
        return tensors["w"].tobytes()

    assert run(True) == run(False)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scale", [1e-5, 4e-3, 0.02, 0.05, 0.4])
@pytest.mark.parametrize("count", [1, 3])
def test_an_update_of_any_size_is_that_of_a_replay(distribution: Distribution, scale: float, count: int) -> None:
    """The restore joins the update's pass only where their sum is exact."""

    def run(live: bool) -> bytes:
        tensors = {"w": np.linspace(-0.01, 0.01, 5000, dtype=np.float32).reshape(50, 100), "bias": np.zeros(70, np.float32)}
        weights = MutableWeights(tensors, eps=1e-3, sampler=Full(distribution))
        for step in range(6):
            directions = [Direction(0, step, number) for number in range(count)]
            for direction in directions if live else []:
                weights.add(direction, weights.eps)
                weights.flush()
                weights.add(direction, weights.eps, -1)
            weights.update(directions, [scale, -scale / 3, scale / 7][:count], 0.001)
        weights.flush()
        return tensors["w"].tobytes() + tensors["bias"].tobytes()

    assert run(live=True) == run(live=False)


def test_weights_that_outgrow_the_resolution_of_eps_are_refused() -> None:
    weights = MutableWeights({"w": np.full(8, 0.5, np.float32)}, eps=1e-5)
    with pytest.raises(NonFiniteLossError, match=r"^eps 1e-05 is below the float32 resolution .* of w; the weights grew too large"):
        for step in range(9):
            weights.update([Direction(0, step)], [100.0])


def test_eps_stays_a_multiple_of_every_grid_while_they_coarsen() -> None:
    weights = MutableWeights({"w": np.full(8, 0.5, np.float32), "v": np.zeros(8, np.float32)}, eps=1e-3)
    first = weights.eps
    for step in range(40):
        weights.update([Direction(0, step)], [20.0])
        assert all((weights.eps / tensor.quantum).is_integer() for tensor in weights.tensors)
    assert weights.eps != first


def test_weight_decay_shrinks_matrices_alone() -> None:
    tensors = {"matrix": np.full((4, 4), 0.5, np.float32), "bias": np.full(4, 0.5, np.float32)}
    weights = MutableWeights(tensors, eps=1e-3)
    for step in range(100):
        weights.update([Direction(0, step)], [0.0], 0.01)
    assert tensors["matrix"] == pytest.approx(0.5 * 0.99**100, rel=1e-4)
    assert np.array_equal(tensors["bias"], np.full(4, 0.5))


def test_eps_becomes_a_multiple_of_every_grid() -> None:
    weights = MutableWeights(make_tensors(), eps=1e-3)
    assert weights.eps == pytest.approx(1e-3, rel=0.02)
    assert all((weights.eps / tensor.quantum).is_integer() for tensor in weights.tensors)


def test_eps_below_the_resolution_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^eps 1e-06 is below the float32 resolution .* of outlier; use a larger --eps"):
        MutableWeights(make_tensors(), eps=1e-6)


def test_an_array_that_cannot_be_changed_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match="w: not C-contiguous"):
        MutableWeights({"w": np.zeros((4, 6), np.float32).T}, eps=1e-3)
