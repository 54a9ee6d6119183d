"""Folders of optimum and files of GGUF give the names and values of the torch model they were made from."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from exports import refusal, save_changed, stored, write_gguf
from optimum.exporters.onnx import main_export

from edgezo.export import export_model
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.model import EdgeModel


def trained_norms(model: Any) -> None:
    """Norms that differ, as after training: optimum stores parameters of equal values once."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand_like(parameter) + (0.5 if "bias" not in name else -0.5))


@pytest.fixture
def optimum_warnings() -> Iterator[None]:
    """The four warnings that optimum's own export gives with this torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript-based ONNX export", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Exporting aten::index operator of advanced indexing", category=UserWarning)
        yield


def make_optimum(folder: Path, name: str = "llama", task: str = "text-generation-with-past", opset: int | None = 17) -> Path:
    """A folder as `optimum-cli export onnx` makes it."""
    source = save_changed(folder / "source", trained_norms, name)
    main_export(str(source), folder / "optimum", task=task, opset=opset, do_validation=False)
    shutil.rmtree(source)
    return folder / "optimum"


def assert_holds(directory: Path, name: str) -> None:
    """The edge model holds every parameter of the torch model under its name, as stored or transposed."""
    manifest = read_manifest(directory)
    model = tiny.make_model(name)
    with torch.no_grad():
        trained_norms(model)
    parameters = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert {tensor.name for tensor in manifest.tunable} == parameters.keys()
    for tensor in manifest.tensors:
        values = stored(directory, tensor)
        assert np.array_equal(values.T if tensor.transposed else values, parameters[tensor.name]), tensor.name


@pytest.mark.usefixtures("optimum_warnings")
@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2", "opt"])
def test_an_optimum_folder_gives_the_torch_models_names_and_values(tmp_path: Path, name: str) -> None:
    export_model(str(make_optimum(tmp_path, name)), tmp_path / "edge")
    assert_holds(tmp_path / "edge", name)


@pytest.mark.usefixtures("optimum_warnings")
@pytest.mark.parametrize("opset", [None, 14, 18], ids=["optimum's own choice", "14", "18"])
def test_an_optimum_folder_of_another_opset_is_exported(tmp_path: Path, opset: int | None) -> None:
    export_model(str(make_optimum(tmp_path, opset=opset)), tmp_path / "edge")
    assert_holds(tmp_path / "edge", "llama")


@pytest.mark.usefixtures("optimum_warnings")
@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_an_optimum_folder_keeps_its_tie(tmp_path: Path, name: str) -> None:
    manifest = export_model(str(make_optimum(tmp_path, name)), tmp_path / "edge").manifest
    tied = {tensor.name: tensor.tied_to for tensor in manifest.tensors if tensor.tied_to}
    assert tied == ({"model.embed_tokens.weight": ["lm_head.weight"]} if name == "llama" else {})


@pytest.mark.usefixtures("optimum_warnings")
def test_an_optimum_folder_with_weights_in_a_second_file_is_exported(tmp_path: Path) -> None:
    folder = make_optimum(tmp_path)
    model = onnx.load(folder / "model.onnx")
    (folder / "model.onnx").unlink()
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    export_model(str(folder), tmp_path / "edge")
    assert_holds(tmp_path / "edge", "llama")


@pytest.mark.usefixtures("optimum_warnings")
def test_an_optimum_folder_without_past_inputs_is_refused(tmp_path: Path) -> None:
    folder = make_optimum(tmp_path, task="text-generation")
    message = refusal(folder, tmp_path / "edge")
    assert message.startswith(f"{folder / 'model.onnx'}: has inputs ['attention_mask', 'input_ids', 'position_ids'")
    assert message.endswith("not those of a decoder with past_key_values; export it with optimum's task text-generation-with-past")


def test_an_onnx_file_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.onnx").write_bytes(b"")
    message = refusal(tmp_path / "folder", tmp_path / "edge")
    assert message.startswith(f"{tmp_path / 'folder'}: model.onnx needs config.json and tokenizer.json beside it")


def test_a_broken_onnx_file_is_refused(source_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source_dir, tmp_path / "folder"))
    (folder / "model.onnx").write_bytes(b"\xff" * 100)
    message = refusal(folder, tmp_path / "edge")
    assert message == f"{folder / 'model.onnx'}: not readable as ONNX (DecodeError)"


@pytest.fixture(scope="session")
def gguf_edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny.make_model("llama")
    with torch.no_grad():
        trained_norms(model)
    return export_model(str(write_gguf(folder / "tiny.gguf", model)), folder / "edge").directory


def test_a_gguf_file_gives_the_torch_models_names_values_and_tie(gguf_edge: Path) -> None:
    assert_holds(gguf_edge, "llama")
    manifest = read_manifest(gguf_edge)
    assert manifest.origin.id == "tiny.gguf"
    assert {tensor.name: tensor.tied_to for tensor in manifest.tensors if tensor.tied_to} == {
        "model.embed_tokens.weight": ["lm_head.weight"]
    }


def test_a_gguf_files_texts_get_the_tokens_it_asks_for(gguf_edge: Path) -> None:
    codec = EdgeModel(gguf_edge, threads=1).text
    expected = tiny.make_tokenizer()("the film is great")["input_ids"]
    assert codec.encode("the film is great") == expected, "tokenizer.ggml.add_bos_token is false"
    assert codec.decode(expected) == "the film is great"


def test_a_gguf_files_special_tokens_are_those_it_names(gguf_edge: Path) -> None:
    facts = read_manifest(gguf_edge).tokenizer
    assert (facts.bos_token_id, facts.eos_token_ids, facts.pad_token_id) == (0, [1], 1)
    assert facts.special_tokens["eos_token"] == "<|end|>"


def test_exporting_a_gguf_file_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_model(str(write_gguf(tmp_path / "tiny.gguf", tiny.make_model("llama"))), tmp_path / "edge")
    assert capfd.readouterr() == ("", "")
