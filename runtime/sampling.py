"""Which token follows: the most likely, or one that is drawn."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgezo.config import Sampling
from edgezo.errors import ConfigError

Logits = npt.NDArray[np.float32]
Pick = Callable[[Logits], int]


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings that no draw can follow.

    Args:
        sampling: how to draw.

    Raises:
        ConfigError: a setting is out of range.
    """
    if not (0 < sampling.temperature < math.inf and sampling.top_k >= 0 and 0 < sampling.top_p <= 1):
        raise ConfigError(
            f"temperature must be above 0 and finite, top-k at least 0 and top-p in (0, 1]; got {sampling.temperature}, {sampling.top_k}, {sampling.top_p}"
        )
    if sampling.seed < 0:
        raise ConfigError(f"the sampling seed must be at least 0; got {sampling.seed}")


def refuse_draws(sampling: Sampling | None, kind: str) -> None:
    """Refuse to draw where nothing is written.

    Args:
        sampling: what was asked for.
        kind: of the rows.

    Raises:
        ConfigError: some drawing was.
    """
    if sampling is not None:
        raise ConfigError(
            f"--temperature, --top-k and --top-p: draw written answers, and for rows of kind {kind} none are written here; leave them out"
        )


def make_pick(sampling: Sampling | None, *stream: int) -> Pick:
    """How the tokens of one text are picked, one after the other, from logits [vocabulary].

    Args:
        sampling: how to draw; None is greedy, the first of equals.
        stream: numbers that, with the seed, tell the draws of this text from those of others.

    Raises:
        ConfigError: a setting is out of range.
    """
    if sampling is None:
        return lambda logits: int(logits.argmax())
    check_sampling(sampling)
    random = np.random.default_rng([sampling.seed, *stream])
    return lambda logits: _draw(logits, sampling, random)


def _draw(logits: Logits, sampling: Sampling, random: np.random.Generator) -> int:
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # -inf is the right score of the others at a temperature near 0
        wide = (wide - wide.max()) / sampling.temperature
    order = np.argsort(-wide, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    probability = np.exp(wide[order])
    probability /= probability.sum()
    # keep the smallest head whose mass reaches top_p
    kept = int(np.searchsorted(np.cumsum(probability), sampling.top_p)) + 1
    head = probability[:kept] / probability[:kept].sum()
    return int(order[:kept][random.choice(len(head), p=head)])
