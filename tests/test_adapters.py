"""Adapters: the base inside the graph, PEFT's numbers, many directions in one forward, and runs that are rebuilt to the last bit."""

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import helper, numpy_helper
from reference import (
    Numbers,
    both_sides,
    edge_log_probs,
    make_examples,
    make_objective,
    make_pairs,
    matrix_shapes,
    network_log_probs,
    network_loss,
    outer_products,
    peft_network,
    randomise,
    write_adapter,
)

import edgezo
from edgezo.adapters import A_ROWS, A_SIGNS, B_ROWS, B_SIGNS
from edgezo.config import TuneConfig, make_config
from edgezo.errors import ConfigError, DeadTensorError, EdgezoError, NonFiniteLossError, RunError
from edgezo.export import export_model
from edgezo.export.adapters import find_targets
from edgezo.export.freeze import freeze
from edgezo.export.prefix import TEXT
from edgezo.export.source import load_source
from edgezo.manifest import StoredFile
from edgezo.manifest_reader import read_manifest
from edgezo.runtime import noise
from edgezo.runtime.examples import Example
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.scoring import BATCH_TOKENS, Sequences
from edgezo.runtime.theta import Theta, mutable_weights, step_directions, write_start
from edgezo.runtime.tune import tune

ExportTiny = Callable[..., Path]
ARCHITECTURES = ["llama", "gpt2", "qwen3", "opt", "gemma3_text"]
PROMPTS = ["the film", "Question: what is the capital", "a"]
RANK, ALPHA = 3, 5.0


@pytest.fixture
def directories(lora_dir: Path, prefix_dir: Path) -> dict[str, Path]:
    return {"lora": lora_dir, "prefix": prefix_dir}


def make_theta(directory: Path, start: Path, batch_tokens: int = BATCH_TOKENS, **settings: Any) -> Theta:
    """theta at random values, written to `start`, as of a run that begins with --init."""
    model = EdgeModel(directory, threads=1)
    assert model.manifest.adapter is not None
    write_start(randomise(model, rank=RANK, alpha=ALPHA), start)
    kind = model.manifest.adapter.kind
    shape = {"rank": RANK, "alpha": ALPHA, "lr": 1.2e-2, "eps": 1e-2} if kind == "lora" else {"lr": 1e-2, "eps": 1e-1}
    config = make_config(None, {"data": "no file", **shape, **settings}, kind)
    model = EdgeModel(directory, threads=1)
    return Theta(model, config, mutable_weights(model, config, start), make_objective(Sequences(model, batch_tokens)))


def adapter_arrays(model: EdgeModel) -> list[Any]:
    return [model.adapter.a, model.adapter.b] if isinstance(model.adapter, Lora) else list(model.weights.values())


def digest(model: EdgeModel) -> str:
    """SHA-256 of all that a run tunes."""
    return hashlib.sha256(b"".join(array.tobytes() for array in adapter_arrays(model))).hexdigest()


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


# many directions in one forward


class Forwards:
    """Counts the forwards of a model."""

    def __init__(self, model: EdgeModel) -> None:
        self.sizes: list[int] = []
        run = model.scoring.run

        def counted(outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
            self.sizes.append(feeds["input_ids"].size)
            return run(outputs, feeds)

        model.scoring.run = counted  # type: ignore[method-assign]


def loss_alone(theta: Theta, step: int, number: int, side: int, group: Sequence[Example]) -> float:
    """The loss with one perturbed copy written into the adapter itself."""
    direction = step_directions(theta.config, step)[number]
    before = [array.copy() for array in adapter_arrays(theta.model)]
    try:
        if isinstance(theta.model.adapter, Lora):
            lora = theta.model.adapter
            shapes = matrix_shapes(lora.targets, lora.rank)
            for name in ["lora_A", "lora_B"] if theta.config.tune_a else ["lora_B"]:
                for matrix, z in zip(lora.matrices(name), outer_products(direction, name, shapes[name]), strict=True):
                    matrix += side * theta.weights.eps * z
        else:
            prefix = theta.model.weights["prefix"]
            z = noise.draw(direction, "prefix", prefix.size, theta.config.noise)
            prefix += (side * theta.weights.eps * z).reshape(prefix.shape)
        return make_objective(Sequences(theta.model)).loss(group)
    finally:
        for array, values in zip(adapter_arrays(theta.model), before, strict=True):
            array[...] = values


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("words", [(1, 1), (3, 1, 2)])
@pytest.mark.parametrize(
    ("kind", "settings"), [("lora", {}), ("lora", {"tune_a": True}), ("prefix", {}), ("prefix", {"noise": "gaussian"})]
)
def test_stacked_losses_are_those_of_each_copy_alone(
    directories: dict[str, Path], tmp_path: Path, kind: str, settings: dict[str, Any], words: tuple[int, ...], batch: int
) -> None:
    theta = make_theta(directories[kind], tmp_path / "start", directions=4, batch=batch, eps=2**-5, **settings)
    before = digest(theta.model)
    forwards = Forwards(theta.model)
    groups = theta.groups(make_examples(4 * batch, words))
    expected = np.array([[loss_alone(theta, 7, number, side, group) for side in (1, -1)] for number, group in enumerate(groups)])
    assert np.abs(expected[:, 0] - expected[:, 1]).min() > 1e-4
    counts = []
    for batch_tokens in (1, 50, 150, BATCH_TOKENS):
        theta.sequences.batch_tokens = batch_tokens
        forwards.sizes.clear()
        estimates = theta.estimates(step_directions(theta.config, 7), groups)
        found = both_sides(estimates, theta.weights.eps)
        assert np.abs(found - expected).max() < 1e-5, batch_tokens
        assert [estimate.projected_grad for estimate in estimates] == pytest.approx((found @ [1, -1]) / (2 * theta.weights.eps))
        least = 2 * max(len(prompt) + len(word) - 1 for group in groups for row in group for prompt, word in row.pairs)
        assert max(forwards.sizes) <= max(batch_tokens, least)
        counts.append(len(forwards.sizes))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= 4 * batch
    assert counts[-1] == 1
    assert digest(theta.model) == before


def test_whole_copies_of_b_may_be_fed_in_place_of_sign_vectors(lora_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/edge-model.md says of the graph's inputs."""
    theta = make_theta(lora_dir, tmp_path / "start", directions=3, batch=2)
    groups = theta.groups(make_examples(6, (1, 1)))
    expected = both_sides(theta.estimates(step_directions(theta.config, 0), groups), theta.weights.eps)
    made = Lora.stacked_feeds

    def whole(lora: Lora, *arguments: Any) -> dict[str, Any]:
        feeds = made(lora, *arguments)
        rows, signs, column = feeds.pop(B_ROWS), feeds.pop(B_SIGNS).astype(np.float32), 0
        for index, target in enumerate(lora.targets):
            columns = signs[:, None, None, column : column + target.out_features]
            feeds[target.b] = (feeds[target.b][0] + rows[..., index, None] * columns).reshape(-1, lora.rank, target.out_features)
            column += target.out_features
        return feeds

    monkeypatch.setattr(Lora, "stacked_feeds", whole)
    found = both_sides(theta.estimates(step_directions(theta.config, 0), groups), theta.weights.eps)
    assert np.abs(found - expected).max() < 1e-5


def test_hidden_rows_of_a_forward_are_bounded_for_all_copies_together(lora_dir: Path, tmp_path: Path) -> None:
    theta = make_theta(lora_dir, tmp_path / "start", directions=4, batch=2)
    groups = theta.groups(make_examples(8, (3, 2)))
    expected = both_sides(theta.estimates(step_directions(theta.config, 0), groups), theta.weights.eps)
    forwards = Forwards(theta.model)
    for batch_hidden in (1, 2, 5, 13):
        theta.sequences.batch_hidden = theta.sequences.long_hidden = batch_hidden
        found = both_sides(theta.estimates(step_directions(theta.config, 0), groups), theta.weights.eps)
        assert np.abs(found - expected).max() < 1e-5
    assert len(forwards.sizes) > 8


@pytest.mark.parametrize("kind", ["lora", "prefix"])
@pytest.mark.parametrize(("place", "side"), [(0, "+"), (2, "+"), (5, "-")])
def test_a_loss_that_is_not_finite_leaves_the_adapter_as_it_was(
    directories: dict[str, Path], tmp_path: Path, kind: str, place: int, side: str
) -> None:
    """Of three directions: scores come direction after direction, two label words for each sign."""
    theta = make_theta(directories[kind], tmp_path / "start", directions=3, batch=1)
    before, run = digest(theta.model), theta.model.scoring.run
    prompt = make_examples(1)[0]

    def spoiled(outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
        (scores,) = run(outputs, feeds)
        scores = scores.copy()
        scores[2 * place] = np.nan
        return [scores]

    theta.model.scoring.run = spoiled  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError) as caught:
        theta.estimates(step_directions(theta.config, 4), [[prompt]] * 3)
    assert str(caught.value) == (
        f"step 4: the loss at theta {side} eps z is nan; the weights are as before the step, try a smaller --lr or --eps"
    )
    theta.weights.flush()
    assert digest(theta.model) == before


# the whole step against others


class Float64:
    """LoRA tuning by NumPy and a float64 torch model whose weights get W + alpha/rank * B A."""

    def __init__(self, name: str, lora: Lora, config: TuneConfig) -> None:
        self.network, self.targets, self.config = tiny.make_model(name).double(), lora.targets, config
        self.matrices = {tensor: [matrix.astype(np.float64) for matrix in lora.matrices(tensor)] for tensor in ("lora_A", "lora_B")}
        self.base = {target.module: self.network.get_submodule(target.module).weight.data.clone() for target in self.targets}
        self.shapes = matrix_shapes(self.targets, lora.rank)
        self.tuned = ["lora_A", "lora_B"] if config.tune_a else ["lora_B"]

    def move(self, step: int, number: int, scale: float) -> None:
        """theta += scale z."""
        direction = step_directions(self.config, step)[number]
        for name in self.tuned:
            for matrix, z in zip(self.matrices[name], outer_products(direction, name, self.shapes[name]), strict=True):
                matrix += scale * z

    def loss(self, group: Sequence[Example]) -> float:
        for target, a, b in zip(self.targets, self.matrices["lora_A"], self.matrices["lora_B"], strict=True):
            module = self.network.get_submodule(target.module)
            change = torch.from_numpy(self.config.alpha / self.config.rank * a @ b)
            module.weight.data.copy_(self.base[target.module] + (change.T if isinstance(module, torch.nn.Linear) else change))
        with torch.no_grad():
            return float(network_loss(self.network, group))

    def step(self, step: int, groups: Sequence[Sequence[Example]], eps: float, lr: float) -> Numbers:
        """One step; returns the losses [direction, side]."""
        losses = np.empty((len(groups), 2))
        for number, group in enumerate(groups):
            for place, (there, back) in enumerate([(eps, -eps), (-eps, eps)]):
                self.move(step, number, there)
                losses[number, place] = self.loss(group)
                self.move(step, number, back)
        grads = (losses[:, 0] - losses[:, 1]) / (2 * eps)
        share = 1 / len(grads) if self.config.rule == "sgd" else 1 / np.sqrt((grads**2).sum())
        for number, grad in enumerate(grads):
            self.move(step, number, -lr * grad * share)
        for name in self.tuned:
            for matrix in self.matrices[name]:
                matrix *= 1 - lr * self.config.weight_decay
        return losses


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "normalized", "lr": 2e-2},
        {"rule": "sgd", "lr": 1e-3, "weight_decay": 20.0, "tune_a": True},
        {"rule": "normalized", "lr": 1e-2, "tune_a": True},
    ],
)
def test_ten_steps_follow_a_float64_reference(export_tiny: ExportTiny, tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    theta = make_theta(export_tiny(name, adapter="lora"), tmp_path / "start", directions=4, batch=2, eps=2**-7, seed=3, **settings)
    lora = theta.model.adapter
    assert isinstance(lora, Lora)
    reference = Float64(name, lora, theta.config)
    groups = theta.groups(make_examples(8, (1, 2)))
    losses = []
    for step in range(10):
        directions = step_directions(theta.config, step)
        estimates = theta.estimates(directions, groups)
        expected = reference.step(step, groups, theta.weights.eps, theta.config.lr)
        assert both_sides(estimates, theta.weights.eps) == pytest.approx(expected, rel=1e-4, abs=1e-4), step
        theta.step(directions, [estimate.projected_grad for estimate in estimates], theta.config.lr)
        losses.append(expected.mean())
    theta.weights.flush()
    assert abs(losses[-1] - losses[0]) > 0.05
    for tensor in ("lora_A", "lora_B"):
        found = lora.matrices(tensor)
        assert max(np.abs(a - b).max() for a, b in zip(found, reference.matrices[tensor], strict=True)) < 1e-4


@pytest.mark.parametrize(("name", "kind"), [("llama", "lora"), ("gpt2", "lora"), ("llama", "prefix")])
def test_projected_gradients_are_those_of_autograd(export_tiny: ExportTiny, tmp_path: Path, name: str, kind: str) -> None:
    # large against the rounding of float32 losses, small against the curvature, which is less along a prefix
    settings = {"tune_a": True, "eps": 2**-11} if kind == "lora" else {"eps": 2**-10}
    theta = make_theta(export_tiny(name, adapter=kind), tmp_path / "start", directions=6, batch=2, **settings)
    groups = theta.groups(make_examples(12, (1, 2)))
    directions = step_directions(theta.config, 0)
    found = np.array([estimate.projected_grad for estimate in theta.estimates(directions, groups)])
    network = peft_network(name, write_adapter(theta.model, tmp_path / "adapter"))
    for parameter in adapter_parameters(network).values():
        parameter.requires_grad_(True)
    expected = []
    for direction, group in zip(directions, groups, strict=True):
        network.zero_grad()
        network_loss(network, group).backward()
        expected.append(sum(float((gradient * z).sum()) for gradient, z in gradients(network, theta.model, direction)))
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
    assert np.abs(found / expected - 1).max() < 0.01, "each of them, the small ones too"


def adapter_parameters(network: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in network.named_parameters() if "lora_" in name or "prompt_encoder" in name}


def gradients(network: Any, model: EdgeModel, direction: noise.Direction) -> list[tuple[Any, Any]]:
    """Autograd's gradient of every tuned array, laid out like its z, beside that."""
    parameters = adapter_parameters(network)
    if isinstance(model.adapter, Prefix):
        layers, _, heads, tokens, head_dim = model.adapter.array.shape
        gradient = parameters["prompt_encoder.default.embedding.weight"].grad.numpy().reshape(tokens, layers, 2, heads, head_dim)
        return [(gradient.transpose(1, 2, 3, 0, 4).ravel(), noise.draw(direction, "prefix", gradient.size))]
    assert isinstance(model.adapter, Lora)
    found = []
    for name, shapes in matrix_shapes(model.adapter.targets, model.adapter.rank).items():
        for target, z in zip(model.adapter.targets, outer_products(direction, name, shapes), strict=True):
            found.append((parameters[f"base_model.model.{target.module}.{name}.default.weight"].grad.numpy().T, z))
    return found


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


# adapters are proven live


def rewrite_scoring(directory: Path, change: Callable[[onnx.GraphProto], object]) -> None:
    """Edit scoring.onnx and mend the manifest's hash and size, so that only the proof can object."""
    path = directory / "scoring.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)
    data = path.read_bytes()
    manifest = read_manifest(directory)
    files = {**manifest.files, path.name: StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())}
    manifest.model_copy(update={"files": files}).write(directory)


def test_every_part_of_an_adapter_is_live(directories: dict[str, Path]) -> None:
    for directory in directories.values():
        model = EdgeModel(directory, threads=1)
        weights = mutable_weights(model, make_config(None, {"data": "no file", "eps": 1e-2}, "lora"))
        before = digest(model)
        prove_live(model, weights)
        assert digest(model) == before


def cut_branch(graph: onnx.GraphProto) -> None:
    """The second target's branch is computed, but nothing reads it."""
    node = next(node for node in graph.node if "edgezo/lora1/branch" in node.input)
    node.op_type = "Identity"
    del node.input[1:]


def silence_branch(graph: onnx.GraphProto) -> None:
    """The second target's branch is multiplied by zero."""
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "silent"))
    place = next(place for place, node in enumerate(graph.node) if "edgezo/lora1/branch" in node.input)
    graph.node[place].input[1] = "silenced"
    graph.node.insert(place, helper.make_node("Mul", ["edgezo/lora1/branch", "silent"], ["silenced"]))


def silence_prefix(graph: onnx.GraphProto) -> None:
    """The values of the second layer are multiplied by zero."""
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "silent"))
    place = next(place for place, node in enumerate(graph.node) if "prefix.1.value" in node.input and node.op_type == "Unsqueeze")
    graph.node[place].input[0] = "silenced"
    graph.node.insert(place, helper.make_node("Mul", ["prefix.1.value", "silent"], ["silenced"]))


@pytest.mark.parametrize(
    ("kind", "damage", "dead", "of", "why"),
    [
        ("lora", cut_branch, ["{1}.lora_A.weight", "{1}.lora_B.weight"], 28, "nothing in the scoring graph uses them"),
        ("lora", silence_branch, ["{1}.lora_A.weight", "{1}.lora_B.weight"], 28, "their changes do not reach the scores"),
        ("prefix", silence_prefix, ["prefix.1.value"], 4, "their changes do not reach the scores"),
    ],
)
def test_a_dead_part_of_an_adapter_is_refused_by_name(
    directories: dict[str, Path], reviews: str, tmp_path: Path, kind: str, damage: Any, dead: list[str], of: int, why: str
) -> None:
    directory = Path(shutil.copytree(directories[kind], tmp_path / "edge"))
    rewrite_scoring(directory, damage)
    targets = read_manifest(directory).adapter.targets  # type: ignore[union-attr]
    names = ", ".join(re.sub(r"\{1\}", targets[1].module if targets else "", name) for name in dead)
    with pytest.raises(DeadTensorError) as caught:
        edgezo.tune(directory, tmp_path / "run", data=reviews, steps=2, threads=1, directions=2, **TASK)
    assert str(caught.value).startswith(
        f"{directory}: {len(dead)} of {of} tunable tensors would not be tuned, {why}: {names}; export again"
    )
    assert not (tmp_path / "run").exists()


# runs

TASK = {"template": "{text} It was", "labels": "terrible,great"}


class Tuned(NamedTuple):
    """A run in memory: its model, and SHA-256 of what was tuned."""

    model: EdgeModel
    digest: str


def run_of(directory: Path, run: Path, reviews: str, resume: bool = False, **settings: Any) -> Tuned:
    model = EdgeModel(directory, threads=1)
    assert model.manifest.adapter is not None
    given = {"data": reviews, "rank": RANK, "directions": 4, "batch": 2, "eval_every": 5, **TASK, **settings}
    kind = model.manifest.adapter.kind
    tune(model, make_config(None, given if kind == "lora" else {**given, "rank": 8}, kind), run, resume=resume)
    return Tuned(model, digest(model))


RUNS = [
    ("lora", {}),
    ("lora", {"tune_a": True}),
    ("lora", {"rule": "sgd", "weight_decay": 0.5}),
    ("prefix", {}),
    ("prefix", {"noise": "gaussian"}),
]


@pytest.mark.parametrize(("kind", "settings"), RUNS)
def test_a_run_is_rebuilt_from_base_and_journal_and_can_be_stopped_and_resumed(
    directories: dict[str, Path], reviews: str, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    directory = directories[kind]
    settings = {"schedule": "constant", "start": "none", **settings}
    whole = run_of(directory, tmp_path / "whole", reviews, steps=10, **settings)
    rebuilt = EdgeModel(directory, run=tmp_path / "whole", step="last", threads=2)
    assert digest(rebuilt) == whole.digest
    assert np.array_equal(edge_log_probs(rebuilt, make_pairs()), edge_log_probs(whole.model, make_pairs()))
    start = EdgeModel(directory, run=tmp_path / "whole", step=0, threads=1)
    assert np.abs(edge_log_probs(start, make_pairs()) - edge_log_probs(EdgeModel(directory, threads=1), make_pairs())).max() < 1e-4
    half = run_of(directory, tmp_path / "parts", reviews, steps=5, **settings)
    assert digest(EdgeModel(directory, run=tmp_path / "whole", step=5)) == half.digest != whole.digest
    assert run_of(directory, tmp_path / "parts", reviews, resume=True, steps=10, **settings).digest == whole.digest
    assert read_journal(tmp_path / "parts" / "journal.bin").records == read_journal(tmp_path / "whole" / "journal.bin").records
    if kind == "lora":
        assert isinstance(start.adapter, Lora)
        assert isinstance(rebuilt.adapter, Lora)
        assert np.array_equal(start.adapter.a, rebuilt.adapter.a) != bool(settings.get("tune_a"))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_tuning_an_adapter_lowers_the_loss_and_leaves_the_edge_model_as_it_is(
    directories: dict[str, Path], reviews: str, tmp_path: Path, kind: str
) -> None:
    before = {path.name: path.read_bytes() for path in directories[kind].iterdir()}
    settings = {**TASK, "start": "none", "steps": 40, "directions": 8, "lr": {"lora": 1.2e-2, "prefix": 5e-2}[kind]}
    result = edgezo.tune(directories[kind], tmp_path / "run", data=reviews, valid=reviews, threads=1, **settings)
    assert result.before is not None
    assert result.best is not None
    assert result.best.loss < 0.8 * result.before.loss
    assert {path.name: path.read_bytes() for path in directories[kind].iterdir()} == before
    found = edgezo.evaluate(directories[kind], reviews, run=tmp_path / "run", threads=1)
    assert found.evaluation.loss == pytest.approx(result.best.loss, abs=1e-6)


def test_seeds_and_settings_that_the_weights_depend_on_make_other_runs(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"rank": 2}, {"alpha": 4.0}, {"tune_a": True}, {"rule": "sgd"}, {"directions": 3}]
    digests = {run_of(lora_dir, tmp_path / str(n), reviews, steps=2, **change).digest for n, change in enumerate(changes)}
    assert len(digests) == len(changes)


@pytest.mark.parametrize("name", ["rank", "alpha", "tune_a", "rule", "directions", "batch"])
def test_a_resumed_run_keeps_what_its_weights_depend_on(lora_dir: Path, reviews: str, tmp_path: Path, name: str) -> None:
    run_of(lora_dir, tmp_path / "run", reviews, steps=2)
    before = (tmp_path / "run" / "journal.bin").read_bytes()
    value: Any = {"tune_a": True, "rule": "sgd"}.get(name, 1)
    with pytest.raises(RunError) as caught:
        edgezo.tune(lora_dir, tmp_path / "run", resume=True, steps=4, threads=1, **{name: value})
    own = {"rank": 3, "alpha": 16.0, "tune_a": False, "rule": "normalized", "directions": 4, "batch": 2}[name]
    shown = float(value) if name == "alpha" else value
    assert str(caught.value) == (
        f"{tmp_path / 'run'}: --{name.replace('_', '-')} {shown!r} differs from the run's {own!r}; a resumed run keeps it, start a new run to change it"
    )
    assert (tmp_path / "run" / "journal.bin").read_bytes() == before


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_run_keeps_the_adapter_it_started_from(directories: dict[str, Path], reviews: str, tmp_path: Path, kind: str) -> None:
    directory, run = directories[kind], tmp_path / "run"
    first = EdgeModel(directory, threads=1)
    randomise(first, rank=2, alpha=3.0)
    folder = write_adapter(first, tmp_path / "adapter")
    result = edgezo.tune(
        directory, run, data=reviews, steps=4, threads=1, directions=4, init=str(folder), schedule="constant", start="none", **TASK
    )
    assert result.steps == 4
    shutil.rmtree(folder)
    start = EdgeModel(directory, run=run, step=0, threads=1)
    assert np.abs(edge_log_probs(start, make_pairs()) - edge_log_probs(first, make_pairs())).max() < 1e-4
    if isinstance(start.adapter, Lora):
        assert (start.adapter.rank, start.adapter.alpha) == (2, 3.0)
    tuned = EdgeModel(directory, run=run, step="last", threads=1)
    assert digest(tuned) != digest(start)
    edgezo.tune(directory, run, resume=True, steps=6, threads=1)
    assert digest(EdgeModel(directory, run=run, step=4)) == digest(tuned) != digest(EdgeModel(directory, run=run, step=6))


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_run_whose_start_was_changed_is_refused(lora_dir: Path, reviews: str, tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    model = EdgeModel(lora_dir, threads=1)
    randomise(model)
    edgezo.tune(lora_dir, run, data=reviews, steps=2, threads=1, directions=4, init=str(write_adapter(model, tmp_path / "adapter")), **TASK)
    start = run / "init.safetensors"
    data = start.read_bytes()
    start.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if damage == "missing":
        start.unlink()
    message = f"{start}: missing or changed; the run started from this adapter and cannot be rebuilt, restore it from a copy"
    attempts: list[Callable[[], object]] = [
        lambda: EdgeModel(lora_dir, run=run, threads=1),
        lambda: edgezo.tune(lora_dir, run, resume=True, steps=4, threads=1),
        lambda: model.use(run=run),
    ]
    before = digest(model)
    for attempt in attempts:
        with pytest.raises(RunError) as caught:
            attempt()
        assert str(caught.value) == message
    assert digest(model) == before, "the model is as it was"
    start.write_bytes(data)
    assert EdgeModel(lora_dir, run=run, step="last", threads=1).step == 2


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lora", {"noise": "gaussian"}, "--noise gaussian: directions of LoRA are outer products of signs; leave it out"),
        ("prefix", {"tune_a": True}, "--tune-a: this edge model has no branch points for LoRA; export it with --adapter lora"),
        ("prefix", {"rank": 4}, "--rank: this edge model has no branch points for LoRA; export it with --adapter lora"),
        ("prefix", {"alpha": 1.0}, "--alpha: this edge model has no branch points for LoRA; export it with --adapter lora"),
        (
            "lora",
            {"init": "nowhere"},
            "nowhere: no adapter (adapter_config.json is missing); give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)",
        ),
    ],
)
def test_settings_that_do_not_fit_the_adapter_are_refused(
    directories: dict[str, Path], reviews: str, tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EdgezoError) as caught:
        edgezo.tune(directories[kind], tmp_path / "run", data=reviews, steps=2, threads=1, directions=4, **TASK, **settings)
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()
