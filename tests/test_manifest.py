"""A manifest is read in every version and back as written; one that was damaged or made up is refused in one line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import Raw, edit, refusal

from edgezo.manifest import MANIFEST_BYTES_LIMIT, Manifest
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.model import EdgeModel
from edgezo.storage import is_plain_name


def test_the_undamaged_model_is_accepted(edge_dir: Path) -> None:
    model = EdgeModel(edge_dir, threads=1)
    assert len(model.weights) == 20
    assert model.manifest.version == 8


def test_a_manifest_of_version_1_is_read(edge_dir: Path) -> None:
    """As edgezo 0.1.0 wrote it: without config.json and without the fields that came with version 2."""
    expected = EdgeModel(edge_dir, threads=1).log_probs(["the film"], [" is great"])

    def older(raw: Raw) -> None:
        raw["version"] = 1
        for holder, *names in (
            (raw, "weights", "adapter", "config", "classes", "new_weights", "pooling"),
            (raw["tokenizer"], "mask_token_id"),
            (raw["origin"], "weights_sha256"),
            (raw["verification"], "quantization_loss_change"),
            (raw["files"], "config.json"),
            *((tensor, "quantized") for tensor in raw["tensors"]),
        ):
            for name in names:
                del holder[name]

    edit(edge_dir, older)
    (edge_dir / "config.json").unlink()
    model = EdgeModel(edge_dir, threads=1)
    assert (model.manifest.version, model.manifest.weights, model.manifest.adapter, model.adapter) == (1, "fp32", None, None)
    assert model.log_probs(["the film"], [" is great"]) == expected


def test_a_manifest_of_version_2_is_read(edge_dir: Path) -> None:
    """Without the fields that came with versions 3 and 4."""
    expected = EdgeModel(edge_dir, threads=1).log_probs(["the film"], [" is great"])

    def older(raw: Raw) -> None:
        raw["version"] = 2
        del raw["classes"], raw["new_weights"], raw["pooling"], raw["tokenizer"]["mask_token_id"]

    edit(edge_dir, older)
    model = EdgeModel(edge_dir, threads=1)
    assert (model.manifest.version, model.manifest.origin.family, model.manifest.classes) == (2, "causal", [])
    assert model.log_probs(["the film"], [" is great"]) == expected


def test_a_manifest_of_version_5_is_read(edge_dir: Path) -> None:
    """Without the field that came with version 6."""
    expected = EdgeModel(edge_dir, threads=1).log_probs(["the film"], [" is great"])

    def older(raw: Raw) -> None:
        raw["version"] = 5
        del raw["verification"]["half_log_prob_difference"]

    edit(edge_dir, older)
    model = EdgeModel(edge_dir, threads=1)
    assert model.manifest.version == 5
    assert model.log_probs(["the film"], [" is great"]) == expected


def test_a_manifest_is_read_back_as_it_was_written(edge_dir: Path, tmp_path: Path) -> None:
    manifest = read_manifest(edge_dir)
    manifest.write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == (edge_dir / "manifest.json").read_bytes()
    assert read_manifest(tmp_path) == manifest


def test_the_manifest_is_immutable(exported_dir: Path) -> None:
    manifest: Manifest = read_manifest(exported_dir)
    with pytest.raises(ValueError, match="frozen"):
        manifest.edgezo = "other"


# the directory and the file


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "edge")
    assert message == f": no such directory; make an edge model with: edgezo export MODEL -o {tmp_path / 'edge'}"


def test_a_directory_without_a_manifest_is_refused(edge_dir: Path) -> None:
    (edge_dir / "manifest.json").unlink()
    assert refusal(edge_dir) == ": no manifest.json in it; an edge model is made by: edgezo export MODEL -o DIR"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"not json", b"\xff\xfe{}", b"[" * 100_000, b'{"format": "edgezo-edge-model",}', b"{}{}"],
    ids=["empty", "cut", "text", "not utf-8", "nested without end", "trailing comma", "two values"],
)
def test_a_manifest_that_is_not_json_is_refused(edge_dir: Path, data: bytes) -> None:
    (edge_dir / "manifest.json").write_bytes(data)
    message = refusal(edge_dir)
    assert message.startswith("/manifest.json: not readable as JSON (")
    assert message.endswith("); export the model again")


@pytest.mark.parametrize("data", ["null", "[]", "1", '"edgezo-edge-model"', "{}", '{"format": "other", "version": 1}', '{"format": null}'])
def test_json_of_another_format_is_refused(edge_dir: Path, data: str) -> None:
    (edge_dir / "manifest.json").write_text(data)
    assert refusal(edge_dir) == "/manifest.json: not an edge model manifest (format is not 'edgezo-edge-model')"


@pytest.mark.parametrize("version", [0, 9, 99, "1", None, [1]])
def test_an_unknown_version_is_refused_by_number(edge_dir: Path, version: object) -> None:
    edit(edge_dir, lambda raw: raw.update(version=version))
    assert (
        refusal(edge_dir)
        == f"/manifest.json: manifest version {version!r}, this edgezo reads 1, 2, 3, 4, 5, 6, 7 and 8; export again or update edgezo"
    )


def test_a_huge_manifest_is_refused_before_it_is_read(edge_dir: Path) -> None:
    os.truncate(edge_dir / "manifest.json", MANIFEST_BYTES_LIMIT + 1)
    assert refusal(edge_dir) == f"/manifest.json: larger than {MANIFEST_BYTES_LIMIT} bytes; this is no edge model manifest"


# fields


@pytest.mark.parametrize("where", ["", "origin", "tokenizer", "scoring", "verification", "tensors.3", "generation.past.1"])
def test_an_unknown_field_is_refused_by_its_place(edge_dir: Path, where: str) -> None:
    def add(raw: Any) -> None:
        for part in where.split(".") if where else []:
            raw = raw[int(part) if part.isdigit() else part]
        raw["surprise"] = 1

    edit(edge_dir, add)
    place = f"{where}.surprise" if where else "surprise"
    assert refusal(edge_dir) == f"/manifest.json: {place}: Extra inputs are not permitted; export the model again"


def test_an_unknown_field_with_a_line_break_is_refused_in_one_line(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw.update({"sur\nprise": 1}))
    assert refusal(edge_dir).endswith(": Extra inputs are not permitted; export the model again")


@pytest.mark.parametrize("field", ["edgezo", "origin", "tokenizer", "scoring", "tensors", "files"])
def test_a_missing_field_is_refused_by_name(edge_dir: Path, field: str) -> None:
    edit(edge_dir, lambda raw: raw.pop(field))
    assert refusal(edge_dir) == f"/manifest.json: {field}: Field required; export the model again"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: raw["tensors"][2].update(offset="0"), "tensors.2.offset: Input should be a valid integer"),
        (lambda raw: raw["tensors"][2].update(offset=-4096), "tensors.2.offset: Input should be greater than or equal to 0"),
        (lambda raw: raw["tensors"][2].update(shape=[32.5, 32]), "tensors.2.shape.0: Input should be a valid integer"),
        (lambda raw: raw["tensors"][2].update(tunable=1), "tensors.2.tunable: Input should be a valid boolean"),
        (
            lambda raw: raw["tensors"][2].update(dtype="bfloat16"),
            "tensors.2.dtype: Input should be 'float32', 'float16', 'int64', 'bool' or 'uint8'",
        ),
        (lambda raw: raw["tensors"][2].update(name=""), "tensors.2.name: String should have at least 1 character"),
        (lambda raw: raw["origin"].update(vocab_size=0), "origin.vocab_size: Input should be greater than 0"),
        (lambda raw: raw["origin"].update(context_length=-1), "origin.context_length: Input should be greater than 0"),
        (lambda raw: raw["origin"].update(family="other"), "origin.family: Input should be 'causal', 'masked' or 'classifier'"),
        (lambda raw: raw["origin"].update(family="masked"), "it is masked, with a generation graph; export the model again"),
        (lambda raw: raw.pop("generation"), "it is causal, without a generation graph; export the model again"),
        (lambda raw: raw["tokenizer"].update(mask_token_id=3), "it is causal, with a mask token; export the model again"),
        (lambda raw: raw["tokenizer"].update(mask_token_id=320), "mask_token_id 320 is outside the vocabulary of 320"),
        (lambda raw: raw.update(classes=["a", "b"]), "it is causal, with classes; export the model again"),
        (lambda raw: raw["files"]["tunable.bin"].update(bytes=-1), "files.tunable.bin.bytes: Input should be greater than or equal to 0"),
        (lambda raw: raw["files"]["tunable.bin"].update(sha256="0"), "files.tunable.bin.sha256: String should match pattern"),
        (lambda raw: raw.update(tensors={}), "tensors: Input should be a valid array"),
    ],
)
def test_a_wrong_type_or_value_is_refused_by_its_place(edge_dir: Path, change: Callable[[Raw], object], problem: str) -> None:
    edit(edge_dir, change)
    assert refusal(edge_dir).startswith(f"/manifest.json: {problem}")


OUTSIDE = ["../x", "/etc/passwd", "..\\x", "a/b", "..", ".", "C:x", "x\0", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_listed_file_outside_the_directory_is_refused(edge_dir: Path, name: str) -> None:
    edit(edge_dir, lambda raw: raw["files"].update({name: raw["files"]["tokenizer.json"]}))
    assert refusal(edge_dir) == f"/manifest.json: file name {name!r} leaves the directory; export the model again"


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("user", ["scoring", "generation", "tokenizer", "tensor"])
def test_a_used_file_outside_the_directory_is_refused(edge_dir: Path, user: str, name: str) -> None:
    edit(edge_dir, lambda raw: (raw["tensors"][0] if user == "tensor" else raw[user]).update(file=name))
    assert refusal(edge_dir) == f"/manifest.json: file name {name!r} leaves the directory; export the model again"


@pytest.mark.parametrize("field", ["chat_template", "config"])
@pytest.mark.parametrize(
    ("name", "problem"), [("../x", "file name '../x' leaves the directory"), ("other", "file 'other' is used but not listed under files")]
)
def test_a_chat_template_or_configuration_elsewhere_is_refused(edge_dir: Path, field: str, name: str, problem: str) -> None:
    edit(edge_dir, lambda raw: (raw if field == "config" else raw["tokenizer"]).update({field: name}))
    assert refusal(edge_dir) == f"/manifest.json: {problem}; export the model again"


@pytest.mark.parametrize("name", ["a b.bin", "ünï.json", "..x", "x..", "-"])
def test_a_name_that_stays_in_the_directory_is_plain(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1b[2Jb", "x" * 300], ids=["line break", "return", "escape", "300 characters"])
def test_a_file_name_that_no_export_writes_is_refused_in_one_line(edge_dir: Path, name: str) -> None:
    edit(edge_dir, lambda raw: raw["files"].update({name: raw["files"]["tokenizer.json"]}))
    message = refusal(edge_dir)
    assert message.isprintable()


@pytest.mark.parametrize("user", ["scoring", "generation", "tokenizer", "tensor"])
def test_a_used_file_that_is_not_listed_is_refused(edge_dir: Path, user: str) -> None:
    edit(edge_dir, lambda raw: (raw["tensors"][0] if user == "tensor" else raw[user]).update(file="other"))
    assert refusal(edge_dir) == "/manifest.json: file 'other' is used but not listed under files; export the model again"


# tensors


def test_two_tensors_of_one_name_are_refused(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw["tensors"].append(raw["tensors"][0]))
    assert refusal(edge_dir) == "/manifest.json: tensor 'model.embed_tokens.weight' is listed twice; export the model again"


def test_overlapping_tensors_are_refused_by_name(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw["tensors"][2].update(offset=raw["tensors"][0]["offset"] + 4096))
    message = refusal(edge_dir)
    names = "'model.embed_tokens.weight' and 'model.layers.0.self_attn.k_proj.weight'"
    assert message == f"/manifest.json: tensors {names} overlap in tunable.bin; export the model again"


def test_a_tensor_beyond_its_file_is_refused(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw["tensors"][-1].update(shape=[33]))
    assert refusal(edge_dir) == "/manifest.json: tensor 'model.norm.weight' ends after the end of tunable.bin; export the model again"


@pytest.mark.parametrize("shape", [[-32, 32], [0], [32, -1], [-(10**30)]])
def test_a_shape_that_is_not_positive_is_refused(edge_dir: Path, shape: list[int]) -> None:
    edit(edge_dir, lambda raw: raw["tensors"][0].update(shape=shape))
    assert refusal(edge_dir) == f"/manifest.json: tensor 'model.embed_tokens.weight' has shape {shape} at offset 0; export the model again"


def test_a_shape_of_more_elements_than_memory_holds_is_refused(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw["tensors"][0].update(shape=[2**40, 2**40]))
    assert "tensor 'model.embed_tokens.weight' ends after the end of tunable.bin" in refusal(edge_dir)


def test_a_tensor_that_is_not_on_a_page_is_refused(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw["tensors"][-1].update(offset=raw["tensors"][-1]["offset"] - 4))
    assert "tensor 'model.norm.weight' has shape [32] at offset" in refusal(edge_dir)


@pytest.mark.parametrize("dtype", ["float16", "int64", "bool", "uint8"])
def test_a_tunable_tensor_that_is_not_float_is_refused(edge_dir: Path, dtype: str) -> None:
    edit(edge_dir, lambda raw: raw["tensors"][0].update(dtype=dtype))
    assert refusal(edge_dir) == f"/manifest.json: tensor 'model.embed_tokens.weight' is tunable but {dtype}; export the model again"


@pytest.mark.parametrize("change", ["none listed", "all frozen"])
def test_a_model_without_tunable_tensors_is_refused(edge_dir: Path, change: str) -> None:
    def freeze(raw: Raw) -> None:
        for tensor in raw["tensors"]:
            tensor["tunable"] = False
        if change == "none listed":
            raw["tensors"] = []

    edit(edge_dir, freeze)
    assert refusal(edge_dir) == "/manifest.json: no tensor is tunable; export the model again"
