"""A graph of an edge model on an accelerator: its tunable weights are inputs bound by address, an adapter stays there until it changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from edgezo.adapters import A_ROWS, A_SIGNS, B_ROWS, B_SIGNS, HEAD_ROWS, OPTIONAL_INPUTS, PROBE_A, PROBE_B
from edgezo.errors import EdgeModelError
from edgezo.runtime.device import Device, make_session
from edgezo.runtime.device_passes import DevicePasses
from edgezo.runtime.graph_file import external_files, without_initializers
from edgezo.runtime.session import Array, Session, engine_version, session_options

FOLDER_KEY, FOLDER_ENGINE = "session.model_external_initializers_file_folder_path", (1, 21)


class _Held(NamedTuple):
    """What lies on the device, and the array in memory that it was made of."""

    shape: tuple[int, ...]
    stored: bytes
    value: onnxruntime.OrtValue


class DeviceSession(Session):
    """One graph of an edge model on a device, its tunable weights read from a buffer there.

    An adapter, rows of the head and a probe are sent when their bytes are others than at the run before: whoever changed them, the graph never
    sees old ones. Comparing takes 2 ms for LoRA of rank 8 at all layers of SmolLM2-135M. Perturbations of stacked LoRA are new at every run and are not kept; stacked prefixes have the names of the one prefix and take its place.

    Args:
        path: the .onnx file.
        passes: hold the tunable weights; None when all are frozen.
        files: where the tunable weights are stored, which is not read here.
        device: where.
        threads: of what the engine leaves to the CPU.

    Attributes:
        sent_bytes: of all feeds so far that came from memory.
    """

    def __init__(self, path: Path, passes: DevicePasses | None, files: set[str], device: Device, threads: int) -> None:
        self._path, self._device = path, device
        options = session_options(threads)
        self._names = list(passes.shapes) if passes is not None else []
        graph: str | bytes = str(path)
        if self._names:
            # a binding takes no input that may be left out (onnxruntime 1.31), so those of an exact start are plain inputs here
            graph = without_initializers(path, {*self._names, *OPTIONAL_INPUTS})
            if external_files(path) - files and engine_version() < FOLDER_ENGINE:
                raise EdgeModelError(
                    f"{path}: some weights are tunable and others frozen; on {device.name} that needs onnxruntime {'.'.join(map(str, FOLDER_ENGINE))} or later, this is {onnxruntime.__version__}; update it, or export with all weights tunable"
                )
            options.add_session_config_entry(FOLDER_KEY, str(path.parent))
        self._session = make_session(graph, options, device, str(path))
        self._binding = self._session.io_binding()
        self.sent_bytes = 0
        self._held: dict[str, _Held] = {}
        optional = {value.name for value in self._session.get_overridable_initializers()} | OPTIONAL_INPUTS
        self._staying = optional - {A_ROWS, A_SIGNS, B_ROWS, B_SIGNS}
        used = {value.name for value in self._session.get_inputs()}
        self._absent = {value.name: _default(value) for value in self._session.get_inputs() if value.name in OPTIONAL_INPUTS}
        for name in self._names:
            if passes is not None and name in used:
                self._binding.bind_input(name, device.name, 0, np.float32, list(passes.shapes[name]), passes.address(name))

    @property
    def inputs(self) -> set[str]:
        """Names of the inputs that every run must feed."""
        return super().inputs - {*self._names, *OPTIONAL_INPUTS}

    def run(self, outputs: list[str], feeds: Mapping[str, Array]) -> list[Array]:
        """As `Session.run`."""
        if self._names:
            feeds = {**self._absent, **feeds}
        try:
            # held to the end: one in memory is no copy of its array
            given = {name: self._given(name, np.ascontiguousarray(array)) for name, array in feeds.items()}
            if not self._names:
                return [value.numpy() for value in self._session.run_with_ort_values(outputs, given)]
            for name, value in given.items():
                self._binding.bind_ortvalue_input(name, value)
            self._binding.clear_binding_outputs()
            for name in outputs:
                self._binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(self._binding)
            found: list[Array] = self._binding.copy_outputs_to_cpu()
        except Exception as error:
            raise self._refusal(error) from error
        return found

    def _given(self, name: str, array: Array) -> onnxruntime.OrtValue:
        """The array as the engine takes it; one that stays and is what it was at the last run is on the device already."""
        if name not in self._staying or not array.size:
            self.sent_bytes += array.nbytes
            return onnxruntime.OrtValue.ortvalue_from_numpy(array)
        held, stored = self._held.get(name), array.tobytes()
        if held is None or held.shape != array.shape or held.stored != stored:
            self.sent_bytes += array.nbytes
            held = _Held(array.shape, stored, onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), self._device.name, 0))
            self._held[name] = held
        return held.value


def _default(value: Any) -> Array:
    """What the graph itself has for an input of an exact start that is left out: no elements, or a rank of zeros."""
    absent = int(value.name in {PROBE_A, PROBE_B})
    shape = [1, 0] if value.name == HEAD_ROWS else [size if isinstance(size, int) else absent for size in value.shape]
    return np.zeros(shape, np.int64 if value.type == "tensor(int64)" else np.float32)
