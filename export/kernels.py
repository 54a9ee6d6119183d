"""The ONNX graphs that do on a device what `NumPyPasses` does in memory. `python -m edgezo.export.kernels FOLDER` writes them.

They lie in runtime/kernels, since a device has no onnx package; a test compares them with this source. Opset 17 is the newest that onnxruntime 1.18 runs in full.
Every operator has a CUDA kernel; each float operation is rounded on its own, as in NumPy, so the bits agree.
"""

import sys
from pathlib import Path

import onnx.checker
import onnx.parser

HEADER = '<ir_version: 8, opset_import: ["": 17], producer_name: "edgezo">'
KERNELS = {
    # theta[b, i] += values[offsets[b] + i], b a block and values from `signs` or `quantiles`
    "windows": """(float[blocks, lanes] theta, int32[lanes] lane, float[size] values, int32[blocks, one] offsets) => (float[blocks, lanes] moved) {
        places = Add(offsets, lane)
        window = Gather(values, places)
        moved = Add(theta, window)
    }""",
    # for every grid: what is added where z = +-1, and its opposite for negated blocks
    "signs": """(float[table] signs, float[grids, one] plus, float[grids, one] minus) => (float[size] values)
    <float zero = {0}, int64[1] flat = {-1}> {
        positive = Greater(signs, zero)
        added = Where(positive, plus, minus)
        negated = Neg(added)
        both = Concat <axis = 1> (added, negated)
        values = Reshape(both, flat)
    }""",
    # d * sum over scales of times * floor(scale / d * table + dither), in double as docs/noise.md has it
    "quantiles": """(double[table] quantiles, double[grids, scales, one] ratios, double[scales, one] times, double[1] dither, double[grids, one] quanta)
    => (float[size] values) <int64[1] middle = {1}, int64[1] flat = {-1}> {
        scaled = Mul(ratios, quantiles)
        dithered = Add(scaled, dither)
        levels = Floor(dithered)
        counted = Mul(levels, times)
        total = ReduceSum <keepdims = 0> (counted, middle)
        amounts = Mul(total, quanta)
        added = Cast <to = 1> (amounts)
        negated = Neg(added)
        both = Concat <axis = 1> (added, negated)
        values = Reshape(both, flat)
    }""",
    # d * rint(theta / d)
    "round": """(float[size] theta, float[1] inverse, float[1] quantum) => (float[size] moved) {
        level = Mul(theta, inverse)
        whole = Round(level)
        moved = Mul(whole, quantum)
    }""",
    # theta - d * floor(rate / d * theta + dither)
    "decay": """(float[size] theta, float[1] rate, float[1] dither, float[1] quantum) => (float[size] moved) {
        level = Mul(theta, rate)
        dithered = Add(level, dither)
        whole = Floor(dithered)
        change = Mul(whole, quantum)
        moved = Sub(theta, change)
    }""",
    # [max |theta|, sum of 0 * theta]: the second is NaN when a value is NaN or infinite, which a maximum may pass over
    "largest": """(float[size] theta) => (float[two] found) <float zero = {0}, int64[1] one = {1}> {
        size = Abs(theta)
        most = ReduceMax <keepdims = 0> (size)
        nothing = Mul(theta, zero)
        finite = ReduceSum <keepdims = 0> (nothing)
        a = Reshape(most, one)
        b = Reshape(finite, one)
        found = Concat <axis = 0> (a, b)
    }""",
    "zeros": """(int64[1] size) => (float[size] made) {
        made = ConstantOfShape <value = float[1] {0}> (size)
    }""",
    "copy": "(float[size] given) => (float[size] moved) { moved = Identity(given) }",
}


def make_kernel(name: str) -> onnx.ModelProto:
    """One graph, checked."""
    model = onnx.parser.parse_model(f"{HEADER} {name} {KERNELS[name]}")
    onnx.checker.check_model(model, full_check=True)
    return model


if __name__ == "__main__":
    for kernel in KERNELS:
        Path(sys.argv[1], f"{kernel}.onnx").write_bytes(make_kernel(kernel).SerializeToString(deterministic=True))
