"""Steps of adapters: many directions in one forward, and the whole step as float64 and autograd have it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import ExportTiny
from reference import (
    Numbers,
    both_sides,
    make_examples,
    make_objective,
    matrix_shapes,
    network_loss,
    outer_products,
    peft_network,
    write_adapter,
)
from tiny_adapters import digest, make_theta, perturbed

from edgezo.adapters import B_ROWS, B_SIGNS
from edgezo.config import TuneConfig
from edgezo.errors import NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.examples import Example
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.scoring import BATCH_TOKENS, Sequences
from edgezo.runtime.theta import Theta, step_directions

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
    with perturbed(theta, step_directions(theta.config, step)[number], side):
        return make_objective(Sequences(theta.model)).loss(group)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("words", [(1, 1), (3, 1, 2)])
@pytest.mark.parametrize(
    ("kind", "settings"), [("lora", {}), ("lora", {"tune_a": True}), ("prefix", {}), ("prefix", {"noise": "gaussian"})]
)
def test_stacked_losses_are_those_of_each_copy_alone(
    adapter_dirs: dict[str, Path], tmp_path: Path, kind: str, settings: dict[str, Any], words: tuple[int, ...], batch: int
) -> None:
    theta = make_theta(adapter_dirs[kind], tmp_path / "start", directions=4, batch=batch, eps=2**-5, **settings)
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
    adapter_dirs: dict[str, Path], tmp_path: Path, kind: str, place: int, side: str
) -> None:
    """Of three directions: scores come direction after direction, two label words for each sign."""
    theta = make_theta(adapter_dirs[kind], tmp_path / "start", directions=3, batch=1)
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
