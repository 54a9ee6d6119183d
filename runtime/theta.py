"""What a run tunes: base tensors perturbed in place, one direction after the other, or an adapter whose directions are stacked."""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from edgezo.adapters import PREFIX, A, B, LoraTarget
from edgezo.config import TuneConfig
from edgezo.errors import ConfigError, RunError, first_line
from edgezo.runtime.estimators import ESTIMATORS
from edgezo.runtime.estimators.estimator import Estimate, Estimator, estimate_in_place
from edgezo.runtime.estimators.two_sided import TWO_SIDED
from edgezo.runtime.examples import Example
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.objective import Objective
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.passes import NumPyPasses
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.prompt_cache import Beginning, perturbed_beginning
from edgezo.runtime.rules import make_rule
from edgezo.runtime.rules.rule import Rule
from edgezo.runtime.samplers import Tunables, make_sampler
from edgezo.runtime.samplers.layers import LayerSubset
from edgezo.runtime.weights import MutableWeights
from edgezo.storage import write_atomically

LORA_SETTINGS = ("rank", "alpha", "tune_a")


def step_directions(config: TuneConfig, step: int) -> list[Direction]:
    """The directions of step `step` (from 0)."""
    return [Direction(config.seed, step, number) for number in range(config.directions)]


def mutable_weights(model: EdgeModel, config: TuneConfig, start: Path | None = None) -> MutableWeights:
    """theta of a run at its start; a model prepared for LoRA gets its adapter here.

    Args:
        start: tensors to start from, written by `write_start`; else those of the base, or of the run's seed.

    Raises:
        EdgezoError: the configuration does not fit the model.
    """
    assert config.eps is not None  # given, or measured before the run began
    described = model.manifest.adapter
    if described is not None and described.kind == "lora":
        subset = _lora_subset(model, config, described.targets)
        lora = Lora(described.targets, config.rank, config.alpha)
        if start is None:
            lora.initialise(config.seed)
        else:
            found = _read_start(start, {A: lora.a.shape, B: lora.b.shape})
            lora.a[...], lora.b[...] = found[A], found[B]
        model.adapter = lora
        return lora.weights(config.eps, config.tune_a, subset)
    for name in LORA_SETTINGS:
        if getattr(config, name) != TuneConfig.model_fields[name].default:
            shown = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{shown}: this edge model has no branch points for LoRA; export it with --adapter lora")
    if start is not None:
        model.weights[PREFIX][...] = _read_start(start, {PREFIX: model.weights[PREFIX].shape})[PREFIX]
    if model.on_device is not None:
        _refuse_on_device(model, config)
    layers = {tensor.name: tensor.layer for tensor in model.manifest.tensors}
    shapes = (model.on_device or NumPyPasses(model.weights, 1)).shapes
    sampler = make_sampler(config, Tunables(shapes, {name: layers.get(name) for name in shapes}, model.weights))
    return MutableWeights(model.on_device or model.weights, eps=config.eps, sampler=sampler, threads=model.threads)


def _lora_subset(model: EdgeModel, config: TuneConfig, targets: Sequence[LoraTarget]) -> LayerSubset | None:
    """Modules that a step moves; None when it moves all."""
    if config.noise != "rademacher":
        raise ConfigError(f"--noise {config.noise}: directions of LoRA are outer products of signs; leave it out")
    if config.sampler == "full":
        return None
    if config.sampler != "layers":
        reason = "LoRA's B begins at zero" if config.sampler == "magnitude" else "directions of LoRA are of rank one already"
        raise ConfigError(f"--sampler {config.sampler}: {reason}; give --sampler layers, or leave it out")
    layers = {tensor.name.removesuffix(".weight"): tensor.layer for tensor in model.manifest.tensors}
    return LayerSubset({target.module: layers.get(target.module) for target in targets}, config.share)


def _refuse_on_device(model: EdgeModel, config: TuneConfig) -> None:
    """A device makes z from the shared table, and nothing else is kept there than theta."""
    assert model.device is not None
    if config.sampler != "full":
        raise ConfigError(f"--sampler {config.sampler}: runs on the CPU alone; leave it or --device {model.device.name} out")
    if config.noise == "sphere":
        raise ConfigError(f"--noise sphere: runs on the CPU alone; leave it or --device {model.device.name} out")
    if config.rule in ("momentum", "adam", "conservative", "svrg", "hizoo"):
        raise ConfigError(f"--rule {config.rule}: runs on the CPU alone; leave it or --device {model.device.name} out")


def _read_start(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, npt.NDArray[np.float32]]:
    try:
        found: dict[str, npt.NDArray[np.float32]] = load_file(path)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not readable ({first_line(error)}); restore it from a copy") from None
    if {name: (array.shape, array.dtype.str) for name, array in found.items()} != {name: (shape, "<f4") for name, shape in shapes.items()}:
        raise RunError(f"{path}: does not hold the tensors of this run; restore it from a copy")
    return found


def write_start(adapter: Lora | Prefix, path: Path) -> None:
    """Keep the tensors a run starts from: float32 lora_A and lora_B, flat as in `Lora`, or prefix."""
    write_atomically(path, save(_tensors(adapter)))


def _tensors(adapter: Lora | Prefix) -> dict[str, npt.NDArray[np.float32]]:
    return {A: adapter.a, B: adapter.b} if isinstance(adapter, Lora) else {PREFIX: adapter.array}


class Theta:
    """The tunable weights of a model with the loss of examples under them.

    Args:
        model: its weights and adapter are those of `weights`.
        config: of the run.
        weights: from `mutable_weights`.
        objective: the loss, over the same model.
    """

    def __init__(self, model: EdgeModel, config: TuneConfig, weights: MutableWeights, objective: Objective) -> None:
        self.model, self.config, self.weights, self.objective = model, config, weights, objective
        self.sequences = objective.sequences

    @cached_property
    def rule(self) -> Rule:
        """The update rule, made at its first use: some keep arrays of the size of theta, which a theta that only measures never needs."""
        return make_rule(self.config, self.weights.sizes)

    def anew(self, config: TuneConfig, start: Path | None) -> "Theta":
        """theta at the start of a run of `config`, over the same model, rows of the head and objective; this one is not to be used any more."""
        head = self.model.head
        self.__dict__.pop("rule", None)  # its arrays, whoever still holds this theta
        self.model.reset()
        self.model.head = head
        return Theta(self.model, config, mutable_weights(self.model, config, start), self.objective)

    def adapter_sha256(self) -> str | None:
        """Of the adapter's tensors as they are now; None of weights in place, which every eps rounds to a grid of its own."""
        self.weights.flush()
        return hashlib.sha256(save(_tensors(self.model.adapter))).hexdigest() if self.model.adapter is not None else None

    def groups(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """The examples of a step, or of several, shared out to the directions; or all of them for every direction."""
        count = self.config.directions
        if self.config.shares_rows:
            return [examples] * count
        size = len(examples) // count
        return [examples[place * size : (place + 1) * size] for place in range(count)]

    def measure(self, batch: Callable[[int], Sequence[Example]], step: int, learning_rate: float) -> list[Estimate]:
        """The scalars of a step; theta is as before, restoring additions may be pending.

        Args:
            batch: the examples of a step.
            step: from 0.
            learning_rate: of this step, for rules that try their update out.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; theta is as before.
        """
        directions = step_directions(self.config, step)
        return self.rule.measure(_StepProblem(self, batch, step, directions), directions, learning_rate)

    def estimates(
        self,
        directions: Sequence[Direction],
        groups: Sequence[Sequence[Example]],
        eps: float | None = None,
        estimator: Estimator = TWO_SIDED,
    ) -> list[Estimate]:
        """Estimates along directions, each on its group of examples; theta is as before, restoring additions may be pending.

        Args:
            groups: all the same for an estimator that shares them.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; theta is as before.
        """
        eps = self.weights.eps if eps is None else eps
        generates = self.objective.generates
        if self.model.adapter is None or (generates and not self.model.generates_copies):
            losses = [partial(self.objective.loss, group) for group in groups]
            return estimate_in_place(estimator, self.weights, losses, directions, eps)

        def copies(chosen: Sequence[int], sides: Sequence[int]) -> dict[str, Any]:
            return {**self._stacked_feeds([directions[index] for index in chosen], sides, eps), **self.model.head_feeds()}

        def beginnings(chosen: Sequence[int], sides: Sequence[int]) -> Beginning:
            return perturbed_beginning(self.model, self.weights, [directions[index] for index in chosen], sides, eps)

        self.weights.flush()
        base, sides = self.objective.loss(groups[0]) if estimator.shared else math.nan, estimator.sides
        if generates:
            copy_bytes = sum(4 * size for size in self.weights.sizes.values())
            found = self.objective.stacked_generated_losses(groups, sides, beginnings, copy_bytes)
            return estimator.estimates(found, base, directions, eps)
        return estimator.estimates(self.objective.stacked_losses(groups, sides, copies), base, directions, eps)

    def step(self, directions: Sequence[Direction], projected_grads: Sequence[float], learning_rate: float) -> None:
        """Apply the update of one step from its scalars."""
        zo_step(self.weights, directions, projected_grads, learning_rate, self.rule, self.config.weight_decay)

    def _stacked_feeds(self, directions: Sequence[Direction], sides: Sequence[int], eps: float) -> dict[str, Any]:
        self.weights.flush()
        adapter = self.model.adapter
        assert adapter is not None
        return adapter.stacked_feeds(self.weights, directions, sides, eps)


class _StepProblem:
    """The rows of one step under theta, for its rule."""

    def __init__(self, theta: Theta, batch: Callable[[int], Sequence[Example]], step: int, directions: Sequence[Direction]) -> None:
        self.theta, self.batch, self.step, self.directions = theta, batch, step, directions
        self.estimator = ESTIMATORS[theta.config.estimator]

    def estimates(self, batches: int = 1) -> list[Estimate]:
        """As `Problem`."""
        examples = [example for step in range(self.step, self.step + batches) for example in self.batch(step)]
        return self.theta.estimates(self.directions, self.theta.groups(examples), estimator=self.estimator)

    def losses_at(self, scales: Sequence[float], factors: Sequence[int]) -> list[float]:
        """As `Problem`."""
        losses, rows = [], self.batch(self.step)
        for factor in factors:
            with self.theta.weights.moved(self.directions, scales, factor):
                losses.append(self.theta.objective.loss(rows))
        return losses

    def estimates_at_kept(self) -> list[Estimate]:
        """As `Problem`."""
        with self.theta.weights.at_kept():
            return self.estimates()
