"""What tests of adapters share: their size, and what a run tunes of them."""

import hashlib
from typing import Any

from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel

RANK, ALPHA = 3, 5.0


def adapter_arrays(model: EdgeModel) -> list[Any]:
    return [model.adapter.a, model.adapter.b] if isinstance(model.adapter, Lora) else list(model.weights.values())


def digest(model: EdgeModel) -> str:
    """SHA-256 of all that a run tunes."""
    return hashlib.sha256(b"".join(array.tobytes() for array in adapter_arrays(model))).hexdigest()
