"""Shared fixtures: a tiny Llama, exported once a test run, and what tests of more than one file begin with."""

import io
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
from command_line import TASK, contents
from exact_starts import ROWS

from edgezo import cli
from edgezo.export import export_model
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.text import TextCodec


class Outcome(NamedTuple):
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
Chat = Callable[..., Outcome]
ExportTiny = Callable[..., Path]


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `edgezo ...` in this process."""
    monkeypatch.delenv("EDGEZO_DEBUG", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr("sys.argv", ["edgezo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tiny matrices gain nothing from more, and wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def source_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny random Llama."""
    return tiny.save(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="session")
def exported_dir(source_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its edge model; shared, never to be changed."""
    return export_model(str(source_dir), tmp_path_factory.mktemp("edge") / "llama").directory


@pytest.fixture(scope="session")
def export_tiny(exported_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportTiny:
    """Export a tiny model, once a test run for each name and settings; shared, never to be changed."""
    made = {("llama",): exported_dir}

    def export(name: str = "llama", **settings: Any) -> Path:
        key = (name, *(f"{setting}={value}" for setting, value in sorted(settings.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny")
            made[key] = export_model(str(tiny.save(folder / "source", name)), folder / name, **settings).directory
            shutil.rmtree(folder / "source")
        return made[key]

    return export


@pytest.fixture(scope="session")
def lora_dir(export_tiny: ExportTiny) -> Path:
    """The tiny Llama with branch points for LoRA; shared, never to be changed."""
    return export_tiny("llama", adapter="lora")


@pytest.fixture(scope="session")
def prefix_dir(export_tiny: ExportTiny) -> Path:
    """The tiny Llama with a prefix; shared, never to be changed."""
    return export_tiny("llama", adapter="prefix")


@pytest.fixture
def adapter_dirs(lora_dir: Path, prefix_dir: Path) -> dict[str, Path]:
    """The edge models for adapters, by kind; shared, never to be changed."""
    return {"lora": lora_dir, "prefix": prefix_dir}


@pytest.fixture
def edge_dir(exported_dir: Path, tmp_path: Path) -> Path:
    """A copy of the edge model that a test may damage."""
    return Path(shutil.copytree(exported_dir, tmp_path / "edge"))


@pytest.fixture
def model(exported_dir: Path) -> EdgeModel:
    """The edge model opened anew."""
    return EdgeModel(exported_dir, threads=1)


@pytest.fixture(scope="session")
def text(exported_dir: Path) -> TextCodec:
    """The tiny tokenizer, with its chat template."""
    return EdgeModel(exported_dir, threads=1).text


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSONL; returns the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


REVIEWS = [("a great film", 1), ("a terrible plot", 0), ("the plot is great", 1), ("the film is terrible and long", 0)] * 4


@pytest.fixture
def reviews(write_rows: Callable[..., str]) -> str:
    """A small two-label data file."""
    return write_rows([{"text": text, "label": label} for text, label in REVIEWS])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, invoke: Command, edge_dir: Path, reviews: str, tmp_path: Path) -> Command:
    """Run `edgezo ...` in a folder with the edge model `edge` and the data `rows.jsonl`."""
    assert (edge_dir, reviews) == (tmp_path / "edge", str(tmp_path / "rows.jsonl"))
    monkeypatch.chdir(tmp_path)
    return invoke


@pytest.fixture
def refusal(command: Command, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail: code 1, nothing on standard output, one line of error, no file made or changed."""

    def call(*arguments: str) -> str:
        before = contents(tmp_path)
        code, out, err = command(*arguments)
        problems = [line for line in err.splitlines() if not line.startswith("  ")]  # progress is indented
        assert (code, out, len(problems)) == (1, "", 1), err
        assert problems[0].startswith("error: ")
        assert err.endswith(problems[0] + "\n")
        assert contents(tmp_path) == before
        return problems[0].removeprefix("error: ")

    return call


@pytest.fixture
def run(command: Command) -> str:
    """A short run with validation, called `run`."""
    assert (
        command("tune", "edge", "-o", "run", *TASK, "--valid", "rows.jsonl", "--steps", "4", "--eval-every", "2", "--lr", "1e-4").code == 0
    )
    return "run"


@pytest.fixture
def rows(write_rows: Callable[..., str]) -> str:
    """Rows whose last word tells their label."""
    return write_rows(ROWS)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, invoke: Command, exported_dir: Path, tmp_path: Path) -> Chat:
    """Run `edgezo chat DIR ...` with the given lines on standard input; DIR is the shared edge model unless given."""
    monkeypatch.chdir(tmp_path)

    def call(lines: Any, *options: str, directory: str | Path = exported_dir, tokens: int = 6) -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines) if isinstance(lines, str) else lines)
        return invoke("chat", str(directory), "--threads", "1", "--max-tokens", str(tokens), *options)

    return call
