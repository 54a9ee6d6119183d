"""Frozen weights in half precision: what is stored so, what is multiplied so, and what does not fit."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from conftest import ExportTiny
from exports import refusal
from reference import randomise
from rounded import HALF, POSITIONS, stored

from edgezo.errors import ExportError, NonFiniteLossError
from edgezo.export import export_model
from edgezo.export import verify as verify_module
from edgezo.manifest_reader import read_manifest
from edgezo.runtime import device
from edgezo.runtime.device import Device
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel

# edge models


@pytest.mark.parametrize("name", [name for name, _ in HALF])
def test_linear_weights_and_the_token_embedding_are_stored_as_float16(export_tiny: ExportTiny, name: str) -> None:
    """What the source rounds to; all else as it was, and half the bytes."""
    directory = export_tiny(name, adapter="lora", weights="fp16")
    manifest = read_manifest(directory)
    assert manifest.weights == "fp16"
    for parameter, values in tiny.make_model(name).named_parameters():
        (tensor,) = [tensor for tensor in manifest.tensors if tensor.name == parameter]
        found = stored(directory, manifest, parameter)
        expected = values.detach().numpy().T if tensor.transposed else values.detach().numpy()
        half = expected.ndim == 2 and parameter not in POSITIONS
        assert tensor.dtype == ("float16" if half else "float32"), parameter
        assert tensor.quantized is None
        assert np.array_equal(found, expected.astype(np.float16) if half else expected), parameter
    whole = read_manifest(export_tiny(name, adapter="lora"))
    matrices = sum(tensor.size for tensor in manifest.tensors if tensor.dtype == "float16")
    assert sum(tensor.nbytes for tensor in whole.tensors) - sum(tensor.nbytes for tensor in manifest.tensors) == 2 * matrices


@pytest.mark.parametrize("name", [name for name, _ in HALF])
def test_products_alone_are_in_half_precision(export_tiny: ExportTiny, name: str) -> None:
    """float16 is made of what they read, once for all that read the same, and their results are float32 again."""
    directory = export_tiny(name, adapter="lora", weights="fp16")
    half = {tensor.name for tensor in read_manifest(directory).tensors if tensor.dtype == "float16"}
    for file in ("scoring.onnx", "generation.onnx"):
        nodes = list(onnx.load(directory / file, load_external_data=False).graph.node)
        casts = {node.output[0]: node for node in nodes if node.op_type == "Cast"}
        to = {output: next(item.i for item in node.attribute if item.name == "to") for output, node in casts.items()}
        narrowed = {output for output in casts if to[output] == onnx.TensorProto.FLOAT16}
        assert len({casts[output].input[0] for output in narrowed}) == len(narrowed) == 1 + 2 * 4
        turned = {node.output[0] for node in nodes if node.op_type == "Transpose" and node.input[0] in half}
        users = [node for node in nodes if (half & set(node.input) and node.op_type != "Transpose") or turned & set(node.input)]
        assert {node.op_type for node in users} <= {"MatMul", "Gemm", "Gather"}
        products = [node for node in users if node.op_type != "Gather"]
        assert len(products) == (9 if name == "gpt2" else 15)
        for node in products:
            assert node.input[0] in narrowed
            assert len(node.input) == 2
        for node in nodes:
            if narrowed & set(node.input):
                assert node in products
            if {user.output[0] for user in users} & set(node.input):
                assert to[node.output[0]] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("name", [name for name, _ in HALF])
def test_the_check_sees_products_rounded_to_half(export_tiny: ExportTiny, name: str) -> None:
    """The CPU provider alone would multiply in float32."""
    directory = export_tiny(name, adapter="lora", weights="fp16")
    checked = read_manifest(directory).verification
    assert checked is not None
    assert checked.largest_log_prob_difference < 1e-4
    assert checked.half_log_prob_difference is not None
    assert 1e-3 < checked.half_log_prob_difference < 5e-2
    assert not (directory / "rounded.onnx").exists()
    other = read_manifest(export_tiny(name, adapter="lora", weights="int8")).verification
    assert other is not None
    assert other.half_log_prob_difference is None


# refusals


def scaled(folder: Path, factors: dict[str, float]) -> Path:
    """The tiny Llama with some weights larger."""
    network = tiny.make_model("llama")
    with torch.no_grad():
        for name, factor in factors.items():
            network.get_parameter(f"model.layers.0.mlp.{name}.weight").mul_(factor)
    network.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def test_a_weight_beyond_half_precision_is_named(tmp_path: Path) -> None:
    source = scaled(tmp_path / "source", {"up_proj": 1e6})
    largest = tiny.make_model("llama").get_parameter("model.layers.0.mlp.up_proj.weight").mul(1e6).abs().max()
    assert refusal(source, tmp_path / "edge", ExportError, adapter="lora", weights="fp16") == (
        f"model.layers.0.mlp.up_proj.weight: holds {largest:.6g}, fp16 ends at 65504; export with --weights int8, or leave --weights out"
    )


def test_activations_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    """They are within float32, which the CPU computes in: the same source is exported with other weights."""
    source = scaled(tmp_path / "source", {"up_proj": 300, "gate_proj": 300})
    assert refusal(source, tmp_path / "edge", ExportError, adapter="lora", weights="fp16") == (
        "source: in half precision its log-probabilities are not finite, activations exceed 65504; export with --weights int8, or leave --weights out"
    )
    assert export_model(str(source), tmp_path / "int8", adapter="lora", weights="int8").verification.largest_log_prob_difference < 2e-3


def test_scores_that_are_not_finite_are_laid_at_half_precision_on_a_device(
    export_tiny: ExportTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts may have larger activations than those of the check; the CPU multiplies in float32."""
    monkeypatch.setitem(device.DEVICES, "cuda", Device("cpu", "CPUExecutionProvider", {}))
    half = "export the model without --weights fp16, in which activations end at 65504"
    for weights, where, remedy in (
        ("fp16", "cuda", half),
        ("fp16", "cpu", "export the model again"),
        ("int8", "cuda", "export the model again"),
    ):
        model = EdgeModel(export_tiny("llama", adapter="lora", weights=weights), threads=1, device=where)
        lora = randomise(model)
        assert isinstance(lora, Lora)
        lora.b[...] = 3e38
        with pytest.raises(NonFiniteLossError) as caught:
            model.generate("the film", 1)
        assert str(caught.value) == f"the model's logits are NaN or infinite; {remedy}, or tune with a smaller --lr"


def test_a_model_that_half_precision_changes_is_refused(source_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "HALF_TOLERANCE", 1e-5)
    message = refusal(source_dir, tmp_path / "edge", ExportError, adapter="lora", weights="fp16")
    assert re.fullmatch(
        rf"{source_dir.name}: in half precision log-probabilities differ from the source by up to \d\.\d\de-\d\d, allowed are 1e-05;"
        " export with --weights int8, or leave --weights out",
        message,
    )
