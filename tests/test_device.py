"""Weights on a device: its graphs, run here by the CPU provider, give the bits of NumPy; only the provider differs on a GPU."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Command

import edgezo
from edgezo.errors import ConfigError, DeadTensorError, EdgeModelError, NonFiniteLossError
from edgezo.export.kernels import KERNELS, make_kernel
from edgezo.runtime import device as device_module
from edgezo.runtime import device_passes, device_session, noise
from edgezo.runtime.device import CUDA, Device
from edgezo.runtime.device_passes import DevicePasses
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import BLOCK, Direction, Distribution
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.weights import MutableWeights

HERE = Device("cpu", "CPUExecutionProvider", {})
DISTRIBUTIONS: list[Distribution] = ["rademacher", "gaussian"]
TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great"}
Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def cuda_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cuda` runs the same graphs on the CPU provider, over memory that only ONNX graphs touch."""
    monkeypatch.setitem(device_module.DEVICES, "cuda", HERE)


def make_tensors(seed: int = 0) -> Tensors:
    """Several grids, a tensor of more than one run, sizes that fill no block, and an outlier."""
    random = np.random.default_rng(seed)
    shapes = {"matrix": (300, 1000), "bias": (70,), "small": (5, BLOCK), "norm": (576,), "one": (1,)}
    scales = {"matrix": 0.1, "bias": 3.0, "small": 1e-3, "norm": 250.0, "one": 1.0}
    return {name: (random.standard_normal(shape) * scales[name]).astype(np.float32) for name, shape in shapes.items()}


def on_device(tensors: Tensors) -> DevicePasses:
    passes = DevicePasses(HERE, {name: array.shape for name, array in tensors.items()})
    for name, array in tensors.items():
        passes.upload(name, array)
    return passes


def downloaded(passes: DevicePasses) -> dict[str, bytes]:
    return {name: passes.download(name).tobytes() for name in passes.shapes}


def digest(model: EdgeModel) -> str:
    """SHA-256 of what a run tuned, wherever it lies."""
    arrays = model.weights.values() if model.on_device is None else [model.on_device.download(name) for name in model.on_device.shapes]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


# kernels


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_are_those_of_their_source(name: str) -> None:
    stored = onnx.load(str(Path(device_module.__file__).parent / "kernels" / f"{name}.onnx"))
    assert stored == make_kernel(name)


def test_there_is_no_other_kernel() -> None:
    assert {path.stem for path in (Path(device_module.__file__).parent / "kernels").glob("*.onnx")} == KERNELS.keys()


def test_what_is_uploaded_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_passes, "RUN_BLOCKS", 2)
    tensors = make_tensors()
    assert downloaded(on_device(tensors)) == {name: array.tobytes() for name, array in tensors.items()}


@pytest.mark.parametrize("run_blocks", [1, 3, 64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_steps_give_the_bits_of_numpy(distribution: Distribution, run_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perturbations both ways, updates, decay, several directions, and a step so large that grids grow coarser."""
    monkeypatch.setattr(device_passes, "RUN_BLOCKS", run_blocks)
    arrays, passes = make_tensors(), on_device(make_tensors())
    both = [MutableWeights(tensors, eps=1e-3, sampler=Full(distribution)) for tensors in (arrays, passes)]
    start = [tensor.exponent for tensor in both[0].tensors]
    for step in range(12):
        for weights in both:
            directions = [Direction(3, step, number) for number in range(2)]
            for sign in (1, -2, 1):
                weights.add(directions[0], weights.eps, sign)
                weights.flush()
            weights.update(directions, [0.01 * (step - 5), 1e-7] if step != 9 else [0.5, 0.3], 0.01 if step % 3 == 0 else 0.0)
    for weights in both:
        weights.flush()
    assert both[0].eps == both[1].eps
    assert [tensor.exponent for tensor in both[0].tensors] == [tensor.exponent for tensor in both[1].tensors] != start
    assert downloaded(passes) == {name: array.tobytes() for name, array in arrays.items()}
    assert downloaded(passes) != {name: array.tobytes() for name, array in make_tensors().items()}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_perturbation_taken_back_leaves_no_trace(distribution: Distribution) -> None:
    passes = on_device(make_tensors())
    weights = MutableWeights(passes, eps=1e-3, sampler=Full(distribution))
    before = downloaded(passes)
    weights.add(Direction(0, 0), weights.eps)
    weights.flush()
    moved = passes.download("small") - np.frombuffer(before["small"], np.float32).reshape(5, BLOCK)
    z = noise.draw(Direction(0, 0), "small", 5 * BLOCK, distribution).reshape(5, BLOCK)
    assert np.abs(moved - weights.eps * z).max() <= max(tensor.quantum for tensor in weights.tensors if tensor.name == "small")
    weights.add(Direction(0, 0), weights.eps, -1)
    weights.flush()
    assert downloaded(passes) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(value: float) -> None:
    tensors = make_tensors()
    tensors["matrix"][7, 7] = value
    with pytest.raises(NonFiniteLossError, match="matrix: holds NaN or infinity"):
        MutableWeights(on_device(tensors), eps=1e-3)


# runs


@pytest.mark.parametrize(
    ("export", "settings"),
    [
        ({}, {}),
        ({}, {"noise": "gaussian", "weight_decay": 0.1, "lr": 1e-2}),
        ({"tunable": "norms"}, {}),
        ({"adapter": "lora"}, {}),
        ({"adapter": "prefix"}, {}),
    ],
)
def test_a_run_is_the_same_here_and_there(
    export_tiny: Callable[..., Path], tmp_path: Path, reviews: str, export: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Its losses, its scalars and its weights; and each replays the journal of the other."""
    edge = export_tiny("llama", **export)
    given = {"data": reviews, "valid": reviews, "steps": 6, "eval_every": 3, "directions": 2, "batch": 2, "lr": 1e-3, **TASK, **settings}
    results = [edgezo.tune(edge, tmp_path / device, device=device, threads=1, **given) for device in ("cpu", "cuda")]
    assert results[0].best == results[1].best
    assert (tmp_path / "cpu" / "journal.bin").read_bytes() == (tmp_path / "cuda" / "journal.bin").read_bytes()
    found = {
        digest(EdgeModel(edge, run=tmp_path / run, step="last", device=device)) for run in ("cpu", "cuda") for device in ("cpu", "cuda")
    }
    assert len(found) == 1
    assert found != {digest(EdgeModel(edge))} or "adapter" in export


def test_a_run_goes_on_on_another_device(exported_dir: Path, tmp_path: Path, reviews: str) -> None:
    given: dict[str, Any] = {"data": reviews, "lr": 1e-3, **TASK}
    for run, first in (("here", "cpu"), ("there", "cuda")):
        edgezo.tune(exported_dir, tmp_path / run, steps=3, device=first, **given)
        edgezo.tune(exported_dir, tmp_path / run, steps=6, resume=True)
    models = [EdgeModel(exported_dir, run=tmp_path / run, step="last") for run in ("here", "there")]
    assert digest(models[0]) == digest(models[1])


def test_the_base_comes_back_to_the_device(exported_dir: Path, tmp_path: Path, reviews: str) -> None:
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=3, lr=1e-3, device="cuda", **TASK)
    model = EdgeModel(exported_dir, run=tmp_path / "run", step="last", device="cuda")
    tuned = digest(model)
    model.use()
    assert tuned != digest(model) == digest(EdgeModel(exported_dir))


def test_texts_and_labels_come_from_the_device_too(invoke: Command, exported_dir: Path) -> None:
    model, here = (EdgeModel(exported_dir, threads=1, device=device) for device in ("cuda", "cpu"))
    assert model.generate("the film", 12) == here.generate("the film", 12)
    assert model.log_probs(["the film"], [" is great"]) == here.log_probs(["the film"], [" is great"])
    options = ["--template", "{text} It was", "--labels", "terrible,great", "--text", "a great film", "--json"]
    there = invoke("predict", str(exported_dir), "--device", "cuda", *options)
    assert there.code == 0
    assert there.out == invoke("predict", str(exported_dir), *options).out


def test_a_tensor_that_nothing_reads_is_named(exported_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EdgeModel(exported_dir, threads=1, device="cuda")
    assert model.on_device is not None
    weights = MutableWeights(model.on_device, eps=1e-3)
    prove_live(model, weights)
    monkeypatch.setattr(DevicePasses, "add", lambda *arguments: None)
    with pytest.raises(DeadTensorError, match="the engine does not see what is written to the device"):
        prove_live(model, weights)


# refusals


def test_an_engine_without_cuda_says_so(invoke: Command, exported_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device_module.DEVICES, "cuda", CUDA)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    code, out, err = invoke("generate", str(exported_dir), "--device", "cuda", "--prompt", "the")
    assert (code, out) == (1, "")
    assert err == (
        f"error: --device cuda: this onnxruntime {onnxruntime.__version__} has no CUDAExecutionProvider (it has CPUExecutionProvider);"
        " install onnxruntime-gpu as the README says (on a Jetson: docs/jetson.md), or leave --device out\n"
    )


def test_a_device_that_nobody_knows_is_refused(exported_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--device gpu: no such device; the devices are cpu, cuda$"):
        EdgeModel(exported_dir, device="gpu")


def test_a_provider_that_does_not_start_is_no_silent_cpu(exported_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime falls back to the CPU with a warning when CUDA's libraries are missing."""
    monkeypatch.setitem(device_module.DEVICES, "cuda", Device("cpu", "CUDAExecutionProvider", {}))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(ConfigError, match="CUDAExecutionProvider does not start here"),
    ):
        EdgeModel(exported_dir, device="cuda")


def test_no_memory_on_the_device_is_one_line(exported_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", full)
    with pytest.raises(EdgeModelError) as caught:
        EdgeModel(exported_dir, device="cuda")
    assert "no memory for" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_memory_is_not_measured_on_a_device(exported_dir: Path, tmp_path: Path, reviews: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^--memory: what a process takes on cpu is not measured; leave it out and lower --batch and --max-length$"
    ):
        edgezo.tune(exported_dir, tmp_path / "run", data=reviews, memory="2GB", device="cuda", **TASK)
    assert not (tmp_path / "run").exists()


def test_an_old_engine_cannot_mix_tunable_and_frozen_weights_on_a_device(
    export_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_session, "engine_version", lambda: (1, 20))
    model = EdgeModel(export_tiny("llama", tunable="norms"), device="cuda")
    with pytest.raises(EdgeModelError, match=r"some weights are tunable and others frozen; on cpu that needs onnxruntime 1.21 or later"):
        model.scoring  # noqa: B018  made at first use
