"""Frozen weights as the engine likes them: linear weights transposed once at export, in half precision, or quantised weight-only to int8 or int4."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edgezo.export.decoder import Decoder, Part, Weight
from edgezo.export.half import round_to_half
from edgezo.export.surgery import Surgery, Use
from edgezo.export.weights import LAYER
from edgezo.quantization import Precision, Quantized

BLOCK = 32  # elements of a row that share a scale; the smallest that MatMulNBits takes
BITS = {"int8": 8, "int4": 4}
SCALE_FACTORS = (1.0, 0.95, 0.9, 0.85, -1.0, -0.95, -0.9, -1.1)  # of max|w| / 2**(bits - 1): the best of these per block
ROWS_AT_ONCE = 4096
PART_ROWS = 1024  # of a vocabulary projection in one product; unpacked to float32 they take 2.4 MB where the width is 576
FP32_COMPUTE = 1  # accuracy_level of MatMulNBits; 4 would round activations to int8


def freeze(decoder: Decoder, frozen: Iterable[str], precision: Precision) -> None:
    """Rewrite the decoder's graph and weights in place for weights that never change.

    A weight that is used as Transpose and MatMul is stored transposed, so that the engine packs it straight from the file, without a
    folded copy in between. With int8 or int4 the weights of linear layers and the token embedding become blocks of integers:
    w[o, i] = scales[o, i // 32] * (q[o, i] - 2**(bits - 1)), with fp16 they become float16; the arrays of `decoder` are overwritten by
    these very values, so that a source model that shares them is the model to compare with.
    """
    surgery = Surgery(decoder.model.graph)
    ids = {"input_ids", *(node.output[0] for node, index in surgery.uses("input_ids") if node.op_type == "Reshape" and index == 0)}
    for name in frozen:
        weight, uses = decoder.weights[name], surgery.uses(name)
        linear = [use for use in uses if _is_linear(surgery, *use)]
        lookups = [node for node, index in uses if node.op_type == "Gather" and index == 0 and node.input[1] in ids]
        fits = bool(uses) and len(linear) + len(lookups) == len(uses)
        if fits and precision in BITS:
            if not (lookups and weight.array.shape[1] % BLOCK):
                _quantize_uses(decoder, surgery, weight, linear, lookups, BITS[precision])
            continue
        if fits and precision == "fp16":
            weight.array = round_to_half(weight)
        if linear and len(linear) == len(uses) and all(node.op_type == "Transpose" for node, _ in uses):
            for transpose, _ in uses:
                for node, index in surgery.uses(transpose.output[0]):
                    node.input[index] = name
                surgery.replace(transpose)
            weight.array = np.ascontiguousarray(weight.array.T)
            weight.transposed = not weight.transposed
        if fits:
            _set_input(surgery.graph, name, helper.np_dtype_to_tensor_dtype(weight.array.dtype), weight.array.shape)
    surgery.finish()


def quantize(rows: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Symmetric blockwise rounding, the scale of least squared error among a few.

    Args:
        rows: float32 [out, in].
        bits: 4 or 8.

    Returns:
        q uint8 [out, ceil(in / 32), 32 * bits / 8], for 4 bits two a byte, the first low; scales float32 [out, ceil(in / 32)].
    """
    out, width = rows.shape
    blocks = -(-width // BLOCK)
    packed = np.empty((out, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.empty((out, blocks), np.float32)
    half = 1 << (bits - 1)
    for first in range(0, out, ROWS_AT_ONCE):
        part = np.pad(rows[first : first + ROWS_AT_ONCE], ((0, 0), (0, blocks * BLOCK - width))).reshape(-1, blocks, BLOCK)
        peak = np.take_along_axis(part, np.abs(part).argmax(-1)[..., None], -1)[..., 0]
        best = np.full(peak.shape, np.inf, np.float32)
        level = np.empty(part.shape, np.int16)
        for factor in SCALE_FACTORS:
            scale = np.where(peak == 0, 1, peak * np.float32(-factor / half)).astype(np.float32)
            tried = np.clip(np.rint(part / scale[..., None]), -half, half - 1)
            error = np.square(tried * scale[..., None] - part).sum(-1)
            better = error < best
            best[better], level[better] = error[better], tried[better]
            scales[first : first + ROWS_AT_ONCE][better] = scale[better]
        stored = (level + half).astype(np.uint8)
        packed[first : first + ROWS_AT_ONCE] = stored if bits == 8 else stored[..., ::2] | (stored[..., 1::2] << 4)
    return packed, scales


def _quantize_uses(decoder: Decoder, surgery: Surgery, weight: Weight, linear: list[Use], lookups: list[onnx.NodeProto], bits: int) -> None:
    name, graph = weight.name, surgery.graph
    as_stored = weight.array if lookups or _is_out_in(linear[0][0]) else weight.array.T
    packed, scales = quantize(as_stored, bits)
    facts = Quantized(bits=bits, block=BLOCK, shape=list(as_stored.shape), scales=f"{name}.scales")  # type: ignore[arg-type]
    as_stored[...] = facts.dequantize(packed, scales)
    turned = weight.transposed != (as_stored is not weight.array)
    decoder.weights[name] = Weight(name, packed, False, turned, weight.tied_to, facts)
    decoder.weights[facts.scales] = Weight(facts.scales, scales.reshape(-1), False)
    _set_input(graph, name, TensorProto.UINT8, packed.shape)
    graph.input.append(helper.make_tensor_value_info(facts.scales, TensorProto.FLOAT, [scales.size]))
    for node, _ in linear:
        if node.op_type == "Transpose":
            surgery.replace(node)
        for matmul, _ in surgery.uses(node.output[0]) if node.op_type == "Transpose" else [(node, 1)]:
            surgery.replace(matmul, *_matmul_n_bits(decoder, matmul, facts, name))
    for index, lookup in enumerate(lookups):
        surgery.replace(lookup, *_quantized_lookup(surgery, lookup, facts, f"edgezo/embedding{index}/"))
    if not any(entry.domain == "com.microsoft" for entry in decoder.model.opset_import):
        decoder.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _is_linear(surgery: Surgery, node: onnx.NodeProto, index: int) -> bool:
    """Whether a weight is used here as that of a linear layer: Transpose before MatMuls, MatMul, or plain Gemm."""
    if node.op_type == "Transpose":
        after = surgery.uses(node.output[0])
        return bool(after) and all(other.op_type == "MatMul" and place == 1 for other, place in after)
    return index == 1 and (node.op_type == "MatMul" or (node.op_type == "Gemm" and _is_plain(node)))


def _is_plain(gemm: onnx.NodeProto) -> bool:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in gemm.attribute}
    return attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)


def _is_out_in(node: onnx.NodeProto) -> bool:
    """Whether the array of a linear layer's weight lies as [out, in]."""
    return node.op_type == "Transpose" or any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _matmul_n_bits(decoder: Decoder, node: onnx.NodeProto, facts: Quantized, name: str) -> list[onnx.NodeProto]:
    """y = x W, the vocabulary projection by parts of W: the engine unpacks all of an int8 weight to float32 for every product."""
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else None
    out, width = facts.shape
    product = f"{node.output[0]}/matmul" if bias else node.output[0]
    bounds = [0] if LAYER.search(name) else list(range(0, out, PART_ROWS))
    nodes, names = [], []
    for number, first in enumerate(bounds):
        rows = min(PART_ROWS, out - first) if len(bounds) > 1 else out
        weight, scales, result = name, facts.scales, product
        if len(bounds) > 1:
            weight, scales, result = (f"{part}/part{number}" for part in (name, facts.scales, product))
            blocks = facts.packed_shape[1]
            for part, tensor, kind, shape in (
                (weight, name, TensorProto.UINT8, [rows, *facts.packed_shape[1:]]),
                (scales, facts.scales, TensorProto.FLOAT, [rows * blocks]),
            ):
                if part not in decoder.parts:
                    decoder.parts[part] = Part(tensor, first if tensor == name else first * blocks, shape[0])
                    decoder.model.graph.input.append(helper.make_tensor_value_info(part, kind, shape))
        names.append(result)
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [node.input[0], weight, scales],
                [result],
                domain="com.microsoft",
                K=width,
                N=rows,
                bits=facts.bits,
                block_size=facts.block,
                accuracy_level=FP32_COMPUTE,
                name=f"{node.name}/{number}" if number else node.name,
            )
        )
    if len(names) > 1:
        nodes.append(helper.make_node("Concat", names, [product], axis=-1))
    return [*nodes, helper.make_node("Add", [product, bias], [node.output[0]])] if bias else nodes


def _quantized_lookup(surgery: Surgery, node: onnx.NodeProto, facts: Quantized, prefix: str) -> list[onnx.NodeProto]:
    """Rows of the table, unpacked with plain operators that every engine version has."""
    out, width = facts.shape
    blocks = -(-width // facts.block)
    table, ids = node.input
    grid, last = surgery.constant(prefix + "grid", [out, blocks]), surgery.constant(prefix + "last", [-1])
    nodes = [
        helper.make_node("Reshape", [facts.scales, grid], [prefix + "scale_rows"]),
        helper.make_node("Gather", [prefix + "scale_rows", ids], [prefix + "scales"], axis=0),
        helper.make_node("Unsqueeze", [prefix + "scales", last], [prefix + "scale"]),
        helper.make_node("Gather", [table, ids], [prefix + "bytes"], axis=0),
    ]
    level = prefix + "bytes"
    if facts.bits == 4:
        sixteen = surgery.constant(prefix + "sixteen", 16, np.int32)
        shape = surgery.constant(prefix + "block", [0, 0, blocks, facts.block])
        nodes += [
            helper.make_node("Cast", [level], [prefix + "wide"], to=TensorProto.INT32),
            helper.make_node("Mod", [prefix + "wide", sixteen], [prefix + "low"]),
            helper.make_node("Div", [prefix + "wide", sixteen], [prefix + "high"]),
            helper.make_node("Unsqueeze", [prefix + "low", last], [prefix + "low1"]),
            helper.make_node("Unsqueeze", [prefix + "high", last], [prefix + "high1"]),
            helper.make_node("Concat", [prefix + "low1", prefix + "high1"], [prefix + "pairs"], axis=-1),
            helper.make_node("Reshape", [prefix + "pairs", shape], [prefix + "levels"]),
        ]
        level = prefix + "levels"
    half = surgery.constant(prefix + "half", float(1 << (facts.bits - 1)), np.float32)
    return [
        *nodes,
        helper.make_node("Cast", [level], [prefix + "float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [prefix + "float", half], [prefix + "centred"]),
        helper.make_node("Mul", [prefix + "centred", prefix + "scale"], [prefix + "rows"]),
        helper.make_node("Reshape", [prefix + "rows", surgery.constant(prefix + "width", [0, 0, width])], [node.output[0]]),
    ]


def _set_input(graph: onnx.GraphProto, name: str, kind: int, shape: tuple[int, ...]) -> None:
    value = next(value for value in graph.input if value.name == name)
    value.CopyFrom(helper.make_tensor_value_info(name, kind, list(shape)))
