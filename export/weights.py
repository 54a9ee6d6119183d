"""Weights to raw little-endian files: tunable and frozen apart, every tensor on a page, a tied weight once."""

import hashlib
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from edgezo.errors import ConfigError, ExportError
from edgezo.export.decoder import Weight
from edgezo.manifest import ALIGNMENT, ITEM_BYTES, StoredFile, Tensor

NORMS = r"(?i:norm)|\bln_"  # layer norms are named input_layernorm, q_norm, ln_1, final_layer_norm, LayerNorm
TUNABLE_FILE, FROZEN_FILE = "tunable.bin", "frozen.bin"
LAYER = re.compile(r"\.(?:layers|h|blocks|layer|albert_layers)\.(\d+)\.")


def plan_tensors(weights: Iterable[Weight], chosen: set[str]) -> list[Tensor]:
    """Give every weight its file and offset.

    Args:
        weights: the weights of the graphs, in graph order.
        chosen: names of the tunable ones.

    Raises:
        ExportError: a weight has a type that cannot be stored.
    """
    offsets = {TUNABLE_FILE: 0, FROZEN_FILE: 0}
    tensors = []
    for weight in weights:
        dtype = "float32" if weight.array.dtype == np.float64 else str(weight.array.dtype)
        if dtype not in ITEM_BYTES:
            raise ExportError(f"{weight.name}: type {dtype} cannot be stored; edgezo stores {', '.join(ITEM_BYTES)}")
        file = TUNABLE_FILE if weight.name in chosen else FROZEN_FILE
        layer = LAYER.search(f".{weight.name}")
        tensor = Tensor(
            name=weight.name,
            shape=list(weight.array.shape),
            dtype=dtype,  # type: ignore[arg-type]
            file=file,
            offset=offsets[file],
            tunable=weight.name in chosen,
            transposed=weight.transposed,
            layer=int(layer.group(1)) if layer else None,
            kind=_kind(weight.name),
            tied_to=weight.tied_to,
            quantized=weight.quantized,
        )
        offsets[file] = -(-(tensor.offset + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
        tensors.append(tensor)
    return tensors


def refuse_non_finite(weights: Iterable[Weight]) -> None:
    """Refuse a source whose weights hold NaN or infinity."""
    for weight in weights:
        if weight.array.dtype.kind == "f" and not np.isfinite(weight.array).all():
            raise ExportError(f"{weight.name}: the source holds NaN or infinity; it cannot be tuned or checked")


def write_weights(directory: Path, tensors: list[Tensor], weights: dict[str, Weight]) -> dict[str, StoredFile]:
    """Write the weight files one tensor at a time and return their sizes and SHA-256."""
    stored = {}
    for name in dict.fromkeys(tensor.file for tensor in tensors):
        digest, position = hashlib.sha256(), 0
        with open(directory / name, "wb") as file:
            for tensor in (tensor for tensor in tensors if tensor.file == name):
                data = np.ascontiguousarray(weights[tensor.name].array, dtype=np.dtype(tensor.dtype).newbyteorder("<"))
                for part in (bytes(tensor.offset - position), data.reshape(-1).view(np.uint8).data):
                    digest.update(part)
                    file.write(part)
                position = tensor.offset + tensor.nbytes
        stored[name] = StoredFile(bytes=position, sha256=digest.hexdigest())
    return stored


def tunable_pattern(tunable: str, option: str = "--tunable") -> re.Pattern[str]:
    """`tunable` as a regular expression.

    Args:
        option: that gave it, for the message.

    Raises:
        ConfigError: it is none, or empty.
    """
    if not tunable:
        raise ConfigError(f"{option} '': an empty expression; leave it out to tune all weights")
    try:
        return re.compile(tunable)
    except re.error as error:
        raise ConfigError(f"{option} {tunable!r}: not a regular expression ({error})") from None


def matching(weights: Iterable[Weight], tunable: str, option: str = "--tunable") -> set[str]:
    """Names of the weights to tune.

    Args:
        weights: of the source.
        tunable: "all", "norms", or a regular expression searched in the Hugging Face names (tied names count too).
        option: that gave it, for the message.

    Raises:
        ConfigError: the expression is malformed or matches no weight (near names are listed).
    """
    trainable = [weight for weight in weights if weight.trainable]
    if tunable == "all":
        return {weight.name for weight in trainable}
    pattern = tunable_pattern(NORMS if tunable == "norms" else tunable, option)
    chosen = {weight.name for weight in trainable if any(pattern.search(name) for name in [weight.name, *weight.tied_to])}
    if not chosen:
        kinds = sorted({_kind(weight.name) for weight in trainable})
        near = get_close_matches(tunable, kinds, cutoff=0.3) or kinds
        raise ConfigError(
            f"{option} {tunable!r}: matches none of the {len(trainable)} weights; they are named like {trainable[0].name}, their kinds are near {', '.join(near[:5])}"
        )
    return chosen


def _kind(name: str) -> str:
    """What a weight is: self_attn.q_proj, self_attn.q_proj.bias, input_layernorm, embed_tokens."""
    inside = LAYER.split(f".{name}")[-1].lstrip(".").removesuffix(".weight")
    if LAYER.search(f".{name}"):
        return inside
    return ".".join(inside.split(".")[-2 if inside.endswith(".bias") else -1 :])
