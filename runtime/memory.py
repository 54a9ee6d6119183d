"""Batches that keep the peak memory of this process below a limit: measured by forwards of growing size, not estimated."""

import re
from collections.abc import Sequence

from edgezo.errors import ConfigError
from edgezo.runtime.examples import Example
from edgezo.runtime.machine import peak_bytes
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.scoring import BATCH_TOKENS, forward_tokens
from edgezo.runtime.smoothness import PROBE_STEP
from edgezo.runtime.theta import Theta

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
LEAST = 10**6  # bytes; no model is as small, so a number without a unit has lost it
RESERVE = 0.03  # of the limit, for what grows later: fragmentation, the journal, other shapes of batches


def parse_bytes(text: str) -> int:
    """`1.5GB`, `800MB`, `2GiB` as bytes.

    Raises:
        ConfigError: it is none of these, or less than any model.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([KMG]?I?B?)\s*", text.upper())
    if not found or found[2] not in UNITS or (not found[2] and float(found[1]) < LEAST):
        raise ConfigError(f"--memory {text!r}: give a size with its unit, as 1.5GB or 800MB")
    size = int(float(found[1]) * UNITS[found[2]])
    if size < LEAST:
        raise ConfigError(f"--memory {text!r}: is {size} bytes, in which no model fits; give a size as 1.5GB or 800MB")
    return size


def refuse_less_than_weights(model: EdgeModel, limit: int) -> None:
    """Before anything is measured: a limit that the frozen and tunable weights alone exceed.

    Raises:
        ConfigError: they do; says what would fit.
    """
    weights = sum(model.manifest.files[name].bytes for name in {tensor.file for tensor in model.manifest.tensors})
    if weights > limit:
        raise ConfigError(
            f"--memory {_mb(limit)}: the weights alone take {_mb(weights)}; give more, or export with --adapter lora --weights int8 or int4"
        )


def fit_batches(theta: Theta, examples: Sequence[Example], limit: int) -> int:
    """Choose how many tokens a forward may have, so that the peak of the process stays below `limit`; set it in `theta.sequences`.

    Forwards of the longest rows are run, each twice the size of the one before, as long as the next is sure to fit; between the last two
    the growth is taken as linear.

    Args:
        theta: at its start, its session made and proven; afterwards as before.
        examples: all rows that the run will see.
        limit: bytes.

    Raises:
        ConfigError: the model alone, or one row of the longest, does not fit; says what would.
    """
    before = peak_bytes()
    if before is None:
        raise ConfigError(
            "--memory: this system does not tell how much memory a process takes; leave it out and lower --batch and --max-length"
        )
    usable = limit * (1 - RESERVE)
    if before >= usable:
        raise ConfigError(
            f"--memory {_mb(limit)}: the model alone takes {_mb(before)}; give more, or export with --adapter lora --weights int8 or int4"
        )
    rows = sorted(examples, key=_width, reverse=True)
    width = _width(rows[0])
    least = width * (1 if theta.model.adapter is None else 2)
    tokens, peak = least, _peak_of(theta, rows, least)
    if peak > usable:
        raise ConfigError(
            f"--memory {_mb(limit)}: a step with one row of {width} tokens takes {_mb(peak)}; give --memory {_mb(peak / (1 - RESERVE) + 1e6)}, or shorten rows with --max-length"
        )
    growth = max(0.0, float(peak - before))
    while tokens < BATCH_TOKENS and peak + 2 * growth <= usable and tokens // least < len(rows):
        more = min(2 * tokens, BATCH_TOKENS)
        larger = _peak_of(theta, rows, more)
        growth, peak, tokens = max(0.0, float(larger - peak)), larger, more
    if tokens < BATCH_TOKENS and growth > 0:
        tokens += int(tokens / 2 * max(0.0, usable - peak) / growth)
    theta.sequences.batch_tokens = max(least, min(tokens, BATCH_TOKENS))
    return theta.sequences.batch_tokens


def _peak_of(theta: Theta, rows: Sequence[Example], tokens: int) -> int:
    """Peak after one estimate whose forwards have `tokens` tokens."""
    theta.sequences.batch_tokens = tokens
    count = max(1, min(len(rows), tokens // _width(rows[0]) // (1 if theta.model.adapter is None else 2)))
    groups = [list(rows[:count])] if theta.model.adapter is None else [[row] for row in rows[:count]]
    directions = [Direction(theta.config.seed, PROBE_STEP, number) for number in range(len(groups))]
    theta.estimates(directions, groups)
    if theta.objective.generates and theta.model.generates_copies:  # of the shortest rows there are more copies in a forward
        shortest = [[row] for row in rows[-theta.config.directions :]]
        theta.estimates([Direction(theta.config.seed, PROBE_STEP, number) for number in range(len(shortest))], shortest)
    theta.weights.flush()
    return peak_bytes() or 0


def _width(example: Example) -> int:
    return max(forward_tokens(pair) for pair in example.pairs)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}MB".replace(",", "")
