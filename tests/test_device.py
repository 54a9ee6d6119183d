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
from reference import edge_log_probs, make_pairs, randomise, write_adapter

import edgezo
from edgezo.config import make_config
from edgezo.errors import ConfigError, DeadTensorError, EdgeModelError, NonFiniteLossError
from edgezo.export.kernels import KERNELS, make_kernel
from edgezo.runtime import device as device_module
from edgezo.runtime import device_passes, device_session, noise
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.device import CUDA, Device
from edgezo.runtime.device_passes import DevicePasses
from edgezo.runtime.device_session import DeviceSession
from edgezo.runtime.head_rows import HeadRows
from edgezo.runtime.liveness import prove_live
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import BLOCK, Direction, Distribution
from edgezo.runtime.objective import Objective
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.tasks import Task
from edgezo.runtime.theta import Theta, mutable_weights, step_directions
from edgezo.runtime.tuned import write_tuned
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
        ({"adapter": "lora"}, {"tune_a": True}),
        ({"adapter": "lora", "weights": "fp16"}, {}),
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


# an adapter


def lora_models(directory: Path) -> tuple[EdgeModel, EdgeModel]:
    return EdgeModel(directory, threads=1), EdgeModel(directory, threads=1, device="cuda")


def assert_equal_scores(here: EdgeModel, there: EdgeModel, seen: list[bytes]) -> None:
    """Scores and a text of both graphs; they are others than all `seen` before."""
    scores = edge_log_probs(there, make_pairs())
    assert scores.tobytes() == edge_log_probs(here, make_pairs()).tobytes()
    assert scores.tobytes() not in seen
    seen.append(scores.tobytes())
    assert there.generate("the film", 6) == here.generate("the film", 6)


@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_no_change_of_an_adapter_is_missed_on_the_device(
    export_tiny: Callable[..., Path], tmp_path: Path, reviews: str, weights: str
) -> None:
    """Whoever writes it: in place, one element, one bit, another of another rank, rows of the head, a file, a run, its averages, the base."""
    directory = export_tiny("llama", adapter="lora", weights=weights)
    here, there = lora_models(directory)
    models, seen = (here, there), list[bytes]()
    assert_equal_scores(here, there, seen)
    for seed, rank in ((1, 3), (2, 3), (3, 5)):
        for model in models:
            randomise(model, seed, rank)
        assert_equal_scores(here, there, seen)
    for name, place in (("b", 7), ("a", 1), ("b", -1)):
        for model in models:
            getattr(model.adapter, name)[place] += 4
        assert_equal_scores(here, there, seen)
    peft = write_adapter(here, tmp_path / "peft")
    for model in models:
        model.head = HeadRows(np.array([5, 9]), np.ones((32, 2), np.float32))
    assert_equal_scores(here, there, seen)
    for model in models:
        model.use()
    assert edge_log_probs(there, make_pairs()).tobytes() == seen[0]
    runs = [tmp_path / "first", tmp_path / "second"]
    for number, run in enumerate(runs):
        edgezo.tune(directory, run, data=reviews, steps=3, lr=0.1, seed=number, device="cuda", **TASK)
        for step in (1, 3):
            for model in models:
                model.use(run=run, step=step)
            assert_equal_scores(here, there, seen)
    write_tuned(directory, runs, [0.5, 0.5], "last", tmp_path / "mean", "peft")
    for model in models:
        model.use(adapter=tmp_path / "mean")
    assert_equal_scores(here, there, seen)
    for model in models:
        model.use(adapter=peft)
    assert np.array_equal(edge_log_probs(there, make_pairs()), edge_log_probs(here, make_pairs()))
    assert there.adapter is not None
    there.adapter.b[0] = -there.adapter.b[0]  # type: ignore[union-attr]
    here.adapter.b[0] = -here.adapter.b[0]  # type: ignore[union-attr]
    assert_equal_scores(here, there, seen)


def test_a_prefix_is_followed_too(prefix_dir: Path) -> None:
    here, there = lora_models(prefix_dir)
    seen = list[bytes]()
    for seed in range(3):
        for model in (here, there):
            if seed:
                randomise(model, seed)
        assert_equal_scores(here, there, seen)


@pytest.mark.parametrize("tune_a", [False, True])
def test_what_a_step_of_lora_sends(lora_dir: Path, reviews: str, tune_a: bool) -> None:
    """A and B once, then B after each update, and A where it is tuned; in forwards between two updates neither."""
    model = EdgeModel(lora_dir, threads=1, device="cuda")
    config = make_config(
        None, {"data": reviews, "directions": 4, "batch": 1, "lr": 1e-2, "eps": 1e-2, "rule": "normalized", "tune_a": tune_a, **TASK}
    )
    dataset = read_dataset(model, config)
    theta = Theta(model, config, mutable_weights(model, config), Objective(Sequences(model), Task("classification"), config))
    rows, session = dataset.batch(dataset.order(), 0), model.scoring
    assert isinstance(session, DeviceSession)
    assert isinstance(model.adapter, Lora)

    def sent(step: int) -> int:
        """Bytes of a step's forward."""
        before = session.sent_bytes
        theta.estimates(step_directions(config, step), theta.groups(rows))
        return session.sent_bytes - before

    def update(step: int) -> None:
        theta.step(step_directions(config, step), [1.0] * 4, 1e-2)
        theta.weights.flush()

    a, b = model.adapter.a.nbytes, model.adapter.b.nbytes
    first, same = sent(0), sent(0)
    assert first - same == a + b
    signs = 4 * (sum(target.out_features for target in model.adapter.targets) + 2 * 4 * 8 * 14)
    signs += 4 * (sum(target.in_features for target in model.adapter.targets) + 2 * 4 * 8 * 14) if tune_a else 0
    assert signs < same < signs + 8 * 8 * 3 * 64, "and the tokens"
    for step in (1, 2):
        update(step)
        assert sent(0) - same == (a + b if tune_a else b)
        assert sent(0) == same


# going on


@pytest.mark.parametrize("export", [{}, {"adapter": "lora"}])
def test_a_run_goes_on_on_another_device(export_tiny: Callable[..., Path], tmp_path: Path, reviews: str, export: dict[str, Any]) -> None:
    exported_dir = export_tiny("llama", **export)
    given: dict[str, Any] = {"data": reviews, "lr": 1e-3, **TASK}
    for run, first in (("here", "cpu"), ("there", "cuda")):
        edgezo.tune(exported_dir, tmp_path / run, steps=3, device=first, **given)
        edgezo.tune(exported_dir, tmp_path / run, steps=6, resume=True)
    models = [EdgeModel(exported_dir, run=tmp_path / run, step="last") for run in ("here", "there")]
    assert digest(models[0]) == digest(models[1])
    assert edge_log_probs(models[0], make_pairs()).tobytes() == edge_log_probs(models[1], make_pairs()).tobytes()


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
