"""Directions that are outer products of signs: the identity on average, exact in any order, the same on replay."""

import hashlib

import numpy as np
import pytest
from reference import outer_products

from edgezo.errors import NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.samplers.outer import Layout, Outer
from edgezo.runtime.weights import MutableWeights

LAYOUTS = {"lora_A": Layout([5, 40, 7], [3, 3, 3]), "lora_B": Layout([3, 3, 3], [6, 33, 2])}
SMALL = {"lora_B": Layout([2, 1], [3, 4])}


def outer_weights(tensors: dict[str, Floats], layouts: dict[str, Layout], eps: float) -> MutableWeights:
    """As `Lora.weights` makes them."""
    weights = MutableWeights(tensors, eps=eps, sampler=Outer(layouts), threads=1)
    for tensor in weights.tensors:
        tensor.decays = True
    return weights


def shapes(layout: Layout) -> list[tuple[int, int]]:
    return list(zip(*layout, strict=True))


def make_tensors(layouts: dict[str, Layout] = LAYOUTS, scale: float = 0.1) -> dict[str, Floats]:
    random = np.random.default_rng(0)
    sizes = {name: sum(rows * columns for rows, columns in shapes(layout)) for name, layout in layouts.items()}
    return {name: (scale * random.standard_normal(size)).astype(np.float32) for name, size in sizes.items()}


def snapshot(tensors: dict[str, Floats]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


def flat(direction: Direction, name: str, layout: Layout) -> np.ndarray:
    return np.concatenate([z.ravel() for z in outer_products(direction, name, shapes(layout))])


# the directions


def test_signs_are_the_documented_bits() -> None:
    """Bit n is bit n mod 64 of word n div 64, from the lowest; a set bit is -1."""
    direction, tensor = Direction(7, 3, 2), noise.tensor_id("lora_B")
    drawn = noise.words(7, noise.SIGNS, 4, tensor=tensor, step=3, direction=2)
    bits = [int(drawn[place // 64]) >> (place % 64) & 1 for place in range(200)]
    assert noise.signs(direction, tensor, 200).tolist() == [-1 if bit else 1 for bit in bits]


def test_signs_are_the_same_bytes_for_ever() -> None:
    signs = noise.signs(Direction(7, 3, 2), noise.tensor_id("lora_B"), 10_000)
    assert signs.dtype == np.int8
    assert hashlib.sha256(signs.tobytes()).hexdigest() == "5ad4a438612d0fa539beb92949cb458fec2a0c7d01bdf46fc78d0859f285344e"
    first = noise.uniforms(7, "lora_A", 10_000)
    assert first.dtype == np.float32
    assert hashlib.sha256(first.astype("<f4").tobytes()).hexdigest() == "11ffa6c0e8e7f4a7ba9d4aa54ca31286a72f8d70b05f2d39bc1dd84e45e1d5ad"


@pytest.mark.parametrize("count", [1, 7, 8, 63, 64, 65, 255, 256, 257])
def test_fewer_signs_are_the_first_of_more(count: int) -> None:
    direction, tensor = Direction(1, 2, 3), noise.tensor_id("lora_A")
    assert np.array_equal(noise.signs(direction, tensor, count), noise.signs(direction, tensor, 1000)[:count])


def test_every_part_of_the_name_of_a_direction_changes_its_signs() -> None:
    names = [Direction(1, 2, 3), Direction(2, 2, 3), Direction(1, 3, 3), Direction(1, 2, 4)]
    drawn = [noise.signs(direction, noise.tensor_id(name), 256).tobytes() for direction in names for name in LAYOUTS]
    assert len(set(drawn)) == 8


def test_the_second_moment_of_a_direction_is_the_identity() -> None:
    count = 4000
    outer = Outer(SMALL)
    total = np.zeros((10, 10))
    for step in range(count):
        (rows,), (columns,) = outer.signs([Direction(3, step)], "lora_B")
        z = np.concatenate([np.outer(rows[:2], columns[:3]).ravel(), np.outer(rows[2:], columns[3:]).ravel()])
        assert np.array_equal(z, flat(Direction(3, step), "lora_B", SMALL["lora_B"]))
        total += np.outer(z, z)
    assert np.abs(total / count - np.eye(10)).max() < 5 / np.sqrt(count)


def test_the_mean_square_of_the_projection_is_that_of_the_gradient() -> None:
    """E (z . G)^2 = |G|^2, so that an estimate along outer products has the variance of one along fresh signs, up to the fourth moment."""
    gradient = np.random.default_rng(2).standard_normal(10)
    found = [float(flat(Direction(5, step), "lora_B", SMALL["lora_B"]) @ gradient) ** 2 for step in range(4000)]
    assert np.mean(found) == pytest.approx(gradient @ gradient, rel=5 * np.std(found) / np.mean(found) / np.sqrt(4000))


# updates


def test_an_addition_is_the_outer_product_times_one_integer_on_the_grid() -> None:
    tensors = make_tensors()
    weights = outer_weights(tensors, LAYOUTS, eps=1e-2)
    before = {name: array.astype(np.float64) for name, array in tensors.items()}
    directions, scales = [Direction(1, 2, number) for number in range(5)], [3e-3, -7e-4, 1e-9, 0.02, 1e-3]
    weights.update(directions, scales)
    weights.flush()
    for tensor in weights.tensors:
        expected = before[tensor.name].copy()
        for direction, scale in zip(directions, scales, strict=True):
            dither = noise.uniform(1, noise.DITHER, 2, direction.number)
            expected += np.floor(scale / tensor.quantum + dither) * tensor.quantum * flat(direction, tensor.name, LAYOUTS[tensor.name])
        assert np.array_equal(tensors[tensor.name], expected)
        assert np.array_equal(np.rint(expected / tensor.quantum), expected / tensor.quantum)


def test_many_directions_at_once_are_one_after_the_other_in_any_order() -> None:
    additions = [(Direction(9, step, number), 1e-4 * (step + 1)) for step in range(3) for number in range(16)]

    def run(flush_each: bool, reverse: bool) -> dict[str, bytes]:
        tensors = make_tensors()
        weights = outer_weights(tensors, LAYOUTS, eps=1e-2)
        for direction, scale in reversed(additions) if reverse else additions:
            weights.add(direction, scale)
            if flush_each:
                weights.flush()
        weights.flush()
        return snapshot(tensors)

    expected = run(flush_each=True, reverse=False)
    assert expected != snapshot(make_tensors())
    assert run(False, False) == expected
    assert run(False, True) == expected
    assert run(True, True) == expected


def test_an_addition_taken_back_leaves_no_trace() -> None:
    tensors = make_tensors()
    weights = outer_weights(tensors, LAYOUTS, eps=1e-2)
    before = snapshot(tensors)
    for step in range(5):
        weights.add(Direction(3, step), 0.0123)
        weights.flush()
        assert snapshot(tensors) != before
        weights.add(Direction(3, step), 0.0123, -1)
        weights.flush()
        assert snapshot(tensors) == before
    weights.add(Direction(0, 0), 0.5)
    weights.add(Direction(0, 0), 0.5, -1)
    assert not weights._pending


def test_small_updates_are_rounded_without_bias() -> None:
    """Updates of a fifth of the grid, signed so that the first element always goes up: it rises by a fifth of the grid a step."""
    layout, tensors = Layout([3], [4]), {"lora_B": np.full(12, 7.0, np.float32)}
    weights = outer_weights(tensors, {"lora_B": layout}, eps=1e-2)
    (tensor,) = weights.tensors
    start, expected, steps = tensors["lora_B"].astype(np.float64), np.zeros(12), 2000
    for step in range(steps):
        z = flat(Direction(0, step), "lora_B", layout)
        weights.update([Direction(0, step)], [0.2 * z[0] * tensor.quantum])
        expected += 0.2 * z[0] * z
    weights.flush()
    assert expected[0] == pytest.approx(0.2 * steps)
    assert np.abs((tensors["lora_B"] - start) / tensor.quantum - expected).max() < 5 * np.sqrt(0.2 * 0.8 * steps)


def test_all_matrices_decay() -> None:
    tensors = {name: np.full_like(array, 0.5) for name, array in make_tensors().items()}
    weights = outer_weights(tensors, LAYOUTS, eps=1e-2)
    for step in range(100):
        weights.update([Direction(0, step)], [0.0], 0.01)
    for array in tensors.values():
        assert array == pytest.approx(0.5 * 0.99**100, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-5, 4e-3, 0.02, 0.4])
@pytest.mark.parametrize("decay", [0.0, 0.001])
def test_updates_of_any_size_are_those_of_a_replay(scale: float, decay: float) -> None:
    """A live run flushes before every step's forwards, a replay every few steps; values outgrow their grid on the way."""

    def run(live: bool) -> tuple[dict[str, bytes], list[int]]:
        tensors = make_tensors(scale=1e-3)
        weights = outer_weights(tensors, LAYOUTS, eps=1e-3)
        exponents = [tensor.exponent for tensor in weights.tensors]
        for step in range(30):
            directions = [Direction(0, step, number) for number in range(3)]
            weights.update(directions, [scale, -scale / 3, scale / 7], decay)
            if live:
                weights.flush()
        weights.flush()
        return snapshot(tensors), [tensor.exponent - start for tensor, start in zip(weights.tensors, exponents, strict=True)]

    found, grown = run(live=True)
    assert run(live=False) == (found, grown)
    assert (min(grown) > 0) == (scale > 1e-3)


def test_values_that_outgrow_their_grid_stay_near_the_exact_ones() -> None:
    tensors = {"lora_B": np.full(12, 0.9, np.float32)}
    layout = Layout([3], [4])
    weights = outer_weights(tensors, {"lora_B": layout}, eps=1e-3)
    (tensor,) = weights.tensors
    exponent, reference = tensor.exponent, tensors["lora_B"].astype(np.float64)
    for step in range(60):
        weights.update([Direction(0, step)], [0.2])
        reference += 0.2 * flat(Direction(0, step), "lora_B", layout)
    weights.flush()
    assert tensor.exponent > exponent
    assert np.abs(tensors["lora_B"] - reference).max() < 60 * tensor.quantum


def test_weights_that_outgrow_the_resolution_of_eps_are_refused() -> None:
    weights = outer_weights({"lora_B": np.zeros(12, np.float32)}, {"lora_B": Layout([3], [4])}, eps=1e-5)
    with pytest.raises(NonFiniteLossError, match=r"^eps 1e-05 is below the float32 resolution .* of lora_B; the weights grew too large"):
        for step in range(9):
            weights.update([Direction(0, step)], [100.0])


def test_signs_drawn_again_after_others_are_the_same_and_in_the_order_asked_for() -> None:
    outer = Outer(LAYOUTS)
    asked = [Direction(0, 0, number) for number in range(3)]
    first = [part.copy() for part in outer.signs(asked, "lora_A")]
    outer.signs([Direction(0, 1)], "lora_A")
    assert all(map(np.array_equal, outer.signs(asked, "lora_A"), first))
    assert all(np.array_equal(part, kept[::-1]) for part, kept in zip(outer.signs(asked[::-1], "lora_A"), first, strict=True))
    assert not np.array_equal(first[0][0], first[0][1])
