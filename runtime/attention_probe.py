"""What a probe of the attention is to everybody but the fit: fixed directions, feeds, changes of weights, and its place in adapter files.

W_l + B^T A_l^T for the output projections W_l of attention in the upper layers; A float32 [layers, in_features, R]; row k of B is the same
for all models of one width: signs of the PROBE stream over sqrt(width) (docs/noise.md).
"""

import functools
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from edgezo.adapters import PROBE_A, PROBE_B, A, B, LoraTarget
from edgezo.manifest import Manifest
from edgezo.runtime import noise
from edgezo.runtime.noise import Direction

Floats = npt.NDArray[np.float32]
Pairs = dict[str, dict[str, Floats]]
NO_PROBE: Floats = np.zeros((0, 0, 0), np.float32)


@functools.cache
def probe_directions(rank: int, width: int) -> Floats:
    """B float32 [rank, width]: where in the residual stream each read-out is written, of length 1. Read-only."""
    drawn = [noise.signs(Direction(0, 0, number), noise.tensor_id(PROBE_B), width, noise.PROBE) for number in range(rank)]
    directions: Floats = np.stack(drawn).astype(np.float32) / np.float32(np.sqrt(width))
    directions.flags.writeable = False
    return directions


def probe_feeds(probe: Floats, manifest: Manifest) -> dict[str, Floats]:
    """By the names of the graphs' inputs; none without a probe."""
    if not probe.size:
        return {}
    return {PROBE_A: probe, PROBE_B: probe_directions(probe.shape[2], manifest.probes[0].out_features)}


def probe_fits(probe: Floats, manifest: Manifest) -> bool:
    """Whether the graphs of an edge model can be fed a probe."""
    targets = manifest.probes
    return not probe.size or (bool(targets) and probe.shape[:2] == (len(targets), targets[0].in_features))


def probe_deltas(probe: Floats, manifest: Manifest) -> dict[str, Callable[[], Floats]]:
    """By name of each weight it changes, what makes the change, float32, laid out as that weight is stored."""
    if not probe.size:
        return {}
    directions = probe_directions(probe.shape[2], manifest.probes[0].out_features).astype(np.float64)

    def make(target: LoraTarget, read: Floats) -> Floats:
        delta: Floats = (read.astype(np.float64) @ directions).astype(np.float32)
        return delta.T if target.out_first else delta

    return {f"{target.module}.weight": partial(make, target, read) for target, read in zip(manifest.probes, probe, strict=True)}


def add_probe(pairs: Pairs, probe: Floats, manifest: Manifest, scaling: float) -> None:
    """Join a probe to LoRA by module, {lora_A: A^T [in, rank], lora_B: B^T [rank, out]}, along the rank; where there was none it stands alone.

    Args:
        pairs: changed.
        scaling: of the LoRA, by which the read-outs are divided where they are joined.
    """
    if not probe.size:
        return
    directions = probe_directions(probe.shape[2], manifest.probes[0].out_features)
    for target, read in zip(manifest.probes, probe, strict=True):
        pair = pairs.get(target.module)
        if pair is None:  # a scaling of 1
            pairs[target.module] = {A: read, B: directions}
        else:
            a, b = np.concatenate([pair[A], read / np.float32(scaling)], axis=1), np.concatenate([pair[B], directions])
            pairs[target.module] = {A: a, B: b}


def take_probe(pairs: Pairs, manifest: Manifest, scaling: float) -> Floats:
    """Part `pairs` from the probe that `add_probe` joined to them: the last rows of B that are its directions. NO_PROBE where there is none,
    and `pairs` is as it was.
    """
    targets = {target.module for target in manifest.adapter.targets} if manifest.adapter is not None else set()
    found = [pairs.get(target.module, {}) for target in manifest.probes]
    ranks = {_probe_rank(target, pair) for target, pair in zip(manifest.probes, found, strict=True)}
    if len(ranks) != 1 or ranks == {0}:
        return NO_PROBE
    (rank,) = ranks
    parts = []
    for target, pair in zip(manifest.probes, found, strict=True):
        parts.append(pair[A][:, -rank:] * np.float32(scaling if target.module in targets else 1))
        if pair[B].shape[0] == rank:
            del pairs[target.module]
        else:
            pairs[target.module] = {A: pair[A][:, :-rank], B: pair[B][:-rank]}
    return np.stack(parts)


def fits_layer(target: LoraTarget, pair: dict[str, Floats]) -> bool:
    """Whether A^T and B^T are both there, and fit each other and the layer."""
    return pair.keys() == {A, B} and (pair[A].shape[0], *pair[B].shape[::-1]) == (target.in_features, target.out_features, pair[A].shape[1])


def _probe_rank(target: LoraTarget, pair: dict[str, Floats]) -> int:
    """How many of the last rows of B are the first directions of a probe; 0 for matrices that do not fit each other or the layer."""
    if not fits_layer(target, pair):
        return 0
    b = pair[B]
    first = probe_directions(1, target.out_features)
    begins = np.flatnonzero((b == first).all(axis=1))
    if not len(begins):
        return 0
    rank = b.shape[0] - int(begins[0])
    return rank if np.array_equal(b[-rank:], probe_directions(rank, target.out_features)) else 0
