"""Every tunable tensor is proven live before a run, and one that is frozen in any way is refused by name."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from damage import rewrite_scoring
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import edgezo
from edgezo.errors import DeadTensorError, EdgeModelError
from edgezo.export import export_model
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.graph_file import disconnected
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.weights import MutableWeights

FUZZING = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(scope="module", params=tiny.CONFIGS)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edge model of each architecture; shared, never to be changed."""
    folder = tmp_path_factory.mktemp("live")
    return export_model(str(tiny.save(folder / "source", request.param)), folder / "edge").directory


def prove(model: EdgeModel, eps: float = 1e-3) -> None:
    """The proof with the weights of a run."""
    prove_live(model, MutableWeights(model.weights, eps=eps, threads=1))


def digest(model: EdgeModel) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in model.weights.values())).hexdigest()


def refusal(directory: Path) -> str:
    """The message with which the proof refuses: one line."""
    with pytest.raises(DeadTensorError) as caught:
        prove(EdgeModel(directory, threads=1))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{directory}: ")
    assert message.endswith("; export again, or leave them out with --tunable or --targets")
    return message


# live models


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_every_tensor_is_live_and_the_weights_are_put_back(architecture: Path, eps: float) -> None:
    model = EdgeModel(architecture, threads=1)
    weights = MutableWeights(model.weights, eps=eps, threads=1)
    before = digest(model)
    prove_live(model, weights)
    assert digest(model) == before


def test_the_session_that_was_proven_is_the_one_that_scores(exported_dir: Path) -> None:
    model = EdgeModel(exported_dir, threads=1)
    prove(model)
    before = model.log_probs(["the film"], [" is great"])
    for array in model.weights.values():
        array *= np.float32(1.5)
    assert model.log_probs(["the film"], [" is great"]) != before


def test_frozen_weights_need_no_proof(source_dir: Path, tmp_path: Path) -> None:
    directory = export_model(str(source_dir), tmp_path / "edge", tunable="norm").directory
    frozen = (directory / "frozen.bin").read_bytes()
    model = EdgeModel(directory, threads=1)
    assert len(model.weights) == 5
    before = digest(model)
    prove(model)
    assert digest(model) == before
    assert (directory / "frozen.bin").read_bytes() == frozen, "the engine maps it"


# frozen tensors


def stored(directory: Path, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in read_manifest(directory).tensors if tensor.name == name)
    return np.fromfile(directory / tensor.file, "<f4", tensor.size, offset=tensor.offset).reshape(tensor.shape)


def redirect(graph: onnx.GraphProto, old: str, new: str) -> int:
    """Let every consumer of `old` read `new`; returns how many."""
    places = [(node, index) for node in graph.node for index, name in enumerate(node.input) if name == old]
    for node, index in places:
        node.input[index] = new
    return len(places)


def remove_from_inputs(directory: Path, name: str) -> None:
    """(a) an initializer that is no input is a constant, which the engine folds and packs."""

    def change(graph: onnx.GraphProto) -> None:
        kept = [value for value in graph.input if value.name != name]
        assert len(kept) == len(graph.input) - 1
        del graph.input[:]
        graph.input.extend(kept)

    rewrite_scoring(directory, change)


def bake(directory: Path, name: str) -> None:
    """(b) the consumers read a constant copy."""

    def change(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(stored(directory, name), "baked"))
        assert redirect(graph, name, "baked")

    rewrite_scoring(directory, change)


def bake_behind_identity(directory: Path, name: str) -> None:
    """(c) the consumers read an Identity of a constant copy."""

    def change(graph: onnx.GraphProto) -> None:
        assert redirect(graph, name, "passed")
        graph.node.insert(0, helper.make_node("Constant", [], ["baked"], value=numpy_helper.from_array(stored(directory, name))))
        graph.node.insert(1, helper.make_node("Identity", ["baked"], ["passed"]))

    rewrite_scoring(directory, change)


CONSTANT, UNUSED, UNSEEN = (
    "they are constants of the scoring graph, not overridable initializers",
    "nothing in the scoring graph uses them",
    "the engine does not see their changes",
)
TENSORS = [
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
]


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(("freeze", "why"), [(remove_from_inputs, CONSTANT), (bake, UNUSED), (bake_behind_identity, UNUSED)])
def test_a_frozen_tensor_is_refused_by_name(edge_dir: Path, freeze: Callable[[Path, str], None], why: str, name: str) -> None:
    freeze(edge_dir, name)
    message = refusal(edge_dir)
    assert (
        message
        == f"{edge_dir}: 1 of 20 tunable tensors would not be tuned, {why}: {name}; export again, or leave them out with --tunable or --targets"
    )


def test_a_frozen_tensor_stops_a_run_before_its_first_step(edge_dir: Path, reviews: str, tmp_path: Path) -> None:
    bake(edge_dir, "model.norm.weight")
    with pytest.raises(DeadTensorError, match=r"1 of 20 .*: model\.norm\.weight;"):
        edgezo.tune(edge_dir, tmp_path / "run", data=reviews, steps=2, template="{text} It was", labels="terrible,great")
    assert not (tmp_path / "run" / "journal.bin").exists()


def test_many_frozen_tensors_are_counted_and_five_are_named(edge_dir: Path) -> None:
    names = [tensor.name for tensor in read_manifest(edge_dir).tunable[3:10]]
    for name in names:
        remove_from_inputs(edge_dir, name)
    message = refusal(edge_dir)
    assert f"7 of 20 tunable tensors would not be tuned, {CONSTANT}: {', '.join(names[:5])} and 2 more;" in message


def detach(model: EdgeModel, names: Iterable[str]) -> EdgeModel:
    """Make the scoring session, then move tensors to other memory: the engine keeps what it had, as if it had copied them."""
    assert model.scoring
    for name in names:
        model.weights[name] = model.weights[name].copy()
    return model


def test_each_tensor_that_the_engine_copied_is_refused_by_name(architecture: Path) -> None:
    """One tensor of each kind: a layer is like the others."""
    names = [tensor.name for tensor in read_manifest(architecture).tunable]
    for name in {tensor.kind: tensor.name for tensor in read_manifest(architecture).tunable}.values():
        model = detach(EdgeModel(architecture, threads=1), [name])
        weights = MutableWeights(model.weights, eps=1e-3, threads=1)
        before = digest(model)
        with pytest.raises(DeadTensorError) as caught:
            prove_live(model, weights)
        assert f": 1 of {len(names)} tunable tensors would not be tuned, {UNSEEN}: {name}; " in str(caught.value)
        assert digest(model) == before


def test_a_loss_of_generated_text_needs_the_generation_session_live_too(exported_dir: Path) -> None:
    names = [tensor.name for tensor in read_manifest(exported_dir).tunable]
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"):
        model = EdgeModel(exported_dir, threads=1)
        weights = MutableWeights(model.weights, eps=1e-3, threads=1)
        kept = model.weights[name]
        model.weights[name] = kept.copy()
        assert model.generation  # reads another copy
        model.weights[name] = kept
        prove_live(model, weights)
        with pytest.raises(DeadTensorError) as caught:
            prove_live(model, weights, generates=True)
        assert f": 1 of {len(names)} tunable tensors would not be tuned, {UNSEEN}: {name}; " in str(caught.value)
    model = EdgeModel(exported_dir, threads=1)
    prove_live(model, MutableWeights(model.weights, eps=1e-3, threads=1), generates=True)


def test_a_tensor_that_the_engine_copied_for_one_of_two_uses_is_refused_by_name(edge_dir: Path) -> None:
    """The session in use reads the tied embedding live in the lookup and as a copy in the head, a fresh one live in both."""
    graph = (edge_dir / "scoring.onnx").read_bytes()
    rewrite_scoring(edge_dir, lambda graph: bake_head(graph, stored(edge_dir, TENSORS[0])))
    model = EdgeModel(edge_dir, threads=1)
    assert model.scoring
    (edge_dir / "scoring.onnx").write_bytes(graph)
    with pytest.raises(DeadTensorError, match=TENSORS[0]):
        prove(model)


def bake_head(graph: onnx.GraphProto, values: np.ndarray) -> None:
    """Let every consumer of the embedding but the lookup read a constant copy."""
    graph.initializer.append(numpy_helper.from_array(values, "baked"))
    users = [node for node in graph.node if TENSORS[0] in node.input]
    assert sorted(node.op_type == "Gather" for node in users) == [False, True]
    for node in users:
        if node.op_type != "Gather":
            node.input[list(node.input).index(TENSORS[0])] = "baked"


def test_an_engine_that_sees_no_change_at_all_is_refused(exported_dir: Path) -> None:
    model = EdgeModel(exported_dir, threads=1)
    names = list(model.weights)
    with pytest.raises(DeadTensorError, match=f"20 of 20 tunable tensors would not be tuned, {UNSEEN}: .* and 15 more;"):
        prove(detach(model, names))


# what a graph file connects


def onnx_reach(graph: onnx.GraphProto) -> set[str]:
    """Names that the outputs depend on, as the onnx package reads them."""

    def inputs(node: onnx.NodeProto) -> list[str]:
        inner = [graph for attribute in node.attribute for graph in [attribute.g, *attribute.graphs]]
        return [*node.input, *(name for graph in inner for other in graph.node for name in inputs(other))]

    producers = {output: node for node in graph.node for output in node.output}
    reached: set[str] = set()
    waiting = [output.name for output in graph.output]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += inputs(producers[name]) if name in producers else []
    return reached


def all_names(graph: onnx.GraphProto) -> list[str]:
    nodes = [name for node in graph.node for name in [*node.input, *node.output]]
    return sorted({*nodes, *(value.name for value in [*graph.input, *graph.initializer])} - {""})


@pytest.mark.parametrize("file", ["scoring.onnx", "generation.onnx"])
def test_connections_are_those_that_onnx_reads(architecture: Path, file: str) -> None:
    graph = onnx.load(architecture / file, load_external_data=False).graph
    names = [*all_names(graph), "no such name"]
    reached = onnx_reach(graph)
    assert {"model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight"} & reached
    assert disconnected(architecture / file, names) == [name for name in names if name not in reached]


def float_graph(nodes: list[onnx.NodeProto], inputs: Iterable[str], outputs: Iterable[str]) -> onnx.ModelProto:
    values = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in names] for names in (inputs, outputs)]
    return helper.make_model(helper.make_graph(nodes, "graph", *values))


@pytest.mark.parametrize("depth", [1, 3])
def test_names_used_in_sub_graphs_are_connected(tmp_path: Path, depth: int) -> None:
    inner = [helper.make_node("Add", ["captured", "captured"], ["y0"])]
    for level in range(1, depth + 1):
        branches = [
            helper.make_graph(inner, "then", [], [helper.make_tensor_value_info(f"y{level - 1}", TensorProto.FLOAT, [1])]),
            helper.make_graph([helper.make_node("Neg", [f"other{level}"], ["n"])], "else", [], []),
        ]
        inner = [helper.make_node("If", ["flag"], [f"y{level}"], then_branch=branches[0], else_branch=branches[1])]
    names = ["captured", "flag", *(f"other{level}" for level in range(1, depth + 1))]
    onnx.save(float_graph(inner, [*names, "unused"], [f"y{depth}"]), tmp_path / "graph.onnx")
    assert disconnected(tmp_path / "graph.onnx", [*names, "unused"]) == ["unused"]


NODES = st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=4), st.integers(1, 2)), min_size=1, max_size=12)


@FUZZING
@given(nodes=NODES, outputs=st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_connections_of_random_graphs_are_those_that_onnx_reads(
    tmp_path_factory: pytest.TempPathFactory, nodes: list[tuple[list[int], int]], outputs: list[int]
) -> None:
    names = [f"input{index}" for index in range(5)]
    made = []
    for number, (inputs, count) in enumerate(nodes):
        results = [f"value{number}.{index}" for index in range(count)]
        made.append(helper.make_node("Custom", [names[index % len(names)] for index in inputs], results, domain="test"))
        names += results
    model = float_graph(made, names[:5], {names[index % len(names)] for index in outputs})
    path = tmp_path_factory.getbasetemp() / "random.onnx"
    onnx.save(model, path)
    reached = onnx_reach(model.graph)
    assert disconnected(path, names) == [name for name in names if name not in reached]


def test_a_truncated_graph_file_is_refused_in_one_line(exported_dir: Path, tmp_path: Path) -> None:
    data = (exported_dir / "scoring.onnx").read_bytes()
    path = tmp_path / "scoring.onnx"
    for length in [*range(40), *random.Random(0).sample(range(len(data) - 64), 100)]:
        path.write_bytes(data[:length])
        with pytest.raises(EdgeModelError) as caught:
            disconnected(path, ["model.norm.weight"])
        assert str(caught.value).startswith(f"{path}: not readable as an ONNX graph (")
        assert str(caught.value).endswith("); export the model again")
        assert len(str(caught.value).splitlines()) == 1


def reads_or_refuses(path: Path, data: bytes) -> None:
    """Neither another exception nor a name that was not asked for."""
    path.write_bytes(data)
    try:
        assert set(disconnected(path, ["model.norm.weight", "x"])) <= {"model.norm.weight", "x"}
    except EdgeModelError as error:
        assert len(str(error).splitlines()) == 1


@FUZZING
@given(data=st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda graph: b"\x3a" + bytes([len(graph)]) + graph)))
def test_random_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    reads_or_refuses(tmp_path_factory.getbasetemp() / "random.onnx", data)


@FUZZING
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_graph_file_with_random_changes_is_read_or_refused(
    exported_dir: Path, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]]
) -> None:
    data = bytearray((exported_dir / "scoring.onnx").read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    reads_or_refuses(tmp_path_factory.getbasetemp() / "random.onnx", bytes(data))


def test_sub_graphs_without_end_are_refused(tmp_path: Path) -> None:
    node = b""
    for _ in range(20_000):
        graph = b"\x0a" + varint(len(node)) + node  # GraphProto.node
        attribute = b"\x32" + varint(len(graph)) + graph  # AttributeProto.g
        node = b"\x2a" + varint(len(attribute)) + attribute  # NodeProto.attribute
    graph = b"\x0a" + varint(len(node)) + node
    path = tmp_path / "deep.onnx"
    path.write_bytes(b"\x3a" + varint(len(graph)) + graph)
    with pytest.raises(EdgeModelError, match="not readable as an ONNX graph"):
        disconnected(path, ["x"])


def varint(value: int) -> bytes:
    """A number in the protobuf wire format."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def test_a_manifest_that_names_a_tensor_the_graph_has_not_is_refused(edge_dir: Path) -> None:
    path = edge_dir / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["tensors"][0]["name"] = "model.other.weight"
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert f"1 of 20 tunable tensors would not be tuned, {UNUSED}: model.other.weight;" in refusal(edge_dir)
