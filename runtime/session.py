"""onnxruntime sessions over weights that NumPy owns.

A tensor is mutable when it is an overridable initializer of the graph and its buffer is given with `add_initializer`: the engine then
reads NumPy's memory at every run (measured with onnxruntime 1.18 to 1.31, CPU). Two sessions over the same arrays share one copy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from edgezo.errors import EdgeModelError, first_line

Array = npt.NDArray[Any]


def engine_version() -> tuple[int, ...]:
    """Major and minor version of onnxruntime."""
    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """How every graph of an edge model runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # one warning per overridable initializer otherwise
    options.intra_op_num_threads = threads
    # a pattern reserves one more block for every shape of batch: 20 to 70 MB of SmolLM2-135M's peak, and no time (onnxruntime 1.31)
    options.enable_mem_pattern = False
    # planning which buffers to reuse takes time in the square of their number: 8 of the 10 s in which a graph with LoRA at 210
    # layers loads; without it a forward is as fast and as small (onnxruntime 1.31)
    options.enable_mem_reuse = False
    # a node as soon as it can run; else what a graph gives beside the scores, as the attention outputs for a probe, is gathered last, and
    # the 18 tensors it comes from stay until then: 764 instead of 718 MB of `bench.systems --only 'bare forward, fp32'`, 8 x 64, in the
    # same time (CPU, onnxruntime 1.31; outputs are the same to the last bit)
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # worker threads that spin after a run would compete with the passes over the weights
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class Session:
    """One graph over shared weight arrays.

    Args:
        path: the .onnx file. Frozen weights lie in external files beside it: the engine maps them and packs them once, with no copy here.
        weights: mutable arrays by name, C-contiguous; they must not be replaced while the session lives, only written to.
        threads: intra-op threads.
    """

    def __init__(self, path: Path, weights: Mapping[str, Array], threads: int) -> None:
        self._path = path
        options = session_options(threads)
        self._values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
        self._weights = dict(weights)
        for name, value in self._values.items():
            options.add_initializer(name, value)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the engine's own exception classes are not importable in every version
            raise EdgeModelError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it: {first_line(error)}") from error

    @property
    def mutable(self) -> set[str]:
        """Names of the initializers that the engine lists as overridable."""
        return {value.name for value in self._session.get_overridable_initializers()}

    @property
    def inputs(self) -> set[str]:
        """Names of the inputs that every run must feed."""
        return {value.name for value in self._session.get_inputs()}

    @property
    def outputs(self) -> set[str]:
        """Names of what a run can return."""
        return {value.name for value in self._session.get_outputs()}

    def run(self, outputs: list[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Run the graph on the weights as they are now.

        Raises:
            EdgeModelError: the engine refuses the inputs or has no memory for them.
        """
        try:
            result: list[Array] = self._session.run(outputs, dict(feeds))
        except Exception as error:
            raise self._refusal(error) from error
        return result

    def _refusal(self, error: Exception) -> EdgeModelError:
        return EdgeModelError(f"{self._path}: onnxruntime {onnxruntime.__version__} cannot run it: {first_line(error)}")
