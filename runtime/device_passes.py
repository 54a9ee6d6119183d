"""Passes over tunable weights that live on an accelerator: one flat buffer, changed in place by small ONNX graphs.

The buffer is float32 [blocks * BLOCK]; every tensor begins at a block, so a block belongs to one tensor and one run of a graph moves
blocks of many tensors. A kernel's output is bound to the addresses of its input. What crosses to the device in a step is scalars and one
int32 a block and direction.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from edgezo.errors import EdgeModelError, first_line
from edgezo.runtime import noise
from edgezo.runtime.device import Device, make_session
from edgezo.runtime.grid import Additions, GridTensor, direction_dither, sign_values
from edgezo.runtime.noise import BLOCK, Direction, Distribution, Floats
from edgezo.runtime.samplers.sampler import Sampler
from edgezo.runtime.session import Array

RUN_BLOCKS = 64  # blocks of one run of a kernel: 16 MB, and twice that for its places and windows
TABLE_LENGTH = noise.TABLE_SIZE + BLOCK


class Region(NamedTuple):
    """Where a tensor lies in the buffer, in elements."""

    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64))


class DevicePasses:
    """`Passes` over tensors in a buffer on a device. Each graph gives the bits that NumPy gives.

    Args:
        device: where.
        shapes: of every tensor, by Hugging Face name.
    """

    def __init__(self, device: Device, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.device, self.shapes = device, dict(shapes)
        self.regions: dict[str, Region] = {}
        self.blocks = 0
        for name, shape in self.shapes.items():
            self.regions[name] = Region(self.blocks * BLOCK, shape)
            self.blocks += -(-self.regions[name].size // BLOCK)
        self._kernels: dict[str, onnxruntime.InferenceSession] = {}
        self._theta = self._allocate(self.blocks * BLOCK)
        self._lane = self._to_device(np.arange(BLOCK, dtype=np.int32))
        self._tables: dict[Distribution, onnxruntime.OrtValue] = {}
        self._values: onnxruntime.OrtValue | None = None

    def address(self, name: str) -> int:
        """Device address of a tensor's first element."""
        return self._at(self.regions[name].start)

    def upload(self, name: str, array: Floats) -> None:
        """theta of one tensor from memory."""
        flat, start = array.reshape(-1), self.regions[name].start
        for first, count in _chunks(flat.size):
            self._run("copy", {"given": np.ascontiguousarray(flat[first : first + count])}, {}, self._at(start + first), [count])

    def download(self, name: str) -> Floats:
        """A copy of theta of one tensor in memory."""
        region = self.regions[name]
        parts = [
            self._fetch("copy", {"given": (np.float32, [count], self._at(region.start + first))}) for first, count in _chunks(region.size)
        ]
        whole: Floats = np.concatenate(parts).reshape(region.shape)
        return whole

    def largest(self, tensor: GridTensor) -> float:
        """As `Passes`."""
        start = self.regions[tensor.name].start
        found = [self._fetch("largest", {"theta": (np.float32, [count], self._at(start + first))}) for first, count in _chunks(tensor.size)]
        most, finite = np.stack(found).T
        return float(np.nan if np.isnan(finite).any() else most.max())

    def round_to_grid(self, tensor: GridTensor) -> None:
        """As `Passes`."""
        self._in_place("round", tensor, inverse=1 / tensor.quantum, quantum=tensor.quantum)

    def decay(self, tensors: Sequence[GridTensor], rate: float, dither: float) -> None:
        """As `Passes`."""
        for tensor in tensors:
            if tensor.decays:
                self._in_place("decay", tensor, rate=rate / tensor.quantum, dither=dither, quantum=tensor.quantum)

    def add(self, tensors: Sequence[GridTensor], additions: Additions, sampler: Sampler) -> None:
        """As `Passes`, with z from the shared table alone: the values of every grid are made on the device, then windows of them are added."""
        assert sampler.distribution is not None, "other samplers are refused before a run starts"
        exponents = sorted({tensor.exponent for tensor in tensors})
        grid_of = {exponent: place for place, exponent in enumerate(exponents)}
        for direction, scales in additions.items():
            size = 2 * TABLE_LENGTH * len(exponents)
            values = self._make_values(
                direction, scales, [tensor.quantum for tensor in _one_of_each(tensors, exponents)], sampler.distribution
            )
            counts = {tensor.id: -(-tensor.size // BLOCK) for tensor in tensors}
            drawn, negated = noise.block_draws(direction, counts)
            entries = np.split(drawn + TABLE_LENGTH * negated, np.cumsum([*counts.values()])[:-1])
            offsets = np.empty((self.blocks, 1), np.int32)
            for tensor, own in zip(tensors, entries, strict=True):
                first = self.regions[tensor.name].start // BLOCK
                offsets[first : first + len(own), 0] = 2 * TABLE_LENGTH * grid_of[tensor.exponent] + own
            for first in range(0, self.blocks, RUN_BLOCKS):
                shape = [min(RUN_BLOCKS, self.blocks - first), BLOCK]
                address = self._at(first * BLOCK)
                given = {
                    "theta": (np.float32, shape, address),
                    "lane": (np.int32, [BLOCK], self._lane.data_ptr()),
                    "values": (np.float32, [size], values.data_ptr()),
                }
                self._run("windows", {"offsets": offsets[first : first + RUN_BLOCKS]}, given, address, shape)

    def _make_values(
        self, direction: Direction, scales: Mapping[float, int], quanta: list[float], distribution: Distribution
    ) -> onnxruntime.OrtValue:
        """[grid, sign, table]: what is added for each entry of the table on each grid, and its opposite."""
        table, size = self._table(distribution), 2 * TABLE_LENGTH * len(quanta)
        if self._values is None or self._values.shape() != [size]:
            self._values = self._allocate(size)
        if distribution == "rademacher":
            with np.errstate(over="ignore"):  # infinity is found when the grid is fitted
                amounts = np.array([sign_values(direction, scales, quantum) for quantum in quanta]).astype(np.float32)
            host = {"plus": amounts[:, :1], "minus": amounts[:, 1:]}
            given = {"signs": (np.float32, [TABLE_LENGTH], table.data_ptr())}
            self._run("signs", {name: np.ascontiguousarray(array) for name, array in host.items()}, given, self._values.data_ptr(), [size])
        else:
            host = {
                "ratios": np.array([[[scale / quantum] for scale in scales] for quantum in quanta]),
                "times": np.array([[times] for times in scales.values()], np.float64),
                "dither": np.array([direction_dither(direction)]),
                "quanta": np.array([[quantum] for quantum in quanta]),
            }
            given = {"quantiles": (np.float64, [TABLE_LENGTH], table.data_ptr())}
            self._run("quantiles", host, given, self._values.data_ptr(), [size])
        return self._values

    def _table(self, distribution: Distribution) -> onnxruntime.OrtValue:
        if distribution not in self._tables:
            shared = noise.table(distribution)
            self._tables[distribution] = self._to_device(shared.copy() if distribution == "rademacher" else shared.astype(np.float64))
        return self._tables[distribution]

    def _in_place(self, kernel: str, tensor: GridTensor, **scalars: float) -> None:
        host = {name: np.array([value], np.float32) for name, value in scalars.items()}
        for first, count in _chunks(tensor.size):
            address = self._at(self.regions[tensor.name].start + first)
            self._run(kernel, host, {"theta": (np.float32, [count], address)}, address, [count])

    def _run(self, kernel: str, host: Mapping[str, Array], given: Mapping[str, Any], address: int, shape: Sequence[int]) -> None:
        """Run a kernel on arrays in memory and (dtype, shape, address) on the device, its float32 output written to `address`."""
        binding, session = self._bind(kernel, host, given)
        binding.bind_output(session.get_outputs()[0].name, self.device.name, 0, np.float32, list(shape), address)
        self._go(session, binding)

    def _fetch(self, kernel: str, given: Mapping[str, Any]) -> Array:
        """Run a kernel and bring its output to memory."""
        binding, session = self._bind(kernel, {}, given)
        binding.bind_output(session.get_outputs()[0].name, "cpu")
        self._go(session, binding)
        found: Array = binding.copy_outputs_to_cpu()[0]
        return found

    def _bind(self, kernel: str, host: Mapping[str, Array], given: Mapping[str, Any]) -> tuple[Any, onnxruntime.InferenceSession]:
        session = self._kernel(kernel)
        binding = session.io_binding()
        for name, array in host.items():
            binding.bind_cpu_input(name, array)
        for name, (dtype, shape, address) in given.items():
            binding.bind_input(name, self.device.name, 0, dtype, shape, address)
        return binding, session

    def _go(self, session: onnxruntime.InferenceSession, binding: Any) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # the engine's own exception classes are not importable in every version
            raise EdgeModelError(
                f"--device {self.device.name}: onnxruntime cannot change the weights: {first_line(error)}; use --device cpu"
            ) from error

    def _kernel(self, name: str) -> onnxruntime.InferenceSession:
        if name not in self._kernels:
            graph = (resources.files("edgezo.runtime") / "kernels" / f"{name}.onnx").read_bytes()
            self._kernels[name] = make_session(graph, onnxruntime.SessionOptions(), self.device, f"the {name} kernel")
        return self._kernels[name]

    def _at(self, element: int) -> int:
        return int(self._theta.data_ptr()) + 4 * element

    def _allocate(self, size: int) -> onnxruntime.OrtValue:
        """float32 zeros. The kernel's session owns them: its arena takes what is asked for, that of Python's own OrtValues may double."""
        session = self._kernel("zeros")
        binding = session.io_binding()
        binding.bind_cpu_input("size", np.array([size]))
        binding.bind_output("made", self.device.name)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise EdgeModelError(
                f"--device {self.device.name}: no memory for {4 * size / 1e6:.0f} MB ({first_line(error)}); export a smaller model or an adapter on an int4 base"
            ) from error
        made: onnxruntime.OrtValue = binding.get_outputs()[0]
        return made

    def _to_device(self, array: Array) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device.name, 0)


def _one_of_each(tensors: Sequence[GridTensor], exponents: list[int]) -> list[GridTensor]:
    by_exponent = {tensor.exponent: tensor for tensor in tensors}
    return [by_exponent[exponent] for exponent in exponents]


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    """(first element, elements) of runs."""
    for first in range(0, size, RUN_BLOCKS * BLOCK):
        yield first, min(RUN_BLOCKS * BLOCK, size - first)
