"""Models whose weights are rounded, and a tensor of them as it is stored."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.manifest import Manifest

HALF = [("llama", "fp16"), ("llama-untied", "fp16"), ("gpt2", "fp16")]
POSITIONS = {"transformer.wpe.weight"}  # a table that is looked up, and no embedding of tokens


def stored(directory: Path, manifest: Manifest, name: str) -> npt.NDArray[Any]:
    tensor = next(tensor for tensor in manifest.tensors if tensor.name == name)
    kind = {"float32": "<f4", "float16": "<f2", "uint8": "u1"}[tensor.dtype]
    return np.fromfile(directory / tensor.file, kind, tensor.size, offset=tensor.offset).reshape(tensor.shape)
