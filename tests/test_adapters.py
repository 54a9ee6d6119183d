"""Adapters: the base inside the graph, PEFT's numbers, and what can be adapted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ExportTiny
from reference import edge_log_probs, make_pairs, network_log_probs, peft_network, randomise, write_adapter
from tiny_adapters import RANK

from edgezo.adapters import A_ROWS, A_SIGNS, B_ROWS, B_SIGNS
from edgezo.config import make_config
from edgezo.errors import ConfigError
from edgezo.export import export_model
from edgezo.export.adapters import find_targets
from edgezo.export.freeze import freeze
from edgezo.export.prefix import TEXT
from edgezo.export.source import load_source
from edgezo.runtime import noise
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.theta import mutable_weights

ARCHITECTURES = ["llama", "gpt2", "qwen3", "opt", "gemma3_text"]
PROMPTS = ["the film", "Question: what is the capital", "a"]


# the graph


def test_perturbations_of_a_and_b_have_symbols_of_their_own(lora_dir: Path) -> None:
    """One of the two may be left out; onnxruntime 1.18 takes shapes of like symbols for the same."""
    graph = onnx.load(lora_dir / "scoring.onnx", load_external_data=False).graph
    symbols = {
        value.name: {dim.dim_param for dim in value.type.tensor_type.shape.dim if dim.dim_param}
        for value in graph.input
        if value.name in {A_ROWS, A_SIGNS, B_ROWS, B_SIGNS}
    }
    assert {name: len(found) for name, found in symbols.items()} == {A_ROWS: 3, B_ROWS: 3, A_SIGNS: 2, B_SIGNS: 2}
    assert len(set().union(*symbols.values())) == 10


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_an_adapter_the_graphs_are_the_base(export_tiny: ExportTiny, name: str) -> None:
    base = EdgeModel(export_tiny(name), threads=1)
    model = EdgeModel(export_tiny(name, adapter="lora"), threads=1)
    assert (model.adapter, model.weights) == (None, {})
    assert np.abs(edge_log_probs(model, make_pairs()) - edge_log_probs(base, make_pairs())).max() < 1e-5
    texts = [model.generate(prompt, 16) for prompt in PROMPTS]
    assert texts == [base.generate(prompt, 16) for prompt in PROMPTS]
    assert any(texts)


@pytest.mark.parametrize(("name", "kind"), [*((name, "lora") for name in ARCHITECTURES), ("llama", "prefix"), ("gpt2", "prefix")])
def test_scores_and_texts_with_an_adapter_are_those_of_peft(export_tiny: ExportTiny, tmp_path: Path, name: str, kind: str) -> None:
    model = EdgeModel(export_tiny(name, adapter=kind), threads=1)
    base = edge_log_probs(model, make_pairs())
    randomise(model)
    found = edge_log_probs(model, make_pairs())
    network = peft_network(name, write_adapter(model, tmp_path / "adapter"))
    assert np.abs(found - base).max() > 0.5
    assert np.abs(found - network_log_probs(network, make_pairs())).max() < 1e-4
    for prompt in PROMPTS:
        assert model.generate(prompt, 8) == greedy(network, model, prompt, 8)


def greedy(network: Any, model: EdgeModel, prompt: str, count: int) -> str:
    """The likeliest tokens one after the other, all read anew for each."""
    tokens = model.text.encode(prompt)
    written: list[int] = []
    while len(written) < count:
        with torch.no_grad():
            token = int(network(input_ids=torch.tensor([tokens + written])).logits[0, -1].argmax())
        if token in model.manifest.tokenizer.eos_token_ids:
            break
        written.append(token)
    return model.text.decode(written)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", r"layers\.1\..*(up|down)_proj"])
def test_an_adapter_of_some_layers_is_that_of_peft(export_tiny: ExportTiny, tmp_path: Path, targets: str) -> None:
    model = EdgeModel(export_tiny("llama", adapter="lora", targets=targets), threads=1)
    lora = randomise(model)
    assert isinstance(lora, Lora)
    assert len(lora.targets) == {"q": 4, "l": 2}[targets[0]]
    network = peft_network("llama", write_adapter(model, tmp_path / "adapter"))
    assert len([name for name, _ in network.named_parameters() if "lora_B" in name]) == len(lora.targets)
    assert np.abs(edge_log_probs(model, make_pairs()) - network_log_probs(network, make_pairs())).max() < 1e-4


def test_a_prefix_begins_as_tokens_that_were_read(prefix_dir: Path, exported_dir: Path) -> None:
    base, model = EdgeModel(exported_dir, threads=1), EdgeModel(prefix_dir, threads=1)
    read = base.text.encode(TEXT)[:5]
    pairs = make_pairs()
    expected = edge_log_probs(base, [(read + prompt, completion) for prompt, completion in pairs])
    assert edge_log_probs(model, pairs) == pytest.approx(expected, abs=1e-4)
    assert np.abs(expected - edge_log_probs(base, pairs)).max() > 0.1


def test_a_prefix_of_another_length(export_tiny: ExportTiny, tmp_path: Path) -> None:
    """Longer than its text has tokens: the text is read again and again."""
    model = EdgeModel(export_tiny("llama", adapter="prefix", tokens=99), threads=1)
    assert model.context == 128 - 99
    randomise(model)
    network = peft_network("llama", write_adapter(model, tmp_path / "adapter"))
    assert np.abs(edge_log_probs(model, make_pairs()) - network_log_probs(network, make_pairs())).max() < 1e-4


def test_lora_starts_as_the_base(lora_dir: Path) -> None:
    model = EdgeModel(lora_dir, threads=1)
    base = edge_log_probs(model, make_pairs())
    mutable_weights(model, make_config(None, {"data": "no file", "eps": 1e-2, "rank": RANK, "seed": 4}, "lora"))
    lora = model.adapter
    assert isinstance(lora, Lora)
    assert not lora.b.any()
    for target, matrix in zip(lora.targets, lora.matrices("lora_A"), strict=True):
        bound = 1 / np.sqrt(target.in_features)
        assert 0.8 * bound < np.abs(matrix).max() <= bound + 1e-6
        assert abs(matrix.mean()) < 0.3 * bound
    drawn = np.concatenate([noise.uniforms(4, "lora_A", lora.a.size)])
    scaled = np.repeat([1 / np.sqrt(target.in_features) for target in lora.targets], [target.in_features * RANK for target in lora.targets])
    assert np.abs(lora.a - drawn * scaled).max() < 1e-6
    assert np.abs(edge_log_probs(model, make_pairs()) - base).max() < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nodes_stand_after_what_they_read(export_tiny: ExportTiny, name: str) -> None:
    """As ONNX asks; OPT names k, v, q and runs q, k, v. onnxruntime sorts them itself, other engines may not."""
    for graph in ("scoring.onnx", "generation.onnx"):
        onnx.checker.check_model(str(export_tiny(name, adapter="lora") / graph))


# what can be adapted


@pytest.fixture(scope="module")
def targets_of(source_dir: Path) -> Callable[[str], list[str]]:
    """Module names of the targets that an expression means in the tiny Llama."""
    source = load_source(str(source_dir))
    freeze(source.decoder, list(source.decoder.weights), "fp32")
    return lambda targets: [target.module for target in find_targets(source.decoder, targets)]


ATTENTION = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"]
MLP = [f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all-linear", ATTENTION + MLP),
        ("q_proj,v_proj", [name for name in ATTENTION if name[-6] in "qv"]),
        ("q_proj , v_proj", [name for name in ATTENTION if name[-6] in "qv"]),
        ("down_proj", [name for name in MLP if "down" in name]),
        (r"layers\.1\.self_attn\.", ATTENTION[4:]),
        (r"layers\.0\..*(gate|up)_proj$", MLP[:2]),
        (".", ATTENTION + MLP),
    ],
)
def test_targets_are_the_layers_that_are_meant(targets_of: Callable[[str], list[str]], targets: str, modules: list[str]) -> None:
    assert sorted(targets_of(targets)) == sorted(modules)


@pytest.mark.parametrize(
    ("targets", "asked", "near"),
    [
        ("q_prj", "q_prj", "q_proj, v_proj, o_proj"),
        ("q_proj,dow", "dow", "down_proj"),
        (r"\.h\.7\.", r"\.h\.7\.", "down_proj, gate_proj, k_proj, o_proj, q_proj"),
        ("lm_head", "lm_head", "down_proj, gate_proj, k_proj, o_proj, q_proj"),
    ],
)
def test_targets_that_are_not_there_are_refused_with_near_names(
    targets_of: Callable[[str], list[str]], targets: str, asked: str, near: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        targets_of(targets)
    assert str(caught.value) == (
        f"--targets {targets!r}: {asked!r} matches none of the 14 linear layers; "
        f"they are named like model.layers.0.self_attn.q_proj, near names are {near}"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora", "targets": ""}, "--targets '': empty; give all-linear, names such as q_proj,v_proj, or a regular expression"),
        (
            {"adapter": "lora", "targets": "layers.(0"},
            "--targets 'layers.(0': not a regular expression (missing ), unterminated subpattern at position 7)",
        ),
        ({"targets": "q_proj"}, "--targets q_proj: says where LoRA goes; add --adapter lora or leave it out"),
        ({"adapter": "prefix", "targets": "q_proj"}, "--targets q_proj: says where LoRA goes; add --adapter lora or leave it out"),
        (
            {"adapter": "lora", "tunable": "norms"},
            "--adapter lora freezes the whole base, --tunable norms tunes some of it; give one of the two",
        ),
        ({"adapter": "(x"}, "--adapter '(x': not a regular expression (missing ), unterminated subpattern at position 0)"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        export_model("no/such/model", tmp_path / "edge", **settings)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [0, -1, 128])
def test_a_prefix_without_room_for_text_is_refused(source_dir: Path, tmp_path: Path, tokens: int) -> None:
    with pytest.raises(ConfigError) as caught:
        export_model(str(source_dir), tmp_path / "edge", adapter="prefix", tokens=tokens)
    assert str(caught.value) == f"--tokens {tokens}: a prefix has 1 to 127 tokens with this model; 5 is usual"
    assert not list(tmp_path.iterdir())
