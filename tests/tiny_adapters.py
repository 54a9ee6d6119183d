"""What tests of adapters share: their size, what a run tunes of them, and a run's theta."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reference import make_objective, matrix_shapes, outer_products, randomise

from edgezo.config import make_config
from edgezo.runtime import noise
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.scoring import BATCH_TOKENS, Sequences
from edgezo.runtime.theta import Theta, mutable_weights, write_start

RANK, ALPHA = 3, 5.0


def adapter_arrays(model: EdgeModel) -> list[Any]:
    return [model.adapter.a, model.adapter.b] if isinstance(model.adapter, Lora) else list(model.weights.values())


def digest(model: EdgeModel) -> str:
    """SHA-256 of all that a run tunes."""
    return hashlib.sha256(b"".join(array.tobytes() for array in adapter_arrays(model))).hexdigest()


def make_theta(directory: Path, start: Path, batch_tokens: int = BATCH_TOKENS, **settings: Any) -> Theta:
    """theta at random values, written to `start`, as of a run that begins with --init."""
    model = EdgeModel(directory, threads=1)
    assert model.manifest.adapter is not None
    write_start(randomise(model, rank=RANK, alpha=ALPHA), start)
    kind = model.manifest.adapter.kind
    shape = {"rank": RANK, "alpha": ALPHA, "lr": 1.2e-2, "eps": 1e-2} if kind == "lora" else {"lr": 1e-2, "eps": 1e-1}
    config = make_config(None, {"data": "no file", **shape, **settings}, kind)
    model = EdgeModel(directory, threads=1)
    return Theta(model, config, mutable_weights(model, config, start), make_objective(Sequences(model, batch_tokens)))


@contextmanager
def perturbed(theta: Theta, direction: Direction, side: int) -> Iterator[None]:
    """One copy theta + side * eps * z written into the adapter itself, made as the reference does."""
    before = [array.copy() for array in adapter_arrays(theta.model)]
    if isinstance(theta.model.adapter, Lora):
        lora = theta.model.adapter
        shapes = matrix_shapes(lora.targets, lora.rank)
        for name in ["lora_A", "lora_B"] if theta.config.tune_a else ["lora_B"]:
            for matrix, z in zip(lora.matrices(name), outer_products(direction, name, shapes[name]), strict=True):
                matrix += side * theta.weights.eps * z
    else:
        prefix = theta.model.weights["prefix"]
        z = noise.draw(direction, "prefix", prefix.size, theta.config.noise)
        prefix += (side * theta.weights.eps * z).reshape(prefix.shape)
    try:
        yield
    finally:
        for array, values in zip(adapter_arrays(theta.model), before, strict=True):
            array[...] = values
