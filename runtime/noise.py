"""Counter-based noise, version 1. The written specification is docs/noise.md; this module is its NumPy implementation.

z for block b of a tensor is a window of one shared table, at an offset and with a sign drawn by Philox4x64-10:

    word   = Philox(key=[seed, NOISE], counter=[1 + b // 4, tensor, step, direction])[b % 4]
    offset = (word >> 32) * M >> 32          sign = -1 if word & 1 else +1
    z[BLOCK * b + i] = sign * table[(offset + i) mod M]

The Rademacher table is a maximal-length shift-register sequence, whose shifts are orthogonal up to 1/M: over the draws E[z z^T] = I to
4e-6, as for fresh bits, at the speed of one slice and one add.
"""

import functools
from collections.abc import Mapping
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

SPECIFICATION_VERSION = 1
Distribution = Literal["rademacher", "gaussian"]

TABLE_SIZE = (1 << 18) - 1  # M; 1 MB of float32 stays in the second-level cache of a laptop or Jetson core
BLOCK = 1 << 16  # elements that share one draw
# second key word: what the draw is for
NOISE, DITHER, DECAY, ORDER, INIT, SIGNS, SUBSET, LEFT, RIGHT, CORE, CHANGE, PROBE = range(12)

PHILOX_FACTORS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
PHILOX_KEYS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B

Floats = npt.NDArray[np.float32]


class Direction(NamedTuple):
    """What names one z: the run's seed, the step, and the number of the direction within the step."""

    seed: int
    step: int
    number: int = 0


def words(
    seed: int, domain: int, count: int, *, first: int = 0, tensor: int = 0, step: int = 0, direction: int = 0
) -> npt.NDArray[np.uint64]:
    """`count` words of the raw stream, from word `first` (a multiple of 4) on.

    Returns:
        uint64 [count]. The raw stream of Philox4x64-10 is the same in every NumPy version (NEP 19) and every language.
    """
    # NumPy counts up before the first output: counter word 0 as given is one less than the one used
    bits = np.random.Philox(key=np.array([seed, domain], np.uint64), counter=np.array([first // 4, tensor, step, direction], np.uint64))
    return np.asarray(bits.random_raw(count), np.uint64)


def block_draws(direction: Direction, tensors: Mapping[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Table offsets and negations of all blocks of some tensors, one tensor after the other.

    Args:
        tensors: how many blocks the tensor of every id has.
    """
    # a generator for each of SmolLM2-135M's 272 tensors took 12 ms a direction, in the interpreter and so on one thread; this takes 1.5 ms
    counts = np.array([*tensors.values()], np.int64)
    groups = -(-counts // 4)
    number = _within(counts)
    counters = np.empty((4, int(groups.sum())), np.uint64)
    counters[0], counters[1] = 1 + _within(groups), np.repeat(np.array([*tensors], np.uint64), groups)
    counters[2:] = np.array([[direction.step], [direction.number]], np.uint64)
    drawn = philox(counters, (direction.seed, NOISE))[number % 4, np.repeat(np.cumsum(groups) - groups, counts) + number // 4]
    offsets = ((drawn >> np.uint64(32)) * np.uint64(TABLE_SIZE)) >> np.uint64(32)
    return offsets.astype(np.int64), (drawn & np.uint64(1)).astype(bool)


def _within(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 .. n - 1 for every n, one after the other."""
    numbers: npt.NDArray[np.int64] = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def philox(counters: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Philox4x64-10 of many counters under one key, uint64 [4, n] to uint64 [4, n].

    References:
        Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3.
    """
    c0, c1, c2, c3 = counters
    for turn in range(10):
        k0, k1 = (np.uint64((word + turn * weyl) % (1 << 64)) for word, weyl in zip(key, PHILOX_KEYS, strict=True))
        high0, high2 = _high_word(c0, PHILOX_FACTORS[0]), _high_word(c2, PHILOX_FACTORS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, c2 * np.uint64(PHILOX_FACTORS[1]), high0 ^ c3 ^ k1, c0 * np.uint64(PHILOX_FACTORS[0])
    return np.stack([c0, c1, c2, c3])


def _high_word(values: npt.NDArray[np.uint64], factor: int) -> npt.NDArray[np.uint64]:
    """The upper 64 of the 128 bits of each product, from products of halves."""
    half, mask = np.uint64(32), np.uint64((1 << 32) - 1)
    low, high = values & mask, values >> half
    below, above = np.uint64(factor) & mask, np.uint64(factor) >> half
    middle = high * below + (low * below >> half)  # at most 2^64 - 2^32
    upper: npt.NDArray[np.uint64] = high * above + (middle >> half) + ((low * above + (middle & mask)) >> half)
    return upper


def signs(direction: Direction, tensor: int, count: int, domain: int = SIGNS) -> npt.NDArray[np.int8]:
    """`count` signs of a stream: bit i % 64 of word i // 64, from the lowest, set for -1. For products of factors (runtime/samplers)."""
    drawn = words(direction.seed, domain, -(-count // 64), tensor=tensor, step=direction.step, direction=direction.number)
    bits = np.unpackbits(drawn.astype("<u8").view(np.uint8), count=count, bitorder="little")
    drawn_signs: npt.NDArray[np.int8] = np.int8(1) - np.int8(2) * bits.view(np.int8)
    return drawn_signs


def uniform(seed: int, domain: int, step: int, direction: int = 0) -> float:
    """One number in [0, 1): the upper 53 bits of the first word of a stream."""
    return float(words(seed, domain, 1, step=step, direction=direction)[0] >> np.uint64(11)) * 2.0**-53


def uniforms(seed: int, name: str, count: int) -> Floats:
    """`count` float32 numbers in [-1, 1): (word >> 40) / 2^23 - 1, words of the tensor's INIT stream. Starting values of adapters."""
    drawn = words(seed, INIT, count, tensor=tensor_id(name), step=1)
    values: Floats = ((drawn >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23)) - np.float32(1)
    return values


def tensor_id(name: str) -> int:
    """The 64-bit id of a tensor: the first eight bytes of SHA-256 of its Hugging Face name, little-endian."""
    import hashlib

    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


@functools.cache
def table(distribution: Distribution) -> Floats:
    """The shared table, float32 [M + BLOCK]: one period and its continuation, so that every window is one slice. Read-only."""
    period = _shift_register_signs() if distribution == "rademacher" else _normal_quantiles()
    extended = np.concatenate([period, period[:BLOCK]])
    extended.flags.writeable = False
    return extended


def largest(distribution: Distribution) -> float:
    """The largest absolute value in the table."""
    return float(np.abs(table(distribution)).max())


def draw(direction: Direction, name: str, size: int, distribution: Distribution = "rademacher") -> Floats:
    """All of z for one tensor, flat, float32 [size]: the slow way, for tests and for other programs."""
    offsets, negated = block_draws(direction, {tensor_id(name): -(-size // BLOCK)})
    values = table(distribution)
    parts = [-values[o : o + BLOCK] if n else values[o : o + BLOCK] for o, n in zip(offsets, negated, strict=True)]
    return np.concatenate(parts)[:size]


def permutation(seed: int, size: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of range(size): the stable order of the words of the ORDER stream of this epoch."""
    return np.argsort(words(seed, ORDER, size, step=epoch), kind="stable")


def _shift_register_signs() -> Floats:
    """s[n + 18] = s[n + 7] xor s[n] from s[0..17] = 1; bit 0 gives +1, bit 1 gives -1. x^18 + x^7 + 1 is primitive: period 2^18 - 1."""
    bits = np.ones(TABLE_SIZE + 18, np.uint8)
    position, stride = 18, 1
    while position < TABLE_SIZE:
        # s[n + 18 q] = s[n + 7 q] xor s[n] for every q = 2^k, since squaring is linear over GF(2)
        while 36 * stride <= position:
            stride *= 2
        end = min(position + 11 * stride, TABLE_SIZE)
        base = np.arange(position, end) - 18 * stride
        bits[position:end] = bits[base + 7 * stride] ^ bits[base]
        position = end
    signs: Floats = np.where(bits[:TABLE_SIZE], np.float32(-1), np.float32(1))
    return signs


def _normal_quantiles() -> Floats:
    """The M mid-point quantiles of the standard normal, rounded to 2^-12 and shuffled by the INIT stream of seed 0.

    Rounding to 2^-12 keeps the last bit of a system's logarithm out of the table.
    """
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((k + 0.5) / TABLE_SIZE) for k in range(TABLE_SIZE)])
    rounded = np.rint(quantiles * 4096) / 4096
    shuffled: Floats = rounded[np.argsort(words(0, INIT, TABLE_SIZE), kind="stable")].astype(np.float32)
    return shuffled
