"""Rows of the head that a run may change: an exact last layer is fed to a graph, not stored in it."""

import numpy as np
import onnx
from onnx import helper

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS
from edgezo.export.surgery import Surgery

CHANGED_LOGITS = "edgezo/changed_logits"


def add_head_rows(model: onnx.ModelProto, logits: str, hidden: str) -> str:
    """logits[:, tokens] += hidden @ rows, tokens int64 [K] and rows float32 [D, K] fed; the default has no rows, and leaves the base.

    Gather and scatter instead of a scatter that adds, which opset 11 has not; the engine scatters in place.

    Args:
        logits: name of the logits [H, vocabulary].
        hidden: name of what the head reads, [H, D].

    Returns:
        The name of the changed logits.
    """
    surgery = Surgery(model.graph)
    surgery.overridable(HEAD_TOKENS, np.zeros(0, np.int64), ["head_count"])
    surgery.overridable(HEAD_ROWS, np.zeros((1, 0), np.float32), ["width", "head_count"])
    one = surgery.constant("edgezo/head/one", [1])
    p = "edgezo/head/"
    surgery.finish()
    model.graph.node.extend(
        [
            # the default has one row of no columns: its width stands in where no rows are fed
            helper.make_node("Shape", [HEAD_ROWS], [p + "rows_width"], start=0, end=1),
            helper.make_node("Slice", [hidden, surgery.constant(p + "zero", [0]), p + "rows_width", one], [p + "read"]),
            helper.make_node("MatMul", [p + "read", HEAD_ROWS], [p + "change"]),
            helper.make_node("Gather", [logits, HEAD_TOKENS], [p + "old"], axis=1),
            helper.make_node("Add", [p + "old", p + "change"], [p + "new"]),
            helper.make_node("Shape", [p + "new"], [p + "shape"]),
            helper.make_node("Expand", [HEAD_TOKENS, p + "shape"], [p + "places"]),
            helper.make_node("ScatterElements", [logits, p + "places", p + "new"], [CHANGED_LOGITS], axis=1),
        ]
    )
    return CHANGED_LOGITS
