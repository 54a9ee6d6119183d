"""Sources that cannot be exported are refused in one line; an export is whole or absent."""

import shutil
from pathlib import Path

import pytest
import tiny
import transformers
from exports import refusal, write_gguf

from edgezo.errors import ExportError
from edgezo.export import export_model, verify
from edgezo.export.decoder import EXPORTED
from edgezo.runtime.model import EdgeModel

# refused sources


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name, tmp_path / "edge") == f"{tmp_path / name}: no such file or folder"


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    message = refusal(tmp_path / "model.safetensors", tmp_path / "edge")
    expected = "a file that is not .gguf; give a .gguf file, a Hugging Face folder, a folder with model.onnx, or a hub id"
    assert message == f"{tmp_path / 'model.safetensors'}: {expected}"


@pytest.mark.parametrize("content", [b"", b"nonsense" * 10, b"GGUF\x03\0\0\0" + b"\xff" * 200], ids=["empty", "no magic", "bad header"])
def test_a_corrupt_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert refusal(tmp_path / "model.gguf", tmp_path / "edge").startswith(f"{tmp_path / 'model.gguf'}: transformers cannot read it: ")


def test_a_truncated_gguf_file_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny.make_model("llama"))
    path.write_bytes(path.read_bytes()[:-5000])
    assert refusal(path, tmp_path / "edge").startswith(f"{path}: transformers cannot ")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    message = refusal(tmp_path / "folder", tmp_path / "edge")
    assert message == f"{tmp_path / 'folder'}: a folder with neither config.json nor model.onnx; it is no Hugging Face or optimum model"


def test_a_run_is_no_model_to_export(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("journal.bin", "config.json"):
        (run / name).write_bytes(b"{}")
    message = f"{run}: is a run; give the model it was tuned from, or what edgezo merge DIR {run} --format hf -o FOLDER makes"
    assert refusal(run, tmp_path / "edge") == message


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"model_type": "no-such-type"}'])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(text)
    assert refusal(tmp_path / "folder", tmp_path / "edge").startswith(f"{tmp_path / 'folder'}: transformers cannot read it: ")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, vocab_size=320)
    config.save_pretrained(tmp_path / "t5")
    message = refusal(tmp_path / "t5", tmp_path / "edge")
    assert message == f"{tmp_path / 't5'}: t5 is an encoder-decoder; edgezo exports {EXPORTED}"


@pytest.mark.parametrize("kind", ["bert", "mamba"])
def test_an_architecture_without_a_cache_of_keys_and_values_is_refused(tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 320, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.AutoConfig.for_model(kind, **sizes, is_decoder=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    tiny.make_tokenizer().save_pretrained(tmp_path / kind)
    message = refusal(tmp_path / kind, tmp_path / "edge")
    assert message == f"{kind}: not an architecture that optimum exports for text generation; edgezo exports {EXPORTED}"


def test_a_folder_without_weights_is_refused(source_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source_dir, tmp_path / "folder"))
    (folder / "model.safetensors").unlink()
    assert "transformers cannot load it: Error no file named" in refusal(folder, tmp_path / "edge")


def test_truncated_weights_are_refused(source_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source_dir, tmp_path / "folder"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(folder, tmp_path / "edge").startswith(f"{folder}: transformers cannot load it: ")


def test_a_folder_without_a_tokenizer_is_refused_by_that_name(source_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source_dir, tmp_path / "folder"))
    for path in [*folder.glob("tokenizer*"), folder / "special_tokens_map.json"]:
        path.unlink()
    message = refusal(folder, tmp_path / "edge")
    assert message.startswith(f"{folder}: ")
    assert "tokenizer" in message.removeprefix(f"{folder}")


# the output directory


def test_an_output_that_is_not_empty_is_refused_and_not_touched(source_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "mine.txt").write_text("mine")
    message = refusal(source_dir, tmp_path / "edge")
    assert message == f"{tmp_path / 'edge'}: exists already; choose another directory or remove it"
    assert {path.name: path.read_text() for path in (tmp_path / "edge").iterdir()} == {"mine.txt": "mine"}


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_an_output_that_is_no_directory_is_refused_and_not_touched(source_dir: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "edge"
    if kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    assert refusal(source_dir, output) == f"{output}: exists already; choose another directory or remove it"
    assert output.is_symlink() or output.read_text() == "mine"


def test_an_output_below_a_file_is_refused_in_one_line(source_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError) as caught:
        export_model(str(source_dir), tmp_path / "file" / "edge")
    assert str(caught.value).startswith(f"{tmp_path / 'file' / 'edge'}: cannot be written (")


def test_an_empty_directory_and_missing_parents_are_filled(source_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "a" / "b" / "edge"):
        assert export_model(str(source_dir), output).directory == output
        EdgeModel(output, threads=1)


def test_an_export_that_fails_its_check_leaves_nothing(source_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOG_PROB_TOLERANCE", -1.0)
    message = refusal(source_dir, tmp_path / "edge")
    assert message.startswith("llama: log-probabilities of the edge model differ from the source by up to ")
    assert message.endswith("this architecture cannot be exported faithfully")


@pytest.mark.parametrize("stage", ["loading", "building", "writing", "checking"])
def test_an_export_interrupted_at_any_stage_leaves_nothing(source_dir: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(text: str) -> None:
        if text.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(str(source_dir), tmp_path / "edge", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
