"""The loss around the start of a run, measured on a few rows, and the eps and lr that follow.

    c(s) = (L(theta + s z) - L(theta - s z)) / (2 s)          along a few directions z, at scales s = 2^k
    change(s, r) = rms(c(s) - c(r)) / max(rms c(s), rms c(r))

s0 is the largest s with change(s, s / 4) <= AGREES: below it rounding may drown the difference of losses, above it the loss curves. The reach R is
where half of a projected gradient is lost, median_i |c_i(R) - c_i(s0)| / |c_i(s0)| = 1/2 over the directions i, or less, where random steps of R raise the loss by WORSENS.
eps is s0, and at most a quarter of R. T normalized steps along noise alone displace every weight by
lr sqrt(sum f_t^2) in root mean square, f_t the schedule's factors, and most of what a step adds is noise; so

    lr = R sqrt(min(1, rows / FULL_ROWS)) / sqrt(sum f_t^2)

keeps the whole run where its gradients hold. Why, and how it compares with a grid of rates: docs/tuning.md.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.errors import NonFiniteLossError
from edgezo.runtime.optimizer import Schedule, schedule_factor
from edgezo.runtime.rules.rule import Rule

Floats = npt.NDArray[np.float64]
AGREES, LOST = 0.05, 0.5
UNRELIABLE = 0.5  # no scale with less change than this: nothing can be learned from such differences
FULL_ROWS = 16  # of a step; with fewer its direction is worth less, and so is a step
LEAST_STEPS = 20  # fewer do not take larger steps
WORSENS = 0.1  # share of the loss that random steps of the reach may add


class Scale(NamedTuple):
    """Measured at one s: c along every direction, and (L+ + L-) / 2; both [directions]."""

    grads: Floats
    losses: Floats


class Landscape(NamedTuple):
    """What was measured of the loss around a start.

    eps, smooth (s0), reach: see above. rises: whether the reach ends where the loss rises. change: of c between s0 / 4 and s0. grad_rms: of c at s0.
    loss: at the smallest scale. curvature: the mean of (L+ - 2 L0 + L-) / s^2 at the scale next to the reach, an estimate of the trace of the
    Hessian. probes: scales measured.
    """

    eps: float
    smooth: float
    reach: float
    rises: bool
    change: float
    grad_rms: float
    loss: float
    curvature: float
    probes: int

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as a journal's header keeps them."""
        return dict(self._asdict())


Probe = Callable[[float], Scale]


def survey(probe: Probe, start: int, least: int, most: int) -> Landscape:
    """Measure eps and reach.

    Args:
        probe: c and losses at a scale, always along the same directions on the same rows.
        start: k of the first scale 2^k.
        least: smallest k.
        most: largest k.

    Raises:
        NonFiniteLossError: the loss is not finite even at the smallest scales.
    """
    ladder = _Ladder(probe)
    smooth = _smooth_scale(ladder, start, least, most)
    base = ladder.at(smooth)
    if base is None:
        raise NonFiniteLossError(f"the loss is not finite at perturbations of {2.0**smooth:g}; export the model again, or give --eps")

    def lost(k: int) -> float:
        return _lost(ladder.at(k), base)

    inside = smooth
    while inside + 2 <= most and lost(inside + 2) < LOST:
        inside += 2
    reach = _crossing(lost, inside, most)
    finite = {k: scale for k, scale in sorted(ladder.found.items()) if scale is not None}
    loss = float(np.mean(next(iter(finite.values())).losses))
    farthest = max(k for k in finite if lost(k) < LOST or k == smooth)
    curvature = 2 * (float(np.mean(finite[farthest].losses)) - loss) / 4.0**farthest
    rises = curvature * reach**2 / 2 > WORSENS * abs(loss) > 0
    if rises:
        reach = math.sqrt(2 * WORSENS * abs(loss) / curvature)
    eps = min(2.0**smooth, 2.0 ** math.floor(math.log2(reach / 4)))
    return Landscape(eps, 2.0**smooth, reach, rises, ladder.change(smooth), rms(base.grads), loss, curvature, len(ladder.found))


class _Ladder:
    """What was measured at the scales 2^k; None where a loss is not finite."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.found: dict[int, Scale | None] = {}

    def at(self, k: int) -> Scale | None:
        """Measured once."""
        if k not in self.found:
            try:
                self.found[k] = self.probe(2.0**k)
            except NonFiniteLossError:
                self.found[k] = None
        return self.found[k]

    def change(self, k: int) -> float:
        """Of the projected gradients between 2^k and a quarter of it: infinite where a loss is not finite, 1 where neither changes the loss."""
        large, small = self.at(k), self.at(k - 2)
        if large is None or small is None:
            return math.inf
        return change_between(small.grads, large.grads)


def _smooth_scale(ladder: _Ladder, start: int, least: int, most: int) -> int:
    """The largest k next to `start` that agrees with k - 2; where none does, the one that differs least."""
    tried = [start]
    for away in range(2, max(most - start, start - least) + 1, 2):  # smaller ones where the loss curves, larger ones where it is rounded
        if ladder.change(tried[-1]) <= AGREES:
            break
        for k in (start - away, start + away):
            if least <= k - 2 and k <= most and ladder.change(tried[-1]) > AGREES:
                tried.append(k)
    k = min(tried, key=ladder.change)
    while k + 2 <= most and ladder.change(k + 2) <= AGREES:
        k += 2
    return k


def _crossing(lost: Callable[[int], float], inside: int, most: int) -> float:
    """The scale between 2^inside and four times it at which `lost` reaches LOST, on a line in its logarithm."""
    if inside + 2 > most:
        return 2.0**inside
    low, high = (inside + 1, inside + 2) if lost(inside + 1) < LOST else (inside, inside + 1)
    below, above = max(lost(low), 1e-3), lost(high)
    if not math.isfinite(above):
        return 2.0**low
    share = math.log(LOST / below) / math.log(above / below) if above > below else 0.0
    return float(2.0 ** (low + (high - low) * min(max(share, 0.0), 1.0)))


def learning_rate(landscape: Landscape, rule: Rule, schedule: Schedule, warmup: float, steps: int, directions: int, batch: float) -> float:
    """The rate whose noise stays within reach over `steps` steps (`Rule.rate` says what a rule needs for a move of one step).

    Args:
        landscape: measured.
        rule, schedule, warmup, directions, batch: of the run.
        steps: of the whole run.
    """
    count = max(steps, LEAST_STEPS)
    path = math.sqrt(math.fsum(schedule_factor(schedule, step / count, warmup) ** 2 for step in range(count)))
    move = landscape.reach * math.sqrt(min(1.0, directions * batch / FULL_ROWS)) / path
    return rule.rate(move, max(landscape.grad_rms, 1e-9), directions)


def _lost(large: Scale | None, base: Scale) -> float:
    """How much of a projected gradient at `base` is not found again; infinite where a loss is not finite, or none is there.

    The median over the directions, since a few rows have most of the gradient and lose it first. 16 of 64 directions drawn again and again
    (SmolLM2-135M, SST-2, LoRA): nine of ten reaches lie within 0.08 and 0.15; by root mean squares within 0.016 and 0.19.
    """
    if large is None:
        return math.inf
    moved, size = np.abs(large.grads - base.grads), np.abs(base.grads)
    telling = (moved > 0) | (size > 0)  # others change nothing at either scale
    with np.errstate(divide="ignore"):
        return float(np.median(moved[telling] / size[telling])) if telling.any() else math.inf


def change_between(small: Floats, large: Floats) -> float:
    """Root mean square of the difference against that of the larger; 1 where neither changes the loss."""
    size = max(rms(small), rms(large))
    return rms(small - large) / size if size else 1.0


def rms(values: Floats) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(values**2)))
