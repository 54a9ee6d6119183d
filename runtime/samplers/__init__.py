"""Samplers: which weights a direction moves, and how. A new one is a file and a row of `SAMPLERS` (and its name in edgezo/config.py)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from edgezo.config import TuneConfig
from edgezo.errors import ConfigError
from edgezo.runtime.noise import Floats
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.samplers.layers import Layers, LayerSubset
from edgezo.runtime.samplers.lozo import Lozo
from edgezo.runtime.samplers.magnitude import Magnitude
from edgezo.runtime.samplers.sampler import Sampler
from edgezo.runtime.samplers.sphere import Sphere
from edgezo.runtime.samplers.subzero import Subzero
from edgezo.runtime.samplers.tezo import Tezo


class Tunables(NamedTuple):
    """What a sampler may look at. shapes: of every tensor. layers: the layer of each. start: theta_0, where it lies in memory."""

    shapes: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, int | None]
    start: Mapping[str, Floats]

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of every tensor."""
        return {name: array.size for name, array in self.start.items()}


def _full(config: TuneConfig, tunables: Tunables) -> Sampler:
    return Sphere(tunables.sizes) if config.noise == "sphere" else Full(config.noise)


def _layers(config: TuneConfig, tunables: Tunables) -> Sampler:
    if all(layer is None for layer in tunables.layers.values()):
        raise ConfigError("--sampler layers: none of the tunable tensors belongs to a layer; leave it out")
    return Layers(LayerSubset(tunables.layers, config.share), config.table)


def _magnitude(config: TuneConfig, tunables: Tunables) -> Sampler:
    return Magnitude(tunables.start, config.share, config.table)


def _low_rank(kind: type[Lozo | Subzero | Tezo]) -> "Factory":
    def make(config: TuneConfig, tunables: Tunables) -> Sampler:
        if not any(len(shape) == 2 for shape in tunables.shapes.values()):
            raise ConfigError(f"--sampler {config.sampler}: none of the tunable tensors is a matrix; leave it out")
        return kind(tunables.shapes, config.z_rank, config.redraw_every)

    return make


Factory = Callable[[TuneConfig, Tunables], Sampler]
SAMPLERS: dict[str, Factory] = {
    "full": _full,
    "layers": _layers,
    "magnitude": _magnitude,
    "lozo": _low_rank(Lozo),
    "subzero": _low_rank(Subzero),
    "tezo": _low_rank(Tezo),
}


def make_sampler(config: TuneConfig, tunables: Tunables) -> Sampler:
    """The sampler of a run over these tensors.

    Raises:
        ConfigError: it has nothing to move in them.
    """
    return SAMPLERS[config.sampler](config, tunables)
