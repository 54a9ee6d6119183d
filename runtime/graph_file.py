"""What an .onnx file connects and refers to, read with the protobuf wire format alone: the device half does without the onnx package.

Field numbers are those of onnx.proto (stable since IR version 3): ModelProto.graph = 7, functions = 25; GraphProto.node = 1,
initializer = 5, output = 12, sparse_initializer = 15; FunctionProto.node = 7; NodeProto.input = 1, output = 2, attribute = 5;
AttributeProto.t = 5, g = 6, tensors = 10, graphs = 11, sparse_tensor = 22, sparse_tensors = 23; SparseTensorProto.values = 1,
indices = 2; TensorProto.name = 8, external_data = 13; StringStringEntryProto.key = 1, value = 2; ValueInfoProto.name = 1.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from edgezo.errors import EdgeModelError

GRAPH_BYTES_LIMIT = 1 << 30
Found = TypeVar("Found")
MODEL, GRAPH, FUNCTION, NODE, ATTRIBUTE, SPARSE, TENSOR = "model", "graph", "function", "node", "attribute", "sparse", "tensor"
HOLDS = {  # the fields of a message that can hold tensors
    MODEL: {7: GRAPH, 25: FUNCTION},
    GRAPH: {1: NODE, 5: TENSOR, 15: SPARSE},
    FUNCTION: {7: NODE},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE},
    SPARSE: {1: TENSOR, 2: TENSOR},
}


def disconnected(path: Path, names: list[str]) -> list[str]:
    """Those of `names` that no output of the graph depends on.

    Raises:
        EdgeModelError: the file is not an ONNX graph.
    """
    reached = _read(path, _reached)
    return [name for name in names if name not in reached]


def external_files(path: Path) -> set[str]:
    """The files that tensors of the graph say they lie in, as written: the engine would open them.

    Raises:
        EdgeModelError: the file is not an ONNX graph.
    """
    return _read(path, lambda model: {location for tensor in _tensors(model, MODEL) for location in _locations(tensor)})


def without_initializers(path: Path, names: set[str]) -> bytes:
    """The graph with these initializers left out, so that they are plain inputs.

    Raises:
        EdgeModelError: the file is not an ONNX graph.
    """

    def strip(model: memoryview) -> bytes:
        parts: list[memoryview | bytes] = []
        for field, whole, value in _spans(model):
            if field == 7 and value is not None:
                kept = b"".join(part for inner, part, tensor in _spans(value) if inner != 5 or tensor is None or _name(tensor) not in names)
                parts += [_varint_bytes(7 << 3 | 2), _varint_bytes(len(kept)), kept]
            else:
                parts.append(whole)
        return b"".join(parts)

    return _read(path, strip)


def _read(path: Path, reading: Callable[[memoryview], Found]) -> Found:
    try:
        if path.stat().st_size > GRAPH_BYTES_LIMIT:
            raise ValueError("larger than 1 GB")
        return reading(memoryview(path.read_bytes()))
    except (ValueError, IndexError, UnicodeDecodeError, RecursionError) as error:
        raise EdgeModelError(f"{path}: not readable as an ONNX graph ({error}); export the model again") from None


def _name(tensor: memoryview) -> str:
    return next((str(value, "utf-8") for field, value in _fields(tensor) if field == 8), "")


def _tensors(message: memoryview, kind: str) -> Iterator[memoryview]:
    """Every TensorProto inside a message of this kind."""
    if kind == TENSOR:
        yield message
        return
    for field, value in _fields(message):
        if inner := HOLDS[kind].get(field):
            yield from _tensors(value, inner)


def _locations(tensor: memoryview) -> Iterator[str]:
    for field, entry in _fields(tensor):
        if field == 13:
            pair = {inner: str(value, "utf-8") for inner, value in _fields(entry)}
            if pair.get(1) == "location":
                yield pair.get(2, "")


def _reached(model: memoryview) -> set[str]:
    producers: dict[str, list[str]] = {}
    waiting: list[str] = []
    graphs = [value for field, value in _fields(model) if field == 7]
    if not graphs:
        raise ValueError("no graph in it")
    for graph in graphs:  # protobuf reads several as one
        for field, value in _fields(graph):
            if field == 1:
                inputs, outputs = _node(value)
                for output in outputs:
                    producers[output] = inputs
            elif field == 12:
                waiting += [str(part, "utf-8") for inner, part in _fields(value) if inner == 1]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += producers.get(name, [])
    return reached


def _node(node: memoryview) -> tuple[list[str], list[str]]:
    """Inputs (with all that its sub-graphs name) and outputs of one node."""
    inputs, outputs = [], []
    for field, value in _fields(node):
        if field == 1:
            inputs.append(str(value, "utf-8"))
        elif field == 2:
            outputs.append(str(value, "utf-8"))
        elif field == 5:
            for inner, graph in _fields(value):
                if inner in (6, 11):
                    for number, part in _fields(graph):
                        if number == 1:
                            inputs += _node(part)[0]
    return inputs, outputs


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, bytes) of every length-delimited field; numbers are skipped."""
    for field, _, value in _spans(message):
        if value is not None:
            yield field, value


def _spans(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """(field number, the whole field, the bytes it holds) of every field; a number holds None."""
    position = 0
    while position < len(message):
        begin = position
        key, position = _varint(message, position)
        kind, value = key & 7, None
        if kind == 0:
            _, position = _varint(message, position)
        elif kind == 1:
            position += 8
        elif kind == 5:
            position += 4
        elif kind == 2:
            length, position = _varint(message, position)
            if length > len(message) - position:
                raise ValueError("a field ends after the end of the file")
            value = message[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, message[begin:position], value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _varint_bytes(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
