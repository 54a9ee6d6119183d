"""What a run tunes: base tensors perturbed in place, one direction after the other, or an adapter whose directions are stacked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from edgezo.adapters import PREFIX, A, B
from edgezo.config import TuneConfig
from edgezo.errors import ConfigError, RunError, first_line
from edgezo.runtime.estimator import Estimate, stacked_two_sided, two_sided
from edgezo.runtime.examples import Example
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.objective import Objective
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.outer import OuterWeights
from edgezo.runtime.prefix import Prefix
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
        if config.noise != "rademacher":
            raise ConfigError(f"--noise {config.noise}: directions of LoRA are outer products of signs; leave it out")
        lora = Lora(described.targets, config.rank, config.alpha)
        if start is None:
            lora.initialise(config.seed)
        else:
            found = _read_start(start, {A: lora.a.shape, B: lora.b.shape})
            lora.a[...], lora.b[...] = found[A], found[B]
        model.adapter = lora
        return lora.weights(config.eps, config.tune_a)
    for name in LORA_SETTINGS:
        if getattr(config, name) != TuneConfig.model_fields[name].default:
            shown = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{shown}: this edge model has no branch points for LoRA; export it with --adapter lora")
    if start is not None:
        model.weights[PREFIX][...] = _read_start(start, {PREFIX: model.weights[PREFIX].shape})[PREFIX]
    return MutableWeights(model.on_device or model.weights, eps=config.eps, distribution=config.noise, threads=model.threads)


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
    tensors = {A: adapter.a, B: adapter.b} if isinstance(adapter, Lora) else {PREFIX: adapter.array}
    write_atomically(path, save(tensors))


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

    def anew(self, config: TuneConfig, start: Path | None) -> "Theta":
        """theta at the start of a run of `config`, over the same model, rows of the head and objective; this one is not to be used any more."""
        head = self.model.head
        self.model.reset()
        self.model.head = head
        return Theta(self.model, config, mutable_weights(self.model, config, start), self.objective)

    def groups(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """The examples of a step shared out, `batch` to every direction."""
        size = self.config.batch
        return [examples[place * size : (place + 1) * size] for place in range(self.config.directions)]

    def estimates(self, directions: Sequence[Direction], groups: Sequence[Sequence[Example]], eps: float | None = None) -> list[Estimate]:
        """Two-sided estimates, each on its own group of examples; theta is as before, restoring additions may be pending.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; theta is as before.
        """
        eps = self.weights.eps if eps is None else eps
        if self.model.adapter is None or self.objective.generates:
            return [
                two_sided(self.weights, lambda group=group: self.objective.loss(group), direction, eps)  # type: ignore[misc]
                for direction, group in zip(directions, groups, strict=True)
            ]

        def losses(directions: Sequence[Direction], sides: Sequence[int], eps: float) -> npt.NDArray[np.float64]:
            def copies(chosen: Sequence[int], sides: Sequence[int]) -> dict[str, Any]:
                return {**self._stacked_feeds([directions[index] for index in chosen], sides, eps), **self.model.head_feeds()}

            return self.objective.stacked_losses(groups, sides, copies)

        return stacked_two_sided(losses, directions, eps)

    def step(self, directions: Sequence[Direction], projected_grads: Sequence[float], learning_rate: float) -> None:
        """Apply the update of one step from its scalars."""
        zo_step(self.weights, directions, projected_grads, learning_rate, self.config.rule, self.config.weight_decay)

    def _stacked_feeds(self, directions: Sequence[Direction], sides: Sequence[int], eps: float) -> dict[str, Any]:
        self.weights.flush()
        adapter = self.model.adapter
        if isinstance(adapter, Lora):
            assert isinstance(self.weights, OuterWeights)
            return adapter.stacked_feeds(self.weights, directions, sides, eps)
        assert adapter is not None
        return adapter.stacked_feeds(self.weights, directions, sides, eps)
