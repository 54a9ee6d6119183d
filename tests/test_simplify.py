"""Nodes that compute the same, merged."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from edgezo.export.simplify import merge_equal_nodes


def make_model(nodes: list[onnx.NodeProto], outputs: list[str]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.arange(6, dtype=np.float32).reshape(2, 3)})


def constant(name: str, value: float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.FLOAT, [], [value]))


def test_equal_chains_become_one_and_results_stay() -> None:
    # the names inside the constants' own tensors are alike, as a tracer leaves them empty
    two = helper.make_tensor("", TensorProto.FLOAT, [], [2.0])
    nodes = [
        *(helper.make_node("Constant", [], [f"c{copy}"], value=two) for copy in range(3)),
        *(helper.make_node("Mul", ["x", f"c{copy}"], [f"y{copy}"]) for copy in range(3)),
        helper.make_node("Sum", ["y0", "y1", "y2"], ["z"]),
    ]
    model = make_model(nodes, ["z"])
    before = run(model)
    merge_equal_nodes(model.graph)
    assert [node.op_type for node in model.graph.node] == ["Constant", "Mul", "Sum"]
    assert np.array_equal(run(model)[0], before[0])


def test_other_attributes_inputs_or_values_stay_apart() -> None:
    nodes = [
        constant("c0", 1.0),
        constant("c1", 2.0),
        helper.make_node("Transpose", ["x"], ["t0"], perm=[0, 1]),
        helper.make_node("Transpose", ["x"], ["t1"], perm=[1, 0]),
        helper.make_node("Add", ["t0", "c0"], ["y0"]),
        helper.make_node("Add", ["t1", "c1"], ["y1"]),
    ]
    model = make_model(nodes, ["y0", "y1"])
    before = run(model)
    merge_equal_nodes(model.graph)
    assert len(model.graph.node) == 6
    assert all(np.array_equal(old, new) for old, new in zip(before, run(model), strict=True))


def test_outputs_and_random_draws_are_kept() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["y0"]),
        helper.make_node("Neg", ["x"], ["y1"]),
        helper.make_node("RandomNormalLike", ["x"], ["r0"]),
        helper.make_node("RandomNormalLike", ["x"], ["r1"]),
        helper.make_node("Sub", ["r0", "r1"], ["y2"]),
    ]
    model = make_model(nodes, ["y0", "y1", "y2"])
    merge_equal_nodes(model.graph)
    found = run(model)
    assert len(model.graph.node) == 5
    assert np.array_equal(found[0], found[1]) and found[2].any()


def test_what_a_sub_graph_reads_keeps_its_name() -> None:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["y1"], ["inner"])], "then", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    )
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [True])),
        helper.make_node("Neg", ["x"], ["y0"]),
        helper.make_node("Neg", ["x"], ["y1"]),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=inner, else_branch=inner),
        helper.make_node("Add", ["y0", "chosen"], ["z"]),
    ]
    model = make_model(nodes, ["z"])
    before = run(model)
    merge_equal_nodes(model.graph)
    assert np.array_equal(run(model)[0], before[0])
