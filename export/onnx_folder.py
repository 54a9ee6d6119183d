"""A folder with an optimum-style decoder `model.onnx` as a source: Hugging Face names and ties are found again."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper, version_converter

from edgezo.errors import ExportError, first_line
from edgezo.export.decoder import Decoder, Weight
from edgezo.export.graphs import opset
from edgezo.export.quiet import quiet
from edgezo.export.source import Source, sizes
from edgezo.manifest import Origin

OLDEST_OPSET = 15  # the first whose Shape takes start and end
INTEGER_ACTIVATIONS = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"}
CONSTANT_SIZE = 8  # initializers of up to this many elements are the graph's own constants


def load_onnx_folder(folder: Path) -> Source:
    """Load `folder`/model.onnx with its config.json and tokenizer; the reference to check against is onnxruntime on that file.

    Raises:
        ExportError: the folder is not complete, or the graph has no KV cache or is no plain decoder.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except Exception as error:
        raise ExportError(f"{folder}: model.onnx needs config.json and tokenizer.json beside it: {first_line(error)}") from error
    try:
        model = onnx.load(folder / "model.onnx")
    except Exception as error:
        raise ExportError(f"{folder / 'model.onnx'}: not readable as ONNX ({type(error).__name__})") from error
    integer = sorted({node.op_type for node in model.graph.node} & INTEGER_ACTIVATIONS)
    if integer:
        raise ExportError(
            f"{folder / 'model.onnx'}: computes with int8 activations ({integer[0]}); their rounding drowns the difference of losses that tuning measures (a projected gradient of 9454 instead of 7.1 at eps 1e-5), export from fp32 with --weights int8 or int4"
        )
    names = {value.name for value in model.graph.input}
    if "input_ids" not in names or not any(name.startswith("past_key_values.") for name in names):
        raise ExportError(
            f"{folder / 'model.onnx'}: has inputs {sorted(names)[:4]}, not those of a decoder with past_key_values; export it with optimum's task text-generation-with-past"
        )
    origin = Origin(id=folder.resolve().name, **sizes(config))
    eos = config.eos_token_id
    return Source(
        origin,
        _decoder(model, _parameter_names(config)),
        _Reference(folder / "model.onnx"),
        tokenizer,
        config,
        eos if isinstance(eos, list) else [] if eos is None else [eos],
    )


def _parameter_names(config: Any) -> dict[str, list[str]]:
    """Hugging Face name of every parameter to the names tied to it, from a model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ExportError(f"config.json beside model.onnx: transformers cannot make a model of it: {first_line(error)}") from error
    first = {id(parameter): name for name, parameter in network.named_parameters()}
    names: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name != first[id(parameter)]:
            names[first[id(parameter)]].append(name)
    return names


def _decoder(model: onnx.ModelProto, parameters: dict[str, list[str]]) -> Decoder:
    """Move the large initializers out of the graph, under their Hugging Face names."""
    graph = model.graph
    consumers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, node)
    weights: dict[str, Weight] = {}
    renamed: dict[str, str] = {}
    constants = []
    for initializer in graph.initializer:
        array = numpy_helper.to_array(initializer)
        if array.size <= CONSTANT_SIZE or array.dtype.kind != "f":
            constants.append(initializer)
            continue
        name, transposed = _hugging_face_name(initializer.name, consumers.get(initializer.name), parameters)
        trainable = "::" not in name
        weights[name] = Weight(name=name, array=array.astype(np.float32, copy=False), trainable=trainable, transposed=transposed)
        renamed[initializer.name] = name
    del graph.initializer[:]
    graph.initializer.extend(constants)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    _tie_head(graph, weights)
    for name, weight in weights.items():  # what optimum had tied already
        weight.tied_to = weight.tied_to or [other for other in parameters.get(name, []) if other not in weights]
    graph.input.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, weight.array.shape) for name, weight in weights.items())
    if opset(model) < OLDEST_OPSET:
        model = version_converter.convert_version(model, OLDEST_OPSET)
    return Decoder(model, weights)


def _hugging_face_name(name: str, consumer: onnx.NodeProto | None, parameters: dict[str, list[str]]) -> tuple[str, bool]:
    """`onnx::MatMul_123` used by /model/layers.0/mlp/up_proj/MatMul is model.layers.0.mlp.up_proj.weight, transposed.

    Some architectures (OPT) lose the head of their path in the scope; it is found again among the `parameters`.
    """
    if not name.startswith("onnx::") or consumer is None or consumer.op_type not in {"MatMul", "Gemm"} or "/" not in consumer.name:
        return name, False
    scope = ".".join(consumer.name.strip("/").split("/")[:-1]) + ".weight"
    whole = [known for known in parameters if known == scope or known.endswith(f".{scope}")]
    return whole[0] if len(whole) == 1 else scope, consumer.op_type == "MatMul"


def _tie_head(graph: onnx.GraphProto, weights: dict[str, Weight]) -> None:
    """A head that repeats the embedding, transposed or not, becomes the embedding itself: stored once, tuned once."""
    embedding = next((w for w in weights.values() if any(n.op_type == "Gather" and n.input[0] == w.name for n in graph.node)), None)
    if embedding is None:
        return
    for name, weight in list(weights.items()):
        if name == embedding.name or weight.array.size != embedding.array.size:
            continue
        same = weight.array.shape == embedding.array.shape and np.array_equal(weight.array, embedding.array)
        turned = weight.array.shape == embedding.array.shape[::-1] and np.array_equal(weight.array.T, embedding.array)
        if not same and not turned:
            continue
        used = embedding.name
        if turned:
            used = f"{name}/tied"
            graph.node.insert(0, helper.make_node("Transpose", [embedding.name], [used], perm=[1, 0]))
        for node in graph.node:
            for index, given in enumerate(node.input):
                if given == name:
                    node.input[index] = used
        embedding.tied_to.append(name)
        del weights[name]


class _Reference:
    """Logits of the given file itself."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"{path}: onnxruntime cannot load it: {first_line(error)}") from error

    def __call__(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        batch, length = tokens.shape
        feeds: dict[str, Any] = {}
        for value in self.session.get_inputs():
            if value.name == "input_ids":
                feeds[value.name] = tokens
            elif value.name == "attention_mask":
                feeds[value.name] = np.ones_like(tokens)
            elif value.name == "position_ids":
                feeds[value.name] = np.tile(np.arange(length, dtype=np.int64), (batch, 1))
            elif value.name.startswith("past_key_values."):
                feeds[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
            else:
                raise ExportError(
                    f"model.onnx: unknown input {value.name!r}; edgezo feeds input_ids, attention_mask, position_ids and past_key_values"
                )
        result: npt.NDArray[np.float32] = np.asarray(self.session.run(["logits"], feeds)[0], np.float32)
        return result
