"""The files of an edge model, and facts that contradict them: damage of every kind is refused in one line."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from damage import edit, refusal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgezo import cli
from edgezo.errors import EdgeModelError, EdgezoError
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.model import EdgeModel

FILES = ["tunable.bin", "scoring.onnx", "generation.onnx", "tokenizer.json", "chat_template.jinja", "config.json"]
NO_EDGE_MODEL = "neither an edge model (manifest.json) nor a run (journal.bin) is in it"


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
            lambda path: edit(path, lambda raw: raw.update(version=9)),
            "/manifest.json: manifest version 9, this edgezo reads 1, 2, 3, 4, 5, 6, 7 and 8;",
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
