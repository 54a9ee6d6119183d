"""Frozen weights in half precision: float16 in the file and in the products with them, float32 everywhere else."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edgezo.errors import ExportError
from edgezo.export.decoder import Weight
from edgezo.export.surgery import Surgery

LARGEST = 65504  # of float16


def round_to_half(weight: Weight) -> npt.NDArray[np.float16]:
    """The weight as float16; its own array is overwritten by these very values.

    Raises:
        ExportError: a value is beyond what float16 holds.
    """
    with np.errstate(over="ignore"):  # refused below
        half: npt.NDArray[np.float16] = weight.array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ExportError(
            f"{weight.name}: holds {np.abs(weight.array).max():.6g}, fp16 ends at {LARGEST}; export with --weights int8, or leave --weights out"
        )
    weight.array[...] = half
    return half


def multiply_in_half(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    """At every use of a float16 weight: y = float32(float16(float16(x) W)), or float32(W[ids]); a bias is added in float32.

    To be done last: until then a graph reads as if the weights were float32. Products of one x each get a cast of it, which
    `merge_equal_nodes` makes one.
    """
    surgery = Surgery(graph)
    for name in names:
        for node, _ in surgery.uses(name):
            if node.op_type == "Gather":
                surgery.replace(node, *_widened(node))
            else:
                for product, _ in surgery.uses(node.output[0]) if node.op_type == "Transpose" else [(node, 1)]:
                    surgery.replace(product, *_half_product(product))
    surgery.finish()


def keep_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let the CPU provider round as a device with float16 products does, when it runs the graph without optimisations.

    It multiplies in float32 and leaves out casts there and back between (onnxruntime 1.31); an Identity between them keeps both.
    """
    surgery = Surgery(model.graph)
    stored = {value.name for value in model.graph.initializer if value.data_type == TensorProto.FLOAT16}
    turned = {node.output[0] for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in stored}
    for node in model.graph.node:
        narrows = node.op_type == "Cast" and any(item.name == "to" and item.i == TensorProto.FLOAT16 for item in node.attribute)
        if narrows or (node.op_type in {"MatMul", "Gemm"} and node.input[1] in stored | turned):
            y = node.output[0]
            node.output[0] = f"{y}/rounded"
            surgery.replace(node, node, helper.make_node("Identity", [node.output[0]], [y]))
    surgery.finish()
    return model


def _half_product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, y, bias = node.input[0], node.output[0], [name for name in node.input[2:] if name]
    node.input[0], node.output[0] = f"{y}/given16", f"{y}/product" if bias else y
    del node.input[2:]
    return [
        helper.make_node("Cast", [x], [node.input[0]], to=TensorProto.FLOAT16),
        *_widened(node),
        *([helper.make_node("Add", [f"{y}/product", *bias], [y])] if bias else []),
    ]


def _widened(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The node, and its float16 output cast to float32."""
    y = node.output[0]
    node.output[0] = f"{y}/half"
    return [node, helper.make_node("Cast", [node.output[0]], [y], to=TensorProto.FLOAT)]
