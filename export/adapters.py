"""Branch points: what an exported graph needs so that an adapter of any size can be fed to it, many directions at once.

Every adapter tensor is an overridable initializer of symbolic shape, whose default has rank (or tokens) 0: without an adapter the graph is
the base model.
"""

import re
from difflib import get_close_matches

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgezo.adapters import A_ROWS, A_SIGNS, B_ROWS, B_SIGNS, LoraTarget, prefix_inputs
from edgezo.config import ALL_LINEAR
from edgezo.errors import ConfigError, ExportError
from edgezo.export.decoder import Decoder, Weight
from edgezo.export.surgery import Surgery
from edgezo.export.weights import LAYER

LINEAR = {"MatMul", "Gemm", "MatMulNBits"}


def check_targets(targets: str) -> None:
    """Refuse an expression that cannot be one, before the minutes of loading."""
    if not targets:
        raise ConfigError(f"--targets '': empty; give {ALL_LINEAR}, names such as q_proj,v_proj, or a regular expression")
    if not _is_names(targets):
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(f"--targets {targets!r}: not a regular expression ({error})") from None


def linear_layer(surgery: Surgery, weight: Weight) -> LoraTarget:
    """The linear layer of a weight."""
    node = surgery.uses(weight.name)[0][0]
    transposed = node.op_type == "Transpose" or any(item.name == "transB" and item.i for item in node.attribute)
    out_first = weight.quantized is not None or transposed
    shape = weight.quantized.shape if weight.quantized else weight.array.shape
    out, width = shape if out_first else shape[::-1]
    return LoraTarget(module=weight.name.removesuffix(".weight"), in_features=width, out_features=out, out_first=out_first)


def find_targets(decoder: Decoder, targets: str) -> list[LoraTarget]:
    """The linear layers an expression means.

    Args:
        decoder: after `freeze`.
        targets: "all-linear" (every one of the layers, and a head of classes), names as q_proj,v_proj (the last part of a module's name), or a
            regular expression searched in the modules' names.

    Raises:
        ConfigError: nothing matches; near names are listed.
    """
    surgery = Surgery(decoder.model.graph)
    linear: dict[str, LoraTarget] = {}
    for weight in decoder.weights.values():
        uses = surgery.uses(weight.name)
        if not uses or any(place != 1 or node.op_type not in LINEAR for node, place in uses):
            continue
        target = linear_layer(surgery, weight)
        if decoder.family != "classifier" and not LAYER.search(f".{target.module}."):  # the head of words; that of classes is a target
            continue
        linear[target.module] = target
    if not linear:
        raise ExportError("no linear layer was found in this model's graph; --adapter lora cannot be used, try --adapter prefix")
    if targets == ALL_LINEAR:
        return list(linear.values())
    names = targets.split(",")
    if _is_names(targets):
        kinds = {module.split(".")[-1] for module in linear}
        missing = [name for name in names if name.strip() not in kinds]
        found = [target for module, target in linear.items() if module.split(".")[-1] in {name.strip() for name in names}]
    else:
        missing = []
        found = [target for module, target in linear.items() if re.search(targets, module)]
    if missing or not found:
        kinds = {module.split(".")[-1] for module in linear}
        asked = missing[0] if missing else targets
        near = get_close_matches(asked, kinds, cutoff=0.3) or sorted(kinds)
        raise ConfigError(
            f"--targets {targets!r}: {asked!r} matches none of the {len(linear)} linear layers; they are named like {next(iter(linear))}, near names are {', '.join(near[:5])}"
        )
    return found


def add_lora(model: onnx.ModelProto, targets: list[LoraTarget], *, stacked: bool) -> None:
    """Add y = W x + B_k A_k x to every target, k the direction that a row belongs to.

    The rows of a batch are in equal groups, one a copy. Copies are fed whole; with `stacked` also as copy (q, s) of B being B +
    rows[q, s] signs[q]^T, of A likewise, made layer by layer inside the graph: 32 whole copies outside would cost 30 % of SmolLM2-135M's
    memory, these 6 %, and some nodes a layer, which a forward of one token would feel.
    """
    surgery = Surgery(model.graph)
    grouped: set[str] = set()
    for index, target in enumerate(targets):
        # one output, not all: the branch of a base without adapter is a column of zeros; of rank 1, not 0, since products over no elements
        # are not zero before onnxruntime 1.20
        surgery.overridable(target.a, np.zeros((1, target.in_features, 1), np.float32), ["a_copies", target.in_features, "rank"])
        surgery.overridable(target.b, np.zeros((1, 1, 1), np.float32), ["b_copies", "rank", f"out{index}"])
    # ALBERT's layers share their weights: a target has several readers then, and one A and B
    readers = [
        (surgery.position(node), index, use, node)
        for index, target in enumerate(targets)
        for use, (node, _) in enumerate(surgery.uses(f"{target.module}.weight"))
    ]
    for _, index, use, node in sorted(readers, key=lambda reader: reader[0]):  # what targets share stands before the first of them
        target = targets[index]
        p, x, y, a, b = f"edgezo/lora{index}/", node.input[0], node.output[0], target.a, target.b
        p += f"use{use}/" if use else ""
        node.output[0] = base = p + "base"
        shared = [] if x in grouped else _group_input(x, target.in_features, stacked)
        grouped.add(x)
        branch = _stacked_branch(x, p, index, a, b) if stacked else _branch(x, p, a, b)
        surgery.replace(node, node, *shared, *branch, helper.make_node("Add", [base, p + "branch"], [y]))
    _add_groups(surgery, targets, _add_stacks(surgery, targets) if stacked else [])
    surgery.finish()


def add_prefix(model: onnx.ModelProto, decoder: Decoder) -> None:
    """Let the cache inputs of a scoring graph be a prefix [directions, heads, tokens, head_dim], repeated for the rows of its direction."""
    surgery = Surgery(model.graph)
    names = {value.name for value in decoder.past_inputs}
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    one = surgery.constant("edgezo/prefix/one", [1])
    ones = surgery.constant("edgezo/prefix/ones", [1, 1, 1])
    surgery.begin(helper.make_node("Shape", ["input_ids"], ["edgezo/prefix/batch"], start=0, end=1))
    for value in decoder.past_inputs:
        dims = value.type.tensor_type.shape.dim
        heads, head_dim = dims[1].dim_value, dims[3].dim_value
        layer, part = int(value.name.split(".")[1]), value.name.split(".")[2]
        given = surgery.overridable(
            prefix_inputs(layer)[part == "value"],
            np.zeros((1, heads, 0, head_dim), np.float32),
            ["directions", heads, "prefix_tokens", head_dim],
        )
        p = f"edgezo/{given}/"
        surgery.begin(
            helper.make_node("Shape", [given], [p + "directions"], start=0, end=1),
            helper.make_node("Shape", [given], [p + "one_shape"], start=1),
            helper.make_node("Div", ["edgezo/prefix/batch", p + "directions"], [p + "rows"]),
            helper.make_node("Concat", [one, p + "rows", ones], [p + "repeat"], axis=0),
            helper.make_node("Unsqueeze", [given, one], [p + "apart"]),
            helper.make_node("Expand", [p + "apart", p + "repeat"], [p + "repeated"]),
            helper.make_node("Concat", ["edgezo/prefix/batch", p + "one_shape"], [p + "shape"], axis=0),
            helper.make_node("Reshape", [p + "repeated", p + "shape"], [value.name], allowzero=1),
        )
    surgery.finish()


def _add_stacks(surgery: Surgery, targets: list[LoraTarget]) -> list[str]:
    """What all targets share: rows and signs split by target. Returns the names of their counts of copies, [directions, sides]."""
    count = len(targets)
    for axis, rows, signs, widths in (
        (3, B_ROWS, B_SIGNS, [target.out_features for target in targets]),
        (2, A_ROWS, A_SIGNS, [target.in_features for target in targets]),
    ):
        p = f"edgezo/lora/{rows}/"
        # symbols of their own: A may be left out where B is fed, and onnxruntime 1.18 makes one of Shapes of like symbols
        directions, sides, rank = (f"{rows}_{symbol}" for symbol in ("directions", "sides", "rank"))
        symbols: list[str | int] = [directions, sides, rank, count] if axis == 3 else [directions, sides, count, rank]
        surgery.overridable(rows, np.zeros((1, 1, *([1, count] if axis == 3 else [count, 1])), np.float32), symbols)
        surgery.overridable(signs, np.zeros((1, count), np.int8), [f"{signs}_directions", f"{signs}_width"])
        one, ones = surgery.constant(p + "one", [1]), surgery.constant(p + "ones", [1] * count)
        apart = surgery.constant(p + "axes", [1, 2] if axis == 3 else [1, 3])
        surgery.begin(
            helper.make_node("Shape", [rows], [p + "outer"], start=0, end=2),
            helper.make_node("Split", [rows, ones], [f"edgezo/lora{i}/{rows}" for i in range(count)], axis=axis),
            # widths of the targets; as many signs as targets are the default, one a target, so that nobody adds rows of zeros
            helper.make_node("Shape", [signs], [p + "given"], start=1),
            helper.make_node("Sub", [p + "given", surgery.constant(p + "count", [count])], [p + "more"]),
            helper.make_node("Min", [p + "more", one], [p + "used"]),
            helper.make_node("Mul", [p + "used", surgery.constant(p + "wider", [width - 1 for width in widths])], [p + "wide"]),
            helper.make_node("Add", [p + "wide", one], [p + "widths"]),
            helper.make_node("Unsqueeze", [signs, apart], [p + "signs"]),
            helper.make_node("Split", [p + "signs", p + "widths"], [f"edgezo/lora{i}/{signs}" for i in range(count)], axis=axis),
        )
    return [f"edgezo/lora/{rows}/outer" for rows in (B_ROWS, A_ROWS)]


def _add_groups(surgery: Surgery, targets: list[LoraTarget], counts: list[str]) -> None:
    """How the copies of a forward are counted, [directions, sides]; whole ones are of one direction. `counts` are those that are not whole."""
    first, counts = surgery.constant("edgezo/lora/one", [1]), list(counts)
    for name, given in (("b", targets[0].b), ("a", targets[0].a)):  # whole copies
        p = f"edgezo/lora/{name}_"
        surgery.begin(
            helper.make_node("Shape", [given], [p + "count"], start=0, end=1),
            helper.make_node("Concat", [first, p + "count"], [p + "copies"], axis=0),
        )
        counts.append(p + "copies")
    surgery.begin(helper.make_node("Max", counts, ["edgezo/lora/copies"]))
    minus_one = surgery.constant("edgezo/lora/minus_one", [-1])
    for width in {target.in_features for target in targets}:
        given = surgery.constant(f"edgezo/lora/in{width}", [width])
        surgery.begin(helper.make_node("Concat", ["edgezo/lora/copies", minus_one, given], [_grouped(width)], axis=0))


def _grouped(width: int) -> str:
    """Name of the shape [directions, sides, rows * tokens, width]."""
    return f"edgezo/lora/grouped{width}"


def _group_input(x: str, width: int, stacked: bool) -> list[onnx.NodeProto]:
    """What the targets that read `x` share: its rows by copy, the shape to come back to, and with `stacked` a one."""
    p = f"edgezo/lora/{x}/"
    late = [
        # batch / batch: a one that the engine cannot know before the layer runs, or it would make the copies of all layers first
        helper.make_node("Shape", [x], [p + "batch"], start=0, end=1),
        helper.make_node("Div", [p + "batch", p + "batch"], [p + "late"]),
    ]
    return [
        *(late if stacked else []),
        helper.make_node("Shape", [x], [p + "places"], end=-1),
        helper.make_node("Concat", [p + "places", "edgezo/lora/minus_one"], [p + "as_base"], axis=0),
        helper.make_node("Reshape", [x, _grouped(width)], [p + "x"]),
    ]


def _stacked_branch(x: str, p: str, index: int, a: str, b: str) -> list[onnx.NodeProto]:
    split, shared, nodes = f"edgezo/lora{index}/", f"edgezo/lora/{x}/", []
    for tensor, rows, signs in ((a, A_ROWS, A_SIGNS), (b, B_ROWS, B_SIGNS)):
        q = f"{p}{signs}/"
        nodes += [
            helper.make_node("Expand", [split + rows, shared + "late"], [q + "rows"]),
            helper.make_node("Cast", [split + signs], [q + "float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [q + "rows", q + "float"], [q + "product"]),
            helper.make_node("Add", [q + "product", tensor], [q + "copies"]),
        ]
    return [*nodes, *_branch(x, p, f"{p}{A_SIGNS}/copies", f"{p}{B_SIGNS}/copies")]


def _branch(x: str, p: str, a: str, b: str) -> list[onnx.NodeProto]:
    shared = f"edgezo/lora/{x}/"
    return [
        helper.make_node("MatMul", [shared + "x", a], [p + "low"]),
        helper.make_node("MatMul", [p + "low", b], [p + "high"]),
        helper.make_node("Reshape", [p + "high", shared + "as_base"], [p + "branch"]),
    ]


def _is_names(targets: str) -> bool:
    return re.fullmatch(r"\w+(\s*,\s*\w+)*", targets) is not None
