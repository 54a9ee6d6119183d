"""Frozen weights as integers or in half precision: rounding, layout, and scores equal to those of the source given the rounded weights."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import tiny
import torch
from conftest import ExportTiny
from exports import refusal
from optimum.exporters.onnx import main_export
from reference import edge_log_probs, make_pairs, network_log_probs, randomise
from rounded import HALF, POSITIONS, stored

import edgezo
from edgezo.errors import ConfigError, ExportError
from edgezo.export import export_model
from edgezo.export import freeze as freeze_module
from edgezo.export.freeze import quantize
from edgezo.manifest_reader import read_manifest
from edgezo.quantization import Quantized
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel

MODELS = [("llama", "int8"), ("llama", "int4"), ("llama-untied", "int8"), ("llama-untied", "int4"), ("gpt2", "int8"), ("gpt2", "int4")]


def round_trip(rows: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """The weights as they come back, and the step of each one's block."""
    packed, scales = quantize(rows, bits)
    facts = Quantized(bits=bits, block=32, shape=list(rows.shape), scales="s")  # type: ignore[arg-type]
    assert list(packed.shape) == facts.packed_shape
    assert (packed.dtype, scales.dtype) == (np.uint8, np.float32)
    assert scales.shape == packed.shape[:2]
    steps = np.repeat(np.abs(scales.astype(np.float64)), 32, axis=1)[:, : rows.shape[1]]
    return facts.dequantize(packed, scales.reshape(-1)), steps


# rounding


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [1, 31, 32, 40, 96])
@pytest.mark.parametrize("sign", ["both", "plus", "minus"])
def test_rounding_errs_by_at_most_half_a_step(bits: int, width: int, sign: str) -> None:
    """The largest value of a block may err by more where clipping it makes the others better: the block as a whole gains."""
    random = np.random.default_rng(width)
    rows = (random.standard_normal((50, width)) * random.lognormal(0, 2, (50, 1))).astype(np.float32)
    rows = {"both": rows, "plus": np.abs(rows), "minus": -np.abs(rows)}[sign]
    found, steps = round_trip(rows, bits)
    errors = np.abs(found.astype(np.float64) - rows)
    blocks = range(0, width, 32)
    peaks = np.concatenate([np.repeat(np.abs(rows[:, i : i + 32]).max(1), min(32, width - i)).reshape(50, -1) for i in blocks], axis=1)
    assert (steps <= 1.1001 * peaks / 2 ** (bits - 1)).all()
    clipped = errors > 0.5001 * steps
    assert (np.abs(rows)[clipped] > 0.85 * peaks[clipped]).all()
    if bits == 8:
        assert (errors <= 1.001 * steps).all()
    # as good as rounding to nearest in steps that reach beyond the largest value on both sides
    wide = 1.1 * peaks / 2 ** (bits - 1)
    plain = np.abs(np.rint(rows / wide) * wide - rows)
    for i in blocks:
        assert ((errors[:, i : i + 32] ** 2).sum(1) <= (plain[:, i : i + 32] ** 2).sum(1) * 1.0001 + 1e-12).all()


def test_four_bits_err_less_than_plain_rounding() -> None:
    """What the search over scales is for: the mean squared error against that of max|w| / 7."""
    rows = np.random.default_rng(0).standard_normal((400, 64)).astype(np.float32)
    found, _ = round_trip(rows, 4)
    scale = np.repeat(np.abs(rows.reshape(400, 2, 32)).max(-1) / 7, 32, axis=1)
    plain = np.rint(rows / scale) * scale
    assert ((found - rows) ** 2).mean() < 0.92 * ((plain - rows) ** 2).mean()


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_whole_levels_come_back_exactly(bits: int) -> None:
    half = 1 << (bits - 1)
    rows = np.zeros((3, 64), np.float32)
    rows[1, :32] = np.linspace(-half, half - 1, 32).round()
    rows[2, 32:] = -2 * rows[1, :32]
    found, _ = round_trip(rows, bits)
    assert np.array_equal(found, rows)


def test_rows_beyond_the_first_part_are_rounded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    whole = quantize(rows, 4)
    monkeypatch.setattr(freeze_module, "ROWS_AT_ONCE", 7)
    assert all(map(np.array_equal, quantize(rows, 4), whole))


def test_eight_bits_are_stored_as_they_are_and_four_the_first_low() -> None:
    levels = np.arange(32) % 16
    rows = (levels - 8).astype(np.float32)[None]
    packed, scales = quantize(rows, 4)
    assert scales.tolist() == [[1.0]]
    assert packed[0, 0].tolist() == [levels[place] + 16 * levels[place + 1] for place in range(0, 32, 2)]
    wide = np.linspace(-128, 127, 32).round().astype(np.float32)[None]
    packed, scales = quantize(wide, 8)
    assert scales.tolist() == [[1.0]]
    assert packed[0, 0].tolist() == (wide[0] + 128).tolist()
    by_hand = np.array([[[0x2F, 0x81]]], np.uint8)
    facts = Quantized(bits=4, block=4, shape=[1, 3], scales="s")
    assert facts.dequantize(by_hand, np.array([0.5], np.float32)).tolist() == [[3.5, -3.0, -3.5]]


# edge models


def rounded_weights(directory: Path) -> dict[str, npt.NDArray[Any]]:
    """Every weight of the source as the edge model holds it, in the source's layout, unpacked by hand."""
    manifest = read_manifest(directory)
    scales = {tensor.quantized.scales for tensor in manifest.tensors if tensor.quantized}
    found = {}
    for tensor in manifest.tensors:
        if tensor.name in scales or tensor.dtype not in {"float32", "float16", "uint8"}:
            continue
        weight = stored(directory, manifest, tensor.name)
        if tensor.quantized:
            facts = tensor.quantized
            levels = [weight] if facts.bits == 8 else [weight & 15, weight >> 4]
            numbers = np.stack(levels, axis=-1).reshape(facts.shape[0], -1, facts.block).astype(np.float64) - 2 ** (facts.bits - 1)
            numbers *= stored(directory, manifest, facts.scales).reshape(facts.shape[0], -1, 1)
            weight = numbers.reshape(facts.shape[0], -1)[:, : facts.shape[1]]
        found[tensor.name] = weight.T if tensor.transposed else weight
    return found


def rounded_network(name: str, directory: Path, lora: Lora | None = None) -> Any:
    """The torch model with the weights of the edge model, and an adapter merged into them."""
    network = tiny.make_model(name)
    with torch.no_grad():
        for weight, values in rounded_weights(directory).items():
            network.get_parameter(weight).copy_(torch.from_numpy(np.ascontiguousarray(values)))
        for target, a, b in zip(lora.targets, lora.matrices("lora_A"), lora.matrices("lora_B"), strict=True) if lora else []:
            module = network.get_submodule(target.module)
            change = torch.from_numpy(lora.scaling * a @ b)  # type: ignore[union-attr]
            module.weight += change.T if isinstance(module, torch.nn.Linear) else change
    return network


@pytest.mark.parametrize(("name", "weights"), MODELS)
def test_tensors_are_stored_as_blocks_of_integers_with_scales(export_tiny: ExportTiny, name: str, weights: str) -> None:
    directory = export_tiny(name, adapter="lora", weights=weights)
    manifest = read_manifest(directory)
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    parameters = dict(tiny.make_model(name).named_parameters())
    bits = {"int8": 8, "int4": 4}[weights]
    matrices = {tensor for tensor, parameter in parameters.items() if parameter.ndim == 2 and tensor not in POSITIONS}
    assert manifest.weights == weights
    assert manifest.verification is not None
    assert manifest.verification.quantization_loss_change is not None
    embedding = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    assert {tensor.name for tensor in manifest.tensors if tensor.quantized} | {embedding} == matrices
    matrices &= {tensor.name for tensor in manifest.tensors if tensor.quantized}
    assert tensors.keys() >= parameters.keys()
    assert not any(tensor.tunable for tensor in manifest.tensors)
    for matrix in matrices:
        facts = tensors[matrix].quantized
        assert facts is not None
        shape = list(parameters[matrix].shape)
        assert (facts.bits, facts.block, facts.scales) == (bits, 32, f"{matrix}.scales")
        assert facts.shape == (shape[::-1] if tensors[matrix].transposed else shape)
        blocks = -(-facts.shape[1] // 32)
        assert (tensors[matrix].dtype, tensors[matrix].shape) == ("uint8", [facts.shape[0], blocks, 4 * bits])
        assert (tensors[facts.scales].dtype, tensors[facts.scales].shape) == ("float32", [facts.shape[0] * blocks])
    for tensor, parameter in parameters.items():
        if tensor not in matrices:
            assert np.array_equal(stored(directory, manifest, tensor), parameter.detach().numpy()), tensor
    unpacked = rounded_weights(directory)
    for matrix in matrices:
        source = parameters[matrix].detach().numpy()
        error = np.sqrt(np.mean((unpacked[matrix] - source) ** 2) / np.mean(source**2))
        assert {8: 1e-4, 4: 1e-2}[bits] < error < {8: 1e-2, 4: 0.15}[bits], matrix


@pytest.mark.parametrize(("name", "weights"), MODELS)
def test_the_token_embedding_is_stored_as_integers_too(export_tiny: ExportTiny, name: str, weights: str) -> None:
    """Tied or not, whether the ids reach the lookup as they are or reshaped."""
    tensors = read_manifest(export_tiny(name, adapter="lora", weights=weights)).tensors
    (embedding,) = [tensor for tensor in tensors if tensor.name.endswith(("embed_tokens.weight", "wte.weight"))]
    assert embedding.quantized is not None


@pytest.mark.parametrize(("name", "weights"), [*MODELS, *HALF])
def test_scores_and_texts_are_those_of_the_source_with_rounded_weights(export_tiny: ExportTiny, name: str, weights: str) -> None:
    directory = export_tiny(name, adapter="lora", weights=weights)
    model = EdgeModel(directory, threads=1)
    network = rounded_network(name, directory)
    assert np.abs(edge_log_probs(model, make_pairs()) - network_log_probs(network, make_pairs())).max() < 1e-4
    assert np.abs(edge_log_probs(model, make_pairs()) - network_log_probs(tiny.make_model(name), make_pairs())).max() > 3e-4
    tokens = model.text.encode("the film")
    with torch.no_grad():
        first = int(network(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
    assert model.generate("the film", 1) == ("" if first in model.manifest.tokenizer.eos_token_ids else model.text.decode([first]))


@pytest.mark.parametrize(("name", "weights"), [("llama", "int4"), ("gpt2", "int4"), ("gpt2", "int8"), *HALF])
def test_an_adapter_beside_rounded_weights(export_tiny: ExportTiny, name: str, weights: str) -> None:
    directory = export_tiny(name, adapter="lora", weights=weights)
    model = EdgeModel(directory, threads=1)
    base = edge_log_probs(model, make_pairs())
    lora = randomise(model)
    assert isinstance(lora, Lora)
    found = edge_log_probs(model, make_pairs())
    assert np.abs(found - base).max() > 0.5
    assert np.abs(found - network_log_probs(rounded_network(name, directory, lora), make_pairs())).max() < 1e-4


@pytest.mark.parametrize("weights", ["int4", "fp16"])
def test_tuning_an_adapter_on_rounded_weights_lowers_the_loss(export_tiny: ExportTiny, reviews: str, tmp_path: Path, weights: str) -> None:
    directory = export_tiny("llama", adapter="lora", weights=weights)
    settings = {"data": reviews, "valid": reviews, "template": "{text} It was", "labels": "terrible,great", "threads": 1}
    result = edgezo.tune(directory, tmp_path / "run", steps=60, directions=8, start="none", **settings)
    assert result.before is not None
    assert result.best is not None
    assert result.best.loss < 0.8 * result.before.loss


@pytest.mark.parametrize("weights", ["int8", "fp16"])
def test_norms_are_tuned_beside_rounded_weights(source_dir: Path, reviews: str, tmp_path: Path, weights: str) -> None:
    directory = export_model(str(source_dir), tmp_path / "edge", adapter="norms", weights=weights).directory
    manifest = read_manifest(directory)
    assert (manifest.adapter, manifest.weights) == (None, weights)
    assert [tensor.kind for tensor in manifest.tunable] == ["input_layernorm", "post_attention_layernorm"] * 2 + ["norm"]
    base = edge_log_probs(EdgeModel(directory, threads=1), make_pairs())
    assert np.abs(base - network_log_probs(rounded_network("llama", directory), make_pairs())).max() < 1e-4
    frozen = (directory / "frozen.bin").read_bytes()
    edgezo.tune(
        directory,
        tmp_path / "run",
        data=reviews,
        steps=5,
        lr=1e-3,
        batch=4,
        threads=1,
        template="{text} It was",
        labels="terrible,great",
        start="none",
    )
    tuned = EdgeModel(directory, run=tmp_path / "run", threads=1)
    network = rounded_network("llama", directory)
    with torch.no_grad():
        for name, values in tuned.weights.items():
            network.get_parameter(name).copy_(torch.from_numpy(values))
    found = edge_log_probs(tuned, make_pairs())
    assert np.abs(found - base).max() > 1e-3
    assert np.abs(found - network_log_probs(network, make_pairs())).max() < 1e-4
    assert (directory / "frozen.bin").read_bytes() == frozen


@pytest.mark.parametrize(("name", "weights", "part_rows"), [("llama", "int8", 100), ("llama-untied", "int4", 33)])
def test_a_large_projection_is_used_in_parts(
    export_tiny: ExportTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, weights: str, part_rows: int
) -> None:
    """The head alone: layers keep their branch points."""
    whole = EdgeModel(export_tiny(name, adapter="lora", weights=weights), threads=1)
    monkeypatch.setattr(freeze_module, "PART_ROWS", part_rows)
    source = tiny.save(tmp_path / "source", name)
    directory = export_model(str(source), tmp_path / "edge", adapter="lora", weights=weights).directory
    manifest = read_manifest(directory)
    assert [tensor.shape for tensor in manifest.tensors] == [tensor.shape for tensor in whole.manifest.tensors]
    targets = whole.manifest.adapter.targets  # type: ignore[union-attr]
    assert manifest.files["frozen.bin"] == whole.manifest.files["frozen.bin"]
    for file in ("scoring.onnx", "generation.onnx"):
        graph = onnx.load(directory / file, load_external_data=False).graph
        products = [node for node in graph.node if node.op_type == "MatMulNBits"]
        rows = [attribute.i for node in products for attribute in node.attribute if attribute.name == "N"]
        heads = [part_rows] * (320 // part_rows) + [320 % part_rows]
        assert sorted(rows) == sorted([*heads, *(target.out_features for target in targets)])
    assert manifest.adapter == whole.manifest.adapter
    model = EdgeModel(directory, threads=1)
    assert np.abs(edge_log_probs(model, make_pairs()) - edge_log_probs(whole, make_pairs())).max() < 1e-5
    lora = randomise(model)
    whole.adapter = lora
    assert np.abs(edge_log_probs(model, make_pairs()) - edge_log_probs(whole, make_pairs())).max() < 1e-5
    assert model.generate("the film", 8) == whole.generate("the film", 8)


# refusals


@pytest.mark.parametrize("weights", ["bf16", "int8-dynamic", "", "INT8"])
def test_other_weights_are_refused_with_the_reason(tmp_path: Path, weights: str) -> None:
    assert refusal(tmp_path / "no model", tmp_path / "edge", ConfigError, weights=weights) == (
        f"--weights {weights}: fp32, fp16, int8 or int4; integers are of weights alone, "
        "since int8 activations round away the difference of losses that tuning measures"
    )


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_rounded_weights_cannot_be_tuned(tmp_path: Path, weights: str) -> None:
    assert refusal(tmp_path / "no model", tmp_path / "edge", ConfigError, weights=weights) == (
        f"--weights {weights}: rounded weights cannot be tuned; add --adapter lora, or leave --weights out"
    )


@pytest.fixture
def optimum_warnings() -> Iterator[None]:
    """The warnings that optimum's own export gives with this torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("optimum_warnings")
def test_an_optimum_folder_takes_an_adapter_and_no_rounding(source_dir: Path, exported_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "optimum"
    main_export(str(source_dir), folder, task="text-generation-with-past", opset=17, do_validation=False)
    assert refusal(folder, tmp_path / "edge", ExportError, adapter="lora", weights="int8") == (
        f"{folder}: a model.onnx cannot be rounded and checked here; give the Hugging Face folder it was made from"
    )
    shutil.rmtree(tmp_path / "edge", ignore_errors=True)
    model = EdgeModel(export_model(str(folder), tmp_path / "edge", adapter="lora").directory, threads=1)
    assert np.abs(edge_log_probs(model, make_pairs()) - edge_log_probs(EdgeModel(exported_dir, threads=1), make_pairs())).max() < 1e-5
    lora = randomise(model)
    assert isinstance(lora, Lora)
    assert len(lora.targets) == 14
    network = tiny.make_model("llama")
    with torch.no_grad():
        for target, a, b in zip(lora.targets, lora.matrices("lora_A"), lora.matrices("lora_B"), strict=True):
            network.get_submodule(target.module).weight += torch.from_numpy(lora.scaling * a @ b).T
    assert np.abs(edge_log_probs(model, make_pairs()) - network_log_probs(network, make_pairs())).max() < 1e-4
