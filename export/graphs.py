"""A traced graph to the two graphs of an edge model: scoring and generation (see docs/edge-model.md)."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgezo.adapters import ATTENTION, Adapter, LoraTarget
from edgezo.errors import ExportError
from edgezo.export.adapters import LINEAR, add_lora, add_prefix
from edgezo.export.attention_probe import add_attention_probe
from edgezo.export.decoder import Decoder, Part
from edgezo.export.half import multiply_in_half
from edgezo.export.head_rows import add_head_rows
from edgezo.export.simplify import merge_equal_nodes
from edgezo.manifest import ITEM_BYTES, Graph, PastState, Tensor

HIDDEN_ROWS, PAIR_ROWS, PAIR_TARGETS = "hidden_rows", "pair_rows", "pair_targets"
HIDDEN, LOG_PROBS, LOGITS = "hidden", "log_probs", "logits"
IR_VERSION = 8  # >= 4 makes initializers that are inputs overridable; 8 is read by onnxruntime 1.18
ELEMENTWISE = {"Cast", "Mul", "Div", "Add", "Sub", "Tanh", "Identity"}  # logit scaling and soft caps after the head
TYPES = {dtype: helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in ITEM_BYTES}


def scoring_graph(decoder: Decoder, adapter: Adapter | None = None, probes: Sequence[LoraTarget] = ()) -> tuple[onnx.ModelProto, Graph]:
    """The graph that tuning and evaluation run.

    log_probs[p] = log_softmax(head(hidden[pair_rows[p]]))[pair_targets[p]], hidden[h] = the final hidden state at flat position
    hidden_rows[h] of [batch * sequence]. The vocabulary projection sees the gathered rows alone. A classifier has one row of logits a
    row of the batch: hidden_rows are rows of [batch], pair_targets classes, hidden what the last linear layer of its head reads. Rows of
    the head can be changed by what is fed (export/head_rows.py), and so can the output projections of attention `probes`
    (export/attention_probe.py), whose inputs are a third output. With `adapter` it has the branch points of stacked LoRA, or a
    prefix before the first token.
    """
    model = _copy(decoder)
    graph = model.graph
    if adapter is not None and adapter.kind == "prefix":
        add_prefix(model, decoder)
    elif decoder.past_inputs:
        _remove_past(graph, decoder)
    if adapter is not None and adapter.kind == "lora":
        add_lora(model, adapter.targets, stacked=True)
    add_attention_probe(model, probes)
    logits, hidden = _gather_before_head(graph) if decoder.family != "classifier" else _gather_after_head(graph)
    logits = add_head_rows(model, logits, hidden)
    nodes = [
        helper.make_node("Cast", [logits], ["edgezo/logits32"], to=TensorProto.FLOAT),
        _log_sum_exp(opset(model)),
        helper.make_node("Unsqueeze", [PAIR_ROWS, "edgezo/axis1"], ["edgezo/pair_rows"]),
        helper.make_node("Unsqueeze", [PAIR_TARGETS, "edgezo/axis1"], ["edgezo/pair_targets"]),
        helper.make_node("Concat", ["edgezo/pair_rows", "edgezo/pair_targets"], ["edgezo/pairs"], axis=1),
        helper.make_node("GatherND", ["edgezo/logits32", "edgezo/pairs"], ["edgezo/picked"]),
        helper.make_node("Gather", ["edgezo/lse", PAIR_ROWS], ["edgezo/picked_lse"], axis=0),
        helper.make_node("Sub", ["edgezo/picked", "edgezo/picked_lse"], [LOG_PROBS]),
    ]
    graph.node.extend(nodes)
    graph.node.append(helper.make_node("Identity", [hidden], [HIDDEN]))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "edgezo/axis1"))
    for name in (HIDDEN_ROWS, PAIR_ROWS, PAIR_TARGETS):
        graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.INT64, [name.replace("rows", "count").replace("targets", "count")])
        )
    outputs: list[tuple[str, list[str | None]]] = [(LOG_PROBS, ["pair_count"]), (HIDDEN, ["hidden_count", None])]
    if probes:
        outputs.append((ATTENTION, ["probe_count", None]))
    _set_outputs(graph, outputs)
    multiply_in_half(graph, decoder.in_half)
    _prune(graph)
    merge_equal_nodes(graph)
    inputs = _fed(graph, decoder)
    return model, Graph(file="scoring.onnx", inputs=inputs, outputs=[name for name, _ in outputs])


def generation_graph(decoder: Decoder, adapter: Adapter | None = None, probes: Sequence[LoraTarget] = ()) -> tuple[onnx.ModelProto, Graph]:
    """The graph with a KV cache: logits [hidden_count, vocabulary] at the gathered rows, and the new keys and values."""
    model = _copy(decoder)
    graph = model.graph
    if adapter is not None and adapter.kind == "lora":
        add_lora(model, adapter.targets, stacked=False)
    add_attention_probe(model, probes)
    presents = [output for output in graph.output if output.name.startswith("present.")]
    logits = add_head_rows(model, *_gather_before_head(graph))
    graph.node.append(helper.make_node("Identity", [logits], [LOGITS]))
    graph.input.append(helper.make_tensor_value_info(HIDDEN_ROWS, TensorProto.INT64, ["hidden_count"]))
    kept = [onnx.ValueInfoProto.FromString(output.SerializeToString()) for output in presents]
    _set_outputs(graph, [(LOGITS, ["hidden_count", "vocabulary"])])
    graph.output.extend(kept)
    multiply_in_half(graph, decoder.in_half)
    _prune(graph)
    merge_equal_nodes(graph)
    past = []
    for value in decoder.past_inputs:
        dims = value.type.tensor_type.shape.dim
        past.append(
            PastState(
                input=value.name,
                output=value.name.replace("past_key_values.", "present."),
                heads=dims[1].dim_value,
                head_dim=dims[3].dim_value,
            )
        )
    inputs = [name for name in _fed(graph, decoder) if not name.startswith("past_key_values.")]
    return model, Graph(file="generation.onnx", inputs=inputs, outputs=[output.name for output in graph.output], past=past)


def attach_weights(model: onnx.ModelProto, tensors: Iterable[Tensor], parts: Mapping[str, Part] = MappingProxyType({})) -> None:
    """Turn the weight inputs into initializers in external files.

    A tunable one stays listed as an input too: an *overridable initializer*, which the engine neither folds nor pre-packs. So does a
    frozen one with several uses, such as a tied embedding: packed for one of them it would lie in memory twice.
    """
    graph = model.graph
    used = Counter(name for node in graph.node for name in node.input)
    stored = {tensor.name: tensor for tensor in tensors}
    names = stored.keys() | parts.keys()
    others = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(others)
    for name, tensor in stored.items():
        if name not in used:
            continue
        graph.initializer.append(_external(name, tensor, tensor.shape, tensor.offset))
        if tensor.tunable or (used[name] > 1 and not tensor.is_quantized):
            graph.input.append(helper.make_tensor_value_info(name, TYPES[tensor.dtype], tensor.shape))
    for name, part in parts.items():
        tensor = stored[part.tensor]
        row_bytes = tensor.nbytes // tensor.shape[0]
        graph.initializer.append(_external(name, tensor, [part.rows, *tensor.shape[1:]], tensor.offset + part.first * row_bytes))


def _external(name: str, tensor: Tensor, shape: list[int], offset: int) -> TensorProto:
    proto = TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=shape, data_location=TensorProto.EXTERNAL)
    length = math.prod(shape) * ITEM_BYTES[tensor.dtype]
    for key, value in (("location", tensor.file), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto


def unconnected(model: onnx.ModelProto, names: Iterable[str]) -> list[str]:
    """Those of `names` from which no path leads to the first output."""
    reached = _reach(model.graph, [model.graph.output[0].name])
    return [name for name in names if name not in reached]


def opset(model: onnx.ModelProto) -> int:
    """Version of the ONNX operators the model uses."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in {"", "ai.onnx"})


def _log_sum_exp(version: int) -> onnx.NodeProto:
    """Over the vocabulary; the axis is an attribute up to opset 17, an input after it."""
    if version < 18:
        return helper.make_node("ReduceLogSumExp", ["edgezo/logits32"], ["edgezo/lse"], axes=[-1], keepdims=0)
    return helper.make_node("ReduceLogSumExp", ["edgezo/logits32", "edgezo/minus_one"], ["edgezo/lse"], keepdims=0)


def _fed(graph: onnx.GraphProto, decoder: Decoder) -> list[str]:
    """Inputs that every run must feed: neither weights nor overridable."""
    given = decoder.weights.keys() | decoder.parts.keys() | {value.name for value in graph.initializer}
    return [value.name for value in graph.input if value.name not in given]


def _copy(decoder: Decoder) -> onnx.ModelProto:
    model = onnx.ModelProto.FromString(decoder.model.SerializeToString())
    model.ir_version = IR_VERSION
    del model.graph.value_info[:]
    model.producer_name = "edgezo"
    return model


def _remove_past(graph: onnx.GraphProto, decoder: Decoder) -> None:
    """Score without a cache: a join of past and new keys is the new keys; what asks for the past's shape sees an empty one."""
    names = {value.name for value in decoder.past_inputs}
    dims = decoder.past_inputs[0].type.tensor_type.shape.dim
    replace: dict[str, str] = {}
    kept = []
    for node in graph.node:
        past = [name for name in node.input if name in names]
        if node.op_type == "Concat" and past and len(node.input) == 2:
            replace[node.output[0]] = next(name for name in node.input if name not in names)
        else:
            kept.append(node)
    shape = np.array([dims[1].dim_value, 0, dims[3].dim_value], np.int64)
    graph.initializer.extend(
        [numpy_helper.from_array(shape, "edgezo/empty_shape"), numpy_helper.from_array(np.array([0], np.int64), "edgezo/zero")]
    )
    empty = [
        helper.make_node("Shape", ["input_ids"], ["edgezo/batch"], start=0, end=1),
        helper.make_node("Concat", ["edgezo/batch", "edgezo/empty_shape"], ["edgezo/past_shape"], axis=0),
        helper.make_node(
            "ConstantOfShape", ["edgezo/past_shape"], ["edgezo/past"], value=helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
        ),
    ]
    for node in kept:
        for index, name in enumerate(node.input):
            while name in replace:
                name = replace[name]
            node.input[index] = "edgezo/past" if name in names else name
    del graph.node[:]
    graph.node.extend(empty + kept)
    inputs = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(inputs)


def _gather_before_head(graph: onnx.GraphProto) -> tuple[str, str]:
    """Insert the gather of hidden rows before the vocabulary projection; returns the names of logits [H, V] and hidden [H, D]."""
    producers = {output: node for node in graph.node for output in node.output}
    node = _before_elementwise(producers, LOGITS)
    heads = [node] if node is not None else []
    if node is not None and node.op_type == "Concat":  # a large quantised projection comes in parts
        heads = [producers[given] for given in node.input if given in producers]
    if not heads or any(head.op_type not in LINEAR or head.input[0] != heads[0].input[0] for head in heads):
        found = heads[0].op_type if heads else "nothing"
        raise ExportError(
            f"the graph's logits come from {found}, not from a vocabulary projection (MatMul or Gemm); this architecture is not supported"
        )
    source = heads[0].input[0]
    # 3-D [batch, sequence, width] or already 2-D: the same flat rows
    insert = [
        helper.make_node("Shape", [source], ["edgezo/width"], start=-1),
        helper.make_node("Concat", ["edgezo/minus_one", "edgezo/width"], ["edgezo/flat_shape"], axis=0),
        helper.make_node("Reshape", [source, "edgezo/flat_shape"], ["edgezo/flat"]),
        helper.make_node("Gather", ["edgezo/flat", HIDDEN_ROWS], ["edgezo/hidden"], axis=0),
    ]
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "edgezo/minus_one"))
    for head in heads:
        head.input[0] = "edgezo/hidden"
    position = next(index for index, other in enumerate(graph.node) if heads[0].output[0] in other.output)
    for offset, new in enumerate(insert):
        graph.node.insert(position + offset, new)
    last = producers[LOGITS]
    last.output[list(last.output).index(LOGITS)] = "edgezo/head_logits"
    return "edgezo/head_logits", "edgezo/hidden"


def _gather_after_head(graph: onnx.GraphProto) -> tuple[str, str]:
    """Insert the gather of rows after the head of classes, which may hold branch points, and of what its last linear layer reads.

    Returns the names of logits [H, classes] and hidden [H, D].
    """
    producers = {output: node for node in graph.node for output in node.output}
    head = _before_elementwise(producers, LOGITS)
    if head is None or head.op_type not in LINEAR:
        raise ExportError(
            f"the logits of the classes come from {head.op_type if head else 'nothing'}, not from a linear layer (MatMul or Gemm); this architecture is not supported"
        )
    last = producers[LOGITS]
    last.output[list(last.output).index(LOGITS)] = "edgezo/class_logits"
    graph.node.append(helper.make_node("Gather", ["edgezo/class_logits", HIDDEN_ROWS], ["edgezo/head_logits"], axis=0))
    graph.node.append(helper.make_node("Gather", [head.input[0], HIDDEN_ROWS], ["edgezo/hidden"], axis=0))
    return "edgezo/head_logits", "edgezo/hidden"


def _before_elementwise(producers: Mapping[str, onnx.NodeProto], name: str) -> onnx.NodeProto | None:
    """The node that makes `name`, before additions, scalings and caps; the first input of an addition is followed."""
    while (node := producers.get(name)) is not None and node.op_type in ELEMENTWISE:
        name = next((given for given in node.input if given in producers and producers[given].op_type != "Constant"), "")
    return node


def _set_outputs(graph: onnx.GraphProto, outputs: list[tuple[str, list[str | None]]]) -> None:
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs)


def _prune(graph: onnx.GraphProto) -> None:
    """Remove nodes, inputs and initializers that no output needs."""
    reached = _reach(graph, [output.name for output in graph.output])
    nodes = [node for node in graph.node if any(output in reached for output in node.output)]
    inputs = [value for value in graph.input if value.name in reached]
    initializers = [value for value in graph.initializer if value.name in reached]
    for repeated, kept in ((graph.node, nodes), (graph.input, inputs), (graph.initializer, initializers)):
        del repeated[:]
        repeated.extend(kept)


def _reach(graph: onnx.GraphProto, names: list[str]) -> set[str]:
    """Every value name that the given ones depend on, themselves included (names used inside sub-graphs too)."""
    producers = {output: node for node in graph.node for output in node.output}
    reached: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        if name in producers:
            waiting.extend(_node_inputs(producers[name]))
    return reached


def _node_inputs(node: onnx.NodeProto) -> list[str]:
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            names.extend(name for inner in graph.node for name in _node_inputs(inner))
            names.extend(output.name for output in graph.output)
    return names
