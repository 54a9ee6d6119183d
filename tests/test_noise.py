"""The noise is what docs/noise.md says, in any order and any pieces."""

import hashlib

import numpy as np
import pytest

from edgezo.runtime import noise
from edgezo.runtime.grid import sign_values
from edgezo.runtime.noise import BLOCK, TABLE_SIZE, Direction
from edgezo.runtime.samplers.full import noise_values

MASK = (1 << 64) - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as published (Salmon et al. 2011), in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        low = [(0xD2E7470EE14C6C93 * c[0]), (0xCA5A826395121157 * c[2])]
        c = [(low[1] >> 64) ^ c[1] ^ k[0], low[1] & MASK, (low[0] >> 64) ^ c[3] ^ k[1], low[0] & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def test_philox_reference_gives_the_published_vector() -> None:
    # Random123 kat_vectors, philox4x64 10 rounds, all bits set
    assert philox([MASK] * 4, [MASK] * 2) == [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]


def test_words_are_philox_at_the_documented_counters() -> None:
    found = noise.words(7, noise.NOISE, 8, first=12, tensor=99, step=5, direction=2)
    expected = philox([4, 99, 5, 2], [7, noise.NOISE]) + philox([5, 99, 5, 2], [7, noise.NOISE])
    assert found.tolist() == expected


def test_rademacher_table_follows_its_recurrence_and_has_full_period() -> None:
    signs = noise.table("rademacher")
    bits = (signs[:TABLE_SIZE] < 0).astype(np.uint8)
    extended = np.concatenate([bits, bits[:18]])
    assert np.array_equal(extended[18:], extended[7:-11] ^ extended[:-18])
    # one period holds every non-zero 18-bit state once
    states = sum(extended[i : i + TABLE_SIZE].astype(np.int64) << i for i in range(18))
    assert len(np.unique(states)) == TABLE_SIZE
    assert np.array_equal(signs[TABLE_SIZE:], signs[:BLOCK])


def test_shifts_of_the_rademacher_table_are_orthogonal() -> None:
    period = noise.table("rademacher")[:TABLE_SIZE].astype(np.float64)
    correlation = np.fft.ifft(np.abs(np.fft.fft(period)) ** 2).real
    assert correlation[0] == pytest.approx(TABLE_SIZE)
    assert np.allclose(correlation[1:], -1, atol=1e-6)


def test_gaussian_table_has_unit_moments() -> None:
    values = noise.table("gaussian")[:TABLE_SIZE].astype(np.float64)
    assert abs(values.mean()) < 1e-6
    assert values.var() == pytest.approx(1, abs=1e-4)
    assert (values**4).mean() == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(
    ("distribution", "digest"),
    [
        ("rademacher", "2aa7722e235738dada6e39ca82342470ad301fed4bcede3ae7a35775687ae300"),
        ("gaussian", "e7756d8953107c44520cecdbfa08da4a6728739ad7a2e7a92df489f24fbe23e0"),
    ],
)
def test_tables_are_the_documented_bytes(distribution: noise.Distribution, digest: str) -> None:
    assert hashlib.sha256(noise.table(distribution)[:TABLE_SIZE].astype("<f4").tobytes()).hexdigest() == digest


def test_draws_of_blocks_are_the_documented_words() -> None:
    tensors = {noise.tensor_id(name): blocks for name, blocks in (("a", 23), ("b", 1), ("c", 4), ("d", 6))}
    offsets, negated = noise.block_draws(Direction(MASK, 11, 1), tensors)
    drawn = [
        word
        for tensor, blocks in tensors.items()
        for word in [word for group in range(6) for word in philox([1 + group, tensor, 11, 1], [MASK, noise.NOISE])][:blocks]
    ]
    assert offsets.tolist() == [(word >> 32) * TABLE_SIZE >> 32 for word in drawn]
    assert negated.tolist() == [word % 2 == 1 for word in drawn]
    assert [part.size for part in noise.block_draws(Direction(0, 0), {})] == [0, 0]


def test_many_counters_give_what_each_gives() -> None:
    random = np.random.default_rng(0)
    counters = random.integers(0, MASK, (4, 500), np.uint64, endpoint=True)
    counters[:, :2] = MASK, 0
    key = MASK, 0x5851F42D4C957F2D
    found = noise.philox(counters, key)
    assert found.T.tolist() == [philox(counter, list(key)) for counter in counters.T.tolist()]


def test_every_part_of_the_name_of_a_direction_matters() -> None:
    draws = [
        noise.draw(Direction(*d), name, 1000).tobytes()
        for d, name in [((0, 0, 0), "a"), ((1, 0, 0), "a"), ((0, 1, 0), "a"), ((0, 0, 1), "a"), ((0, 0, 0), "b")]
    ]
    assert len(set(draws)) == 5


def test_noise_is_white_over_steps() -> None:
    """E[z z^T] = I: the mean over 4,000 steps of z_i z_j is within 5 standard errors of 0, the mean of z_i too."""
    steps = 4000
    z = np.stack([noise.draw(Direction(0, step), "w", 24) for step in range(steps)]).astype(np.float64)
    second = z.T @ z / steps
    assert np.array_equal(np.diag(second), np.ones(24))
    assert np.abs(second - np.eye(24)).max() < 5 / np.sqrt(steps)
    assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(steps)


def test_permutation_is_one_and_differs_by_epoch() -> None:
    first, second = noise.permutation(5, 100, 0), noise.permutation(5, 100, 1)
    assert sorted(first.tolist()) == list(range(100))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, noise.permutation(5, 100, 0))


def test_uniform_lies_in_the_unit_interval_and_fills_it() -> None:
    values = [noise.uniform(0, noise.DITHER, step) for step in range(1000)]
    assert 0 <= min(values) < 0.01
    assert 0.99 < max(values) < 1


@pytest.mark.parametrize("scale", [1e-3, 0.25, 16777214.7, 3.0])
def test_tables_of_signs_hold_both_values_to_the_last_bit(scale: float) -> None:
    """Whatever way they are made: half the difference of large values of unlike size is no float32 number."""
    shared, ways = noise.table("rademacher")[:1000], set()
    for step in range(20):
        direction = Direction(0, step)
        plus, minus = (np.float32(value) for value in sign_values(direction, {scale: 1}, 1.0 if scale > 1 else 2.0**-20))
        found = noise_values("rademacher", shared, direction, {scale: 1}, 1.0 if scale > 1 else 2.0**-20)
        assert np.array_equal(found, np.where(shared > 0, plus, minus))
        ways.add(bool(plus == -minus))
    assert ways == ({True} if scale in {0.25, 3.0} else {True, False})
