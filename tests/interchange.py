"""What tests of interchange share: the files of PEFT, the task of their runs, and scores that are the same."""

from typing import Any

import numpy as np

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TASK = {"template": "{text} It was", "labels": "terrible,great", "threads": 1}


def assert_same(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    assert np.abs(found - expected).max() <= tolerance
