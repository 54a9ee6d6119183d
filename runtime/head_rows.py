"""Rows of the head changed by an exact solution: logits[:, tokens] += hidden @ rows, whatever else a run tunes."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS, A, B
from edgezo.errors import AdapterError
from edgezo.manifest import Manifest
from edgezo.runtime.attention_probe import NO_PROBE, probe_feeds


class HeadRows(NamedTuple):
    """Changes of K rows of the vocabulary projection, or of a head of classes; W[tokens] + rows^T is the changed head.

    tokens: int64 [K], without repeats. rows: float32 [width, K]. probe: of the attention, whose result these rows read, float32 [layers,
    in_features, R] (runtime/attention_probe.py); empty for none.
    """

    tokens: npt.NDArray[np.int64]
    rows: npt.NDArray[np.float32]
    probe: npt.NDArray[np.float32] = NO_PROBE

    def feeds(self, manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
        """By the names of the graphs' inputs."""
        return {HEAD_TOKENS: self.tokens, HEAD_ROWS: self.rows, **probe_feeds(self.probe, manifest)}

    def equals(self, other: "HeadRows") -> bool:
        """Whether all numbers are the same."""
        pairs = ((self.tokens, other.tokens), (self.rows, other.rows), (self.probe, other.probe))
        return all(np.array_equal(one, its) for one, its in pairs)


Array = npt.NDArray[Any]
HEAD_TOKENS_LIMIT = 4096  # of an adapter that others trained
NO_ROWS = HeadRows(np.zeros(0, np.int64), np.zeros((1, 0), np.float32))


def refuse_unnamed_head(head: HeadRows, manifest: Manifest) -> None:
    """Refuse to write rows of a head that is no weight of its own, or whose logits are scaled afterwards.

    Raises:
        AdapterError: there are such rows.
    """
    if len(head.tokens) and manifest.head is None:
        raise AdapterError(
            f"{manifest.origin.id}: the run changed rows of the head, and the logits of this model are not those of one weight; use --format edge or onnx-adapter"
        )


def refuse_beside_lora(head: HeadRows, manifest: Manifest, modules: Collection[str], kind: str) -> None:
    """Refuse to write rows of the head beside LoRA at the same layer, where a format has one place for both.

    Raises:
        AdapterError: there are such rows.
    """
    if len(head.tokens) and head_module(manifest) in modules:
        raise AdapterError(
            f"{manifest.origin.id}: the run changed rows of the head beside LoRA at the same layer, which {kind} cannot hold; use --format hf or edge, or tune with --start none"
        )


def summed(parts: Sequence[HeadRows], shares: Sequence[float]) -> HeadRows:
    """sum_i shares[i] * parts[i], float64 rounded once; probes have the same directions, so that their read-outs can be summed."""
    tokens = np.unique(np.concatenate([part.tokens for part in parts]))
    total = np.zeros((max(part.rows.shape[0] for part in parts), len(tokens)))
    for part, share in zip(parts, shares, strict=True):
        if len(part.tokens):
            total[:, np.searchsorted(tokens, part.tokens)] += share * part.rows.astype(np.float64)
    probes = [(share, part.probe) for part, share in zip(parts, shares, strict=True) if part.probe.size]
    if not probes:
        return HeadRows(tokens, total.astype(np.float32))
    layers, width, _ = probes[0][1].shape
    read = np.zeros((layers, width, max(probe.shape[2] for _, probe in probes)))
    for share, probe in probes:
        read[:, :, : probe.shape[2]] += share * probe.astype(np.float64)
    return HeadRows(tokens, total.astype(np.float32), read.astype(np.float32))


def head_module(manifest: Manifest) -> str:
    """Name of the vocabulary projection."""
    return (manifest.head or "head").removesuffix(".weight")


def head_as_lora(path: Path, head: HeadRows, manifest: Manifest) -> dict[str, Array]:
    """Rows of the head as LoRA of their number: A the rows, B ones at their tokens."""
    tokens, rows, size = head.tokens, head.rows, len(manifest.classes) or manifest.origin.vocab_size
    fits = tokens.dtype == np.int64 and rows.dtype == np.float32 and tokens.ndim == 1 and rows.ndim == 2 and rows.shape[1] == len(tokens)
    if not fits or not np.isfinite(rows).all() or (len(tokens) and not (tokens.min() >= 0 and tokens.max() < size)):
        raise AdapterError(f"{path}: its rows of the head are no finite float32 of tokens of this model; it cannot be used")
    ones = np.zeros((len(tokens), size), np.float32)
    ones[np.arange(len(tokens)), tokens] = 1
    return {A: rows, B: ones}


def head_from_lora(path: Path, pair: dict[str, Array]) -> HeadRows:
    """Rows of the head from LoRA at the head whose B reaches few tokens, as `write_peft` writes it."""
    if pair.keys() != {A, B} or pair[A].shape[1] != pair[B].shape[0]:
        raise AdapterError(f"{path}: its matrices of the head do not fit each other; save the adapter again")
    tokens = np.flatnonzero(pair[B].any(axis=0))
    if len(tokens) > HEAD_TOKENS_LIMIT:
        raise AdapterError(
            f"{path}: changes {len(tokens)} rows of the head, edgezo takes {HEAD_TOKENS_LIMIT}; train the adapter without the head"
        )
    return HeadRows(tokens, (pair[A] @ pair[B][:, tokens]).astype(np.float32))
