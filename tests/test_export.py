"""An export holds every parameter of its source bit for bit, scores as the source does, and tunes what is chosen."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import tiny
import torch
import transformers
from exports import refusal, save_changed, stored

from edgezo.adapters import OPTIONAL_INPUTS, PROBE_ROWS
from edgezo.errors import ConfigError
from edgezo.export import export_model
from edgezo.manifest import Graph, Manifest, Tensor
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.model import EdgeModel

PROMPT = np.array([[5, 270, 17, 301, 88, 264, 19, 300, 42, 7]])
FACTS_LIMIT = 1 << 20  # bytes that two graphs without weights stay well below


class Exported:
    """One architecture: the torch model, the edge model's directory, and what its manifest says."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.model = tiny.make_model(name)
        self.manifest: Manifest = read_manifest(directory)
        self.tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in self.manifest.tensors}

    @property
    def parameters(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: parameter.detach().numpy() for name, parameter in self.model.named_parameters()}


@pytest.fixture(scope="session", params=tiny.CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("architecture")
    tiny.save(folder / "source", request.param)
    directory = export_model(str(folder / "source"), folder / "edge").directory
    shutil.rmtree(folder / "source")
    return Exported(request.param, directory)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def torch_logits(model: Any) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.from_numpy(PROMPT), use_cache=False).logits.numpy()
    return logits


def feeds(graph: Graph, seen: int, tokens: npt.NDArray[np.int64], **more: Any) -> dict[str, Any]:
    """Inputs for one row of `tokens` after `seen` others."""
    length = tokens.shape[1]
    known = {
        "input_ids": tokens,
        "attention_mask": np.ones((1, seen + length), np.int64),
        "position_ids": np.arange(seen, seen + length)[None],
        "hidden_rows": np.arange(length),
        **more,
    }
    return {name: known[name] for name in graph.inputs}


# every architecture


def test_every_parameter_is_a_tunable_tensor_with_its_name_shape_and_exact_values(exported: Exported) -> None:
    parameters = exported.parameters
    assert {tensor.name for tensor in exported.manifest.tunable} == parameters.keys()
    for name, expected in parameters.items():
        found = stored(exported.directory, exported.tensors[name])
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert found.tobytes() == expected.tobytes(), name


def test_a_tied_head_is_stored_once(exported: Exported) -> None:
    embedding = exported.manifest.tensors[0].name
    tied = {tensor.name: tensor.tied_to for tensor in exported.manifest.tensors if tensor.tied_to}
    assert tied == ({} if exported.name == "llama-untied" else {embedding: ["lm_head.weight"]})
    assert ("lm_head.weight" in exported.tensors) == (exported.name == "llama-untied")


def test_the_check_against_the_source_is_recorded_and_close(exported: Exported) -> None:
    checked = exported.manifest.verification
    assert checked is not None
    assert 0 <= checked.largest_log_prob_difference < 1e-4
    assert checked.greedy_tokens_equal == 16
    assert checked.onnxruntime == onnxruntime.__version__


def test_the_tensors_of_each_layer_are_told_apart(exported: Exported) -> None:
    kinds: dict[int | None, list[str]] = {}
    for tensor in exported.manifest.tensors:
        kinds.setdefault(tensor.layer, []).append(tensor.kind)
    assert kinds.keys() == {None, 0, 1}
    assert sorted(kinds[0]) == sorted(kinds[1])
    assert len(set(kinds[0])) == len(kinds[0])


def test_the_scoring_graph_gives_the_sources_log_probs_in_plain_onnxruntime(exported: Exported, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exported.directory, tmp_path / "elsewhere"))
    graph = exported.manifest.scoring
    targets = PROMPT[0, 1:]
    given = feeds(graph, 0, PROMPT, hidden_rows=np.arange(9), pair_rows=np.arange(9), pair_targets=targets)
    found, hidden = session(moved / graph.file).run(["log_probs", "hidden"], given)
    expected = torch.log_softmax(torch.from_numpy(torch_logits(exported.model)[0, :-1]).double(), -1).numpy()
    assert np.abs(found - expected[np.arange(9), targets]).max() < 1e-4
    assert hidden.shape == (9, exported.manifest.origin.hidden_size)


def test_the_generation_graph_gives_the_sources_logits_through_its_cache(exported: Exported, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exported.directory, tmp_path / "elsewhere"))
    graph = exported.manifest.generation
    engine = session(moved / graph.file)
    past = {state.input: np.zeros((1, state.heads, 0, state.head_dim), np.float32) for state in graph.past}
    outputs = ["logits", *(state.output for state in graph.past)]
    found = []
    for start, stop in ((0, 6), (6, 7), (7, 10)):
        logits, *present = engine.run(outputs, {**feeds(graph, start, PROMPT[:, start:stop]), **past})
        past = {state.input: value for state, value in zip(graph.past, present, strict=True)}
        found.append(logits)
    assert np.abs(np.concatenate(found) - torch_logits(exported.model)[0]).max() < 1e-4


def test_every_tunable_tensor_is_an_overridable_initializer_of_the_scoring_graph(exported: Exported) -> None:
    listed = {value.name for value in session(exported.directory / exported.manifest.scoring.file).get_overridable_initializers()}
    assert listed - OPTIONAL_INPUTS == exported.parameters.keys()
    assert listed & OPTIONAL_INPUTS >= OPTIONAL_INPUTS - {PROBE_ROWS}


def test_the_graphs_hold_no_weight_and_point_to_no_other_directory(exported: Exported) -> None:
    for graph in (exported.manifest.scoring, exported.manifest.generation):
        model = onnx.load(exported.directory / graph.file, load_external_data=False)
        external = [value for value in model.graph.initializer if value.data_location == onnx.TensorProto.EXTERNAL]
        locations = {entry.value for value in external for entry in value.external_data if entry.key == "location"}
        assert {value.name for value in external} == exported.tensors.keys()
        assert locations == {"tunable.bin"}
        assert all(np.prod(value.dims) <= 64 for value in model.graph.initializer if value not in external)


def test_weight_files_hold_each_tensor_once_on_its_own_page(exported: Exported) -> None:
    end = 0
    for tensor in sorted(exported.manifest.tensors, key=lambda tensor: tensor.offset):
        assert tensor.offset == -(-end // 4096) * 4096
        end = tensor.offset + tensor.nbytes
    assert (exported.directory / "tunable.bin").stat().st_size == end


def test_the_manifest_lists_every_file_and_its_hash(exported: Exported) -> None:
    on_disk = {path.name for path in exported.directory.iterdir()}
    assert on_disk == {*exported.manifest.files, "manifest.json"}
    EdgeModel(exported.directory, threads=1)


def test_a_directory_is_no_larger_than_weights_tokenizer_and_graphs_and_three_percent(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**tiny.SMALL, "hidden_size": 512, "intermediate_size": 1024, "initializer_range": 0.02})
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    tiny.make_tokenizer().save_pretrained(tmp_path / "source")
    directory = export_model(str(tmp_path / "source"), tmp_path / "edge").directory
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    graphs = sizes["scoring.onnx"] + sizes["generation.onnx"]
    assert graphs < FACTS_LIMIT
    unique = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert sum(sizes.values()) <= 1.03 * unique + sizes["tokenizer.json"] + graphs


def test_a_kind_is_the_name_without_layer_and_weight(exported_dir: Path) -> None:
    kinds = {tensor.name: (tensor.layer, tensor.kind) for tensor in read_manifest(exported_dir).tensors}
    assert kinds["model.embed_tokens.weight"] == (None, "embed_tokens")
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == (1, "self_attn.q_proj")
    assert kinds["model.layers.0.input_layernorm.weight"] == (0, "input_layernorm")


def test_the_facts_of_the_source_are_recorded(exported_dir: Path) -> None:
    manifest = read_manifest(exported_dir)
    origin = manifest.origin
    assert (origin.id, origin.model_type, origin.family) == ("llama", "llama", "causal")
    assert (origin.context_length, origin.vocab_size, origin.hidden_size) == (128, 320, 32)
    assert (manifest.tokenizer.bos_token_id, manifest.tokenizer.eos_token_ids, manifest.tokenizer.pad_token_id) == (0, [1], 1)
    assert (exported_dir / "chat_template.jinja").read_text(encoding="utf-8") == tiny.CHAT_TEMPLATE


def test_the_tokenizer_gives_the_sources_tokens(exported_dir: Path) -> None:
    text = "Question: what is the plot?\nAnswer: grün 123 <|im_end|>"
    assert EdgeModel(exported_dir, threads=1).text.encode(text) == tiny.make_tokenizer()(text)["input_ids"]


def test_a_tokenizer_saved_with_truncation_and_padding_is_exported_without(tmp_path: Path) -> None:
    tiny.save(tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(saved), encoding="utf-8")
    directory = export_model(str(tmp_path / "source"), tmp_path / "edge").directory
    exported = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert (exported["truncation"], exported["padding"]) == (None, None)


def test_a_padding_token_that_the_embedding_has_no_row_for_is_not_used(source_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source_dir, tmp_path / "source"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    while len(tokenizer) <= 320:
        tokenizer.add_special_tokens({"pad_token": f"<|pad{len(tokenizer)}|>"})
    tokenizer.save_pretrained(folder)
    export_model(str(folder), tmp_path / "edge")
    assert len(EdgeModel(tmp_path / "edge", threads=1).log_probs(["the film", "the plot and the film"], [" is great", " is"])) == 2


def test_an_export_says_its_stages_and_prints_nothing_itself(source_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages: list[str] = []
    export_model(str(source_dir), tmp_path / "edge", progress=stages.append)
    assert capfd.readouterr() == ("", "")
    assert [stage.split()[0] for stage in stages] == ["loading", "building", "writing", "checking"]


# which weights are tunable


@pytest.mark.parametrize("pattern", ["norm", "self_attn", r"layers\.1\.", r"\.(q|v)_proj\."])
def test_tunable_chooses_by_name_and_freezes_the_rest(source_dir: Path, tmp_path: Path, pattern: str) -> None:
    manifest = export_model(str(source_dir), tmp_path / "edge", tunable=pattern).manifest
    chosen = {tensor.name for tensor in manifest.tensors if re.search(pattern, tensor.name)}
    assert 0 < len(chosen) < len(manifest.tensors)
    assert {tensor.name for tensor in manifest.tunable} == chosen
    assert {tensor.name: tensor.file for tensor in manifest.tensors} == {
        tensor.name: "tunable.bin" if tensor.name in chosen else "frozen.bin" for tensor in manifest.tensors
    }
    for graph in (manifest.scoring, manifest.generation):
        listed = {value.name for value in session(tmp_path / "edge" / graph.file).get_overridable_initializers()}
        assert listed - OPTIONAL_INPUTS == chosen | {"model.embed_tokens.weight"}, (
            "the tied embedding has two uses: not packed for one of them"
        )
    assert EdgeModel(tmp_path / "edge", threads=1).weights.keys() == chosen


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "opt"])
def test_frozen_weights_keep_their_exact_values(tmp_path: Path, name: str) -> None:
    tiny.save(tmp_path / "source", name)
    manifest = export_model(str(tmp_path / "source"), tmp_path / "edge", tunable="norms").manifest
    parameters = {name: parameter.detach().numpy() for name, parameter in tiny.make_model(name).named_parameters()}
    frozen = [tensor for tensor in manifest.tensors if not tensor.tunable]
    assert {tensor.name for tensor in frozen} == parameters.keys() - {tensor.name for tensor in manifest.tunable}
    assert len(frozen) > len(manifest.tunable) > 0
    for tensor in frozen:
        values = stored(tmp_path / "edge", tensor)
        expected = parameters[tensor.name].T if tensor.transposed else parameters[tensor.name]
        assert (values.shape, values.tobytes()) == (expected.shape, expected.tobytes()), tensor.name


def test_a_frozen_linear_weight_is_read_by_matmul_as_it_is_stored(source_dir: Path, tmp_path: Path) -> None:
    manifest = export_model(str(source_dir), tmp_path / "edge", tunable="norm").manifest
    linear = {tensor.name for tensor in manifest.tensors if "_proj." in tensor.name}
    assert len(linear) == 14
    assert {tensor.name for tensor in manifest.tensors if tensor.transposed} == linear
    for graph in (manifest.scoring, manifest.generation):
        nodes = onnx.load(tmp_path / "edge" / graph.file, load_external_data=False).graph.node
        uses = [(name, node.op_type, index) for node in nodes for index, name in enumerate(node.input) if name in linear]
        assert sorted(uses) == sorted((name, "MatMul", 1) for name in linear)


def test_a_tied_name_chooses_the_weight_it_is_tied_to(source_dir: Path, tmp_path: Path) -> None:
    manifest = export_model(str(source_dir), tmp_path / "edge", tunable="lm_head").manifest
    assert [tensor.name for tensor in manifest.tunable] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("nrom", "norm, input_layernorm"), ("q_porj", "self_attn.q_proj"), ("self_atn", "self_attn.q_proj"), ("zzz", "embed_tokens")],
)
def test_an_expression_that_matches_nothing_names_near_kinds(source_dir: Path, tmp_path: Path, pattern: str, near: str) -> None:
    message = refusal(source_dir, tmp_path / "edge", ConfigError, tunable=pattern)
    assert message.startswith(f"--tunable {pattern!r}: matches none of the 20 weights; they are named like model.embed_tokens.weight")
    assert near in message


def test_a_malformed_expression_is_refused(source_dir: Path, tmp_path: Path) -> None:
    message = refusal(source_dir, tmp_path / "edge", ConfigError, tunable="(norm")
    assert message == "--tunable '(norm': not a regular expression (missing ), unterminated subpattern at position 0)"


def test_parameters_of_equal_values_stay_separate_tensors(tmp_path: Path) -> None:
    def repeat(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.copy_(model.model.layers[0].mlp.gate_proj.weight)

    source = save_changed(tmp_path / "source", repeat)
    manifest = export_model(str(source), tmp_path / "edge").manifest
    places = {tensor.name: (tensor.file, tensor.offset) for tensor in manifest.tensors}
    ones = [tensor for tensor in manifest.tensors if np.all(stored(tmp_path / "edge", tensor) == 1)]
    assert len(ones) == 5, "every norm of a fresh model is ones"
    assert places.keys() == dict(tiny.make_model("llama").named_parameters()).keys()
    assert len(set(places.values())) == len(places) == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value

    source = save_changed(tmp_path / "source", spoil)
    message = refusal(source, tmp_path / "edge")
    assert message == "model.layers.1.mlp.up_proj.weight: the source holds NaN or infinity; it cannot be tuned or checked"
