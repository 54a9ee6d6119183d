"""Changes to the nodes of an ONNX graph, collected and written back in one go."""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Use = tuple[onnx.NodeProto, int]  # a node, and the place among its inputs


class Surgery:
    """Nodes of a graph with an index of who reads what. Changes reach the graph with `finish`."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self._nodes = list(graph.node)  # held, since a protobuf wrapper keeps its identity only while it is referenced
        self._positions = {id(node): position for position, node in enumerate(self._nodes)}
        self._uses: dict[str, list[Use]] = {}
        self._instead: dict[int, list[onnx.NodeProto]] = {}
        self._first: list[onnx.NodeProto] = []
        for node in self._nodes:
            for index, name in enumerate(node.input):
                self._uses.setdefault(name, []).append((node, index))

    def uses(self, name: str) -> list[Use]:
        """Who reads `name` in the graph as it was given."""
        return self._uses.get(name, [])

    def position(self, node: onnx.NodeProto) -> int:
        """Where a node stands in the graph as it was given."""
        return self._positions[id(node)]

    def replace(self, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
        """Put `new` (none, or several, the old one among them perhaps) where `node` is."""
        self._instead[id(node)] = list(new)

    def begin(self, *new: onnx.NodeProto) -> None:
        """Put `new` before all others."""
        self._first.extend(new)

    def constant(self, name: str, value: Any, kind: type = np.int64) -> str:
        """A small initializer; returns its name."""
        self.graph.initializer.append(numpy_helper.from_array(np.array(value, kind), name))
        return name

    def overridable(self, name: str, default: np.ndarray[Any, Any], shape: list[str | int]) -> str:
        """An input that may be left out: an initializer listed as input, of symbolic shape."""
        self.graph.initializer.append(numpy_helper.from_array(default, name))
        self.graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(default.dtype), shape))
        return name

    def finish(self) -> None:
        """Write the nodes back."""
        kept = [new for node in self._nodes for new in self._instead.get(id(node), [node])]
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in [*self._first, *kept]]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
