"""A traced model: what a source becomes, and what the graphs are made from."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from edgezo.manifest import Family
from edgezo.quantization import Quantized

EXPORTED = "decoder-only causal models, masked language models and encoder classifiers"


@dataclass
class Weight:
    """One weight of the source: `name` is its Hugging Face name and its name in the graph; `array` is q where it is `quantized`."""

    name: str
    array: npt.NDArray[Any]
    trainable: bool
    transposed: bool = False
    tied_to: list[str] = field(default_factory=list)
    quantized: Quantized | None = None


class Part(NamedTuple):
    """Rows of a stored tensor that a graph uses under a name of their own."""

    tensor: str
    first: int
    rows: int


@dataclass
class Decoder:
    """A traced model: every weight is a graph input, its values lie in `weights`; `parts` name rows of some of them.

    head: Hugging Face name of the vocabulary projection's weight; None where there is no such, or its logits are scaled afterwards.
    """

    model: onnx.ModelProto
    weights: dict[str, Weight]
    parts: dict[str, Part] = field(default_factory=dict)
    family: Family = "causal"
    head: str | None = None

    @property
    def in_half(self) -> list[str]:
        """Names of the weights that `freeze` made float16."""
        return [name for name, weight in self.weights.items() if weight.array.dtype == np.float16]

    @property
    def past_inputs(self) -> list[onnx.ValueInfoProto]:
        """The KV-cache inputs, each [batch, heads, past, head_dim]."""
        return [value for value in self.model.graph.input if value.name.startswith("past_key_values.")]
