"""An edge model directory that was damaged, cut or made up is refused in one line, whatever is wrong with it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgezo import cli
from edgezo.errors import EdgeModelError, EdgezoError
from edgezo.manifest import MANIFEST_BYTES_LIMIT, Manifest
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.model import EdgeModel
from edgezo.storage import is_plain_name

Raw = dict[str, Any]
FILES = ["tunable.bin", "scoring.onnx", "generation.onnx", "tokenizer.json", "chat_template.jinja", "config.json"]
NO_EDGE_MODEL = "neither an edge model (manifest.json) nor a run (journal.bin) is in it"


def refusal(directory: Path) -> str:
    """The message with which an edge model is refused: one line that begins with the place."""
    with pytest.raises(EdgeModelError) as caught:
        EdgeModel(directory, threads=1)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert len(message.splitlines()) == 1
    return message.removeprefix(str(directory))


def edit(directory: Path, change: Callable[[Raw], object]) -> None:
    """Change manifest.json as JSON."""
    path = directory / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def flip(path: Path, position: int) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def inspect(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `edgezo inspect PATH`."""
    monkeypatch.setattr("sys.argv", ["edgezo", "inspect", str(path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr()
    return int(caught.value.code or 0), shown.out, shown.err


def test_the_undamaged_model_is_accepted(edge_dir: Path) -> None:
    model = EdgeModel(edge_dir, threads=1)
    assert len(model.weights) == 20
    assert model.manifest.version == 6


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


@pytest.mark.parametrize("version", [0, 7, 99, "1", None, [1]])
def test_an_unknown_version_is_refused_by_number(edge_dir: Path, version: object) -> None:
    edit(edge_dir, lambda raw: raw.update(version=version))
    assert (
        refusal(edge_dir)
        == f"/manifest.json: manifest version {version!r}, this edgezo reads 1, 2, 3, 4, 5 and 6; export again or update edgezo"
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


# files against the manifest


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(edge_dir: Path, name: str) -> None:
    (edge_dir / name).unlink()
    assert refusal(edge_dir) == f"/{name}: missing or not a plain file; copy or export the edge model again"


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_refused(edge_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.move(edge_dir / name, tmp_path / name)
    (edge_dir / name).symlink_to(tmp_path / name)
    assert refusal(edge_dir) == f"/{name}: missing or not a plain file; copy or export the edge model again"


@pytest.mark.parametrize("name", FILES)
def test_a_directory_in_place_of_a_file_is_refused(edge_dir: Path, name: str) -> None:
    (edge_dir / name).unlink()
    (edge_dir / name).mkdir()
    assert refusal(edge_dir) == f"/{name}: missing or not a plain file; copy or export the edge model again"


@pytest.mark.parametrize("change", [-1, 1, -4096, None], ids=["a byte short", "a byte long", "a page short", "empty"])
@pytest.mark.parametrize("name", FILES[:2])
def test_a_file_of_another_size_is_refused(edge_dir: Path, name: str, change: int | None) -> None:
    size = (edge_dir / name).stat().st_size
    found = 0 if change is None else size + change
    os.truncate(edge_dir / name, found)
    assert refusal(edge_dir) == f"/{name}: {found} bytes, manifest says {size}; copy or export the edge model again"


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_refused(edge_dir: Path, name: str, place: str) -> None:
    size = (edge_dir / name).stat().st_size
    flip(edge_dir / name, {"first": 0, "middle": size // 2, "last": size - 1}[place])
    message = refusal(edge_dir)
    assert message.startswith(f"/{name}: SHA-256 ")
    assert message.endswith("; the file was changed, copy or export it again")


def test_a_byte_between_two_tensors_counts_too(edge_dir: Path) -> None:
    tensors = {tensor.name: tensor for tensor in read_manifest(edge_dir).tensors}
    norm = tensors["model.layers.0.input_layernorm.weight"]
    flip(edge_dir / "tunable.bin", norm.offset + norm.nbytes)
    assert refusal(edge_dir).startswith("/tunable.bin: SHA-256 ")


def test_a_tokenizer_that_is_none_is_refused(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw["tokenizer"].update(file="chat_template.jinja"))
    message = refusal(edge_dir)
    assert message.startswith("/chat_template.jinja: not readable as a tokenizer (")
    assert message.endswith("); export the model again")


def test_a_chat_template_that_is_not_text_is_refused(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw["tokenizer"].update(chat_template="tunable.bin"))
    assert refusal(edge_dir).startswith("/tunable.bin: ")


# facts that contradict each other are found when the model is opened or, at the latest, when it is used


@pytest.mark.parametrize("graph", ["scoring", "generation"])
@pytest.mark.parametrize("inputs", [["input_ids", "surprise"], ["input_ids"], []], ids=["unknown", "left out", "none"])
def test_graph_inputs_that_are_not_the_graphs_own_are_refused(edge_dir: Path, graph: str, inputs: list[str]) -> None:
    edit(edge_dir, lambda raw: raw[graph].update(inputs=inputs))
    with pytest.raises(EdgezoError):
        use(EdgeModel(edge_dir, threads=1), graph)


@pytest.mark.parametrize(("field", "value"), [("pad_token_id", 320), ("bos_token_id", 320), ("eos_token_ids", [1, 320])])
def test_a_special_token_outside_the_vocabulary_is_refused(edge_dir: Path, field: str, value: Any) -> None:
    edit(edge_dir, lambda raw: raw["tokenizer"].update({field: value}))
    assert refusal(edge_dir) == f"/manifest.json: {field} 320 is outside the vocabulary of 320; export the model again"


@pytest.mark.parametrize("graph", ["scoring", "generation"])
def test_a_file_that_is_no_graph_is_refused(edge_dir: Path, graph: str) -> None:
    edit(edge_dir, lambda raw: raw[graph].update(file="tokenizer.json"))
    model = EdgeModel(edge_dir, threads=1)
    with pytest.raises(EdgeModelError, match=r"tokenizer\.json: not readable as an ONNX graph") as caught:
        use(model, graph)
    assert len(str(caught.value).splitlines()) == 1


def use(model: EdgeModel, graph: str) -> None:
    """Run one of the two graphs on texts of unequal length."""
    if graph == "scoring":
        model.log_probs(["the film", "the film is great and"], [" is great", " terrible"])
    else:
        model.generate("the film", 2)


# the command line


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: shutil.rmtree(path), ": no such directory; give an edge model or a run"),
        (lambda path: (path / "manifest.json").unlink(), f": {NO_EDGE_MODEL}"),
        (lambda path: (path / "manifest.json").write_text("{"), "/manifest.json: not readable as JSON ("),
        (
            lambda path: edit(path, lambda raw: raw.update(version=7)),
            "/manifest.json: manifest version 7, this edgezo reads 1, 2, 3, 4, 5 and 6;",
        ),
        (
            lambda path: edit(path, lambda raw: raw["tokenizer"].update(file="../x")),
            "/manifest.json: file name '../x' leaves the directory;",
        ),
        (lambda path: (path / "scoring.onnx").unlink(), "/scoring.onnx: missing or not a plain file;"),
        (lambda path: os.truncate(path / "tunable.bin", 100), "/tunable.bin: 100 bytes, manifest says 139392;"),
        (lambda path: flip(path / "tunable.bin", 1000), "/tunable.bin: SHA-256 "),
        (lambda path: flip(path / "generation.onnx", 1000), "/generation.onnx: SHA-256 "),
        (lambda path: flip(path / "tokenizer.json", 1000), "/tokenizer.json: SHA-256 "),
    ],
    ids=["no directory", "no manifest", "not JSON", "version", "leaves", "missing", "truncated", "weights", "graph", "tokenizer"],
)
def test_inspect_refuses_in_one_line(
    edge_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], expected: str
) -> None:
    damage(edge_dir)
    code, out, err = inspect(edge_dir, monkeypatch, capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {edge_dir}{expected}")
    assert err.count("\n") == 1


def test_inspect_accepts_the_undamaged_model(edge_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = inspect(edge_dir, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "files intact" in out


# random damage


@pytest.fixture(scope="module")
def fuzzed(exported_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A directory whose manifest each example overwrites, and the good manifest."""
    directory = Path(shutil.copytree(exported_dir, tmp_path_factory.mktemp("fuzzed") / "edge"))
    return directory, (directory / "manifest.json").read_bytes()


def loads_or_is_refused(directory: Path) -> None:
    """Neither another exception nor a message of two lines."""
    try:
        EdgeModel(directory, threads=1)
    except EdgeModelError as error:
        assert len(str(error).splitlines()) == 1


FUZZING = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
DAMAGE = st.tuples(
    st.floats(0, 1),
    st.integers(0, 40),
    st.one_of(st.binary(max_size=8), st.sampled_from([b"-1", b"1e999", b"null", b"\\u0000", b"../", b"\\n"])),
)


@FUZZING
@given(damages=st.lists(DAMAGE, min_size=1, max_size=4))
def test_random_bytes_in_the_manifest_load_or_are_refused(fuzzed: tuple[Path, bytes], damages: list[tuple[float, int, bytes]]) -> None:
    directory, data = fuzzed
    for place, removed, inserted in damages:
        start = int(place * len(data))
        data = data[:start] + inserted + data[start + removed :]
    (directory / "manifest.json").write_bytes(data)
    loads_or_is_refused(directory)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.just([]),
    st.just({}),
    st.sampled_from(FILES),
)


@FUZZING
@given(place=st.integers(0, 10**6), value=VALUES)
@example(place=0, value="\ud800")
def test_a_random_value_in_the_manifest_loads_or_is_refused(fuzzed: tuple[Path, bytes], place: int, value: Any) -> None:
    directory, data = fuzzed
    raw = json.loads(data)
    holders = list(places(raw))
    holder, key = holders[place % len(holders)]
    holder[key] = value
    (directory / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")
    loads_or_is_refused(directory)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def test_the_manifest_is_immutable(exported_dir: Path) -> None:
    manifest: Manifest = read_manifest(exported_dir)
    with pytest.raises(ValueError, match="frozen"):
        manifest.edgezo = "other"


# what a graph refers to


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "tokenizer.json", "other/tunable.bin", ""])
@pytest.mark.parametrize("place", ["initializer", "attribute", "sub-graph"])
def test_a_graph_that_refers_to_another_file_is_refused_before_the_engine_opens_it(edge_dir: Path, location: str, place: str) -> None:
    (edge_dir.parent / "outside.bin").write_bytes(bytes(64))
    model = onnx.load(edge_dir / "scoring.onnx", load_external_data=False)
    tensor = onnx.TensorProto(name="strange", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    if place == "initializer":
        model.graph.initializer.append(tensor)
    else:
        node = onnx.helper.make_node("Constant", [], ["strange"], value=tensor)
        inner = onnx.helper.make_graph([node], "inner", [], [])
        model.graph.node.append(node if place == "attribute" else onnx.helper.make_node("If", ["c"], ["o"], then_branch=inner))
    onnx.save(model, edge_dir / "scoring.onnx")
    data = (edge_dir / "scoring.onnx").read_bytes()
    edit(edge_dir, lambda raw: raw["files"].update({"scoring.onnx": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}))
    with pytest.raises(EdgeModelError) as caught:
        use(EdgeModel(edge_dir, threads=1), "scoring")
    expected = f"{edge_dir / 'scoring.onnx'}: refers to {location!r}, which is no weight file of this edge model; copy or export it again"
    assert str(caught.value) == expected
