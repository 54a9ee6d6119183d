"""The two halves share edgezo/manifest.py and nothing else, and everything that is imported is packaged."""

import ast
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import edgezo

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli
ROOT = Path(__file__).parent.parent
WORKSTATION = {"torch", "transformers", "onnx", "optimum", "accelerate", "gguf"}


def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    return table


def sub_packages() -> dict[str, Path]:
    """Every folder with an __init__.py under the places that pyproject.toml names, by its name as imported."""
    homes = sorted(setuptools_table()["package-dir"].items(), key=lambda item: len(item[1]))
    found = {}
    for name, place in homes:
        for folder, _, files in os.walk(ROOT / place):
            if "__init__.py" in files:
                found[".".join([name, *Path(folder).relative_to(ROOT / place).parts])] = Path(folder)
    return found


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def run_python(code: str, *arguments: str) -> str:
    """Standard output of a fresh interpreter, started outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(arguments[0]).parent if arguments else tempfile.gettempdir(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_sub_package_is_packaged() -> None:
    found = sub_packages()
    assert {"edgezo", "edgezo.export", "edgezo.runtime", "edgezo.demo_data"} <= found.keys()
    assert sorted(found) == sorted(setuptools_table()["packages"])


def test_every_packaged_folder_is_reached_by_the_checkout_too() -> None:
    for name, folder in sub_packages().items():
        assert ROOT.joinpath(*name.split(".")).resolve() == folder.resolve()


@pytest.mark.parametrize(
    ("package", "folder"),
    [("edgezo.demo_data", "examples/notes"), ("edgezo.runtime.kernels", "runtime/kernels"), ("edgezo.recipes", "edgezo/recipes")],
)
def test_every_data_file_is_packaged(package: str, folder: str) -> None:
    patterns = setuptools_table()["package-data"][package]
    for path in (ROOT / folder).iterdir():
        if path.is_file() and path.suffix != ".py":
            assert any(path.match(pattern) for pattern in patterns), path.name


@pytest.mark.parametrize(("half", "other"), [("export", "edgezo.runtime"), ("runtime", "edgezo.export")])
def test_neither_half_imports_the_other(half: str, other: str) -> None:
    files = sorted((ROOT / half).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not [name for name in imported(path) if f"{name}.".startswith(f"{other}.")], path.name
        assert other not in path.read_text(encoding="utf-8"), f"{path.name} names {other}"


def test_the_shared_contract_imports_neither_half() -> None:
    for name in ("manifest.py", "storage.py", "errors.py", "adapters.py", "quantization.py", "config.py"):
        found = imported(ROOT / "edgezo" / name)
        assert found or name == "errors.py"
        assert not [name for name in found if name.startswith(("edgezo.runtime", "edgezo.export"))]


def test_the_device_half_imports_nothing_of_the_workstation() -> None:
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        assert not {name.split(".")[0] for name in imported(path)} & WORKSTATION, path.name


def test_a_whole_run_loads_nothing_of_the_workstation(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    code = """
import json, sys
import edgezo.runtime.tune
at_import = sorted({name.split('.')[0] for name in sys.modules})
import edgezo
directory, data, run = sys.argv[1:]
result = edgezo.tune(directory, run, data=data, valid=data, template='{text} It was', labels='terrible,great', steps=3, batch=4, eval_every=2)
edgezo.evaluate(directory, data, run=run)
edgezo.EdgeModel(directory, run=run).generate('the film', 2)
print(json.dumps([at_import, sorted({name.split('.')[0] for name in sys.modules}), result.steps]))
"""
    at_import, at_end, steps = json.loads(run_python(code, str(exported_dir), reviews, str(tmp_path / "run")))
    assert steps == 3
    assert {"numpy", "onnxruntime", "edgezo"} <= set(at_import)
    assert not (set(at_import) | set(at_end)) & WORKSTATION


def test_help_loads_neither_half() -> None:
    code = """
import sys
import tempfile
sys.argv = ["edgezo", "tune", "--help"]
import edgezo.cli
try:
    edgezo.cli.main()
except SystemExit:
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "edgezo.export", "edgezo.runtime")
    print([name for name in heavy if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", edgezo.__all__)
def test_a_public_name_is_importable(name: str) -> None:
    assert getattr(edgezo, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'edgezo' has no attribute 'tunes'"):
        edgezo.tunes  # noqa: B018


def test_the_version_is_the_packages() -> None:
    assert edgezo.__version__ == importlib.metadata.version("edgezo")


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "edgezo" / "py.typed").is_file()
    assert "py.typed" in setuptools_table()["package-data"]["edgezo"]


@pytest.mark.parametrize("text", ["a\nb", "a\x00\x1cb\u2028c", "a \ud800", "\x1b[31mred"])
def test_a_message_is_one_printable_line(text: str) -> None:
    shown = str(edgezo.EdgezoError(f"{text}: wrong"))
    assert shown.isprintable()
    assert shown.endswith(": wrong")


def test_the_engine_tells_nobody(exported_dir: Path, tmp_path: Path) -> None:
    """onnxruntime 1.29 and later queue what they send in the home folder."""
    told = {name: value for name, value in os.environ.items() if name not in {"CI", "XDG_CACHE_HOME"} and not name.startswith("ORT_")}
    use = "import sys, edgezo; edgezo.EdgeModel(sys.argv[1], threads=1).log_probs(['a'], [' b'])"
    subprocess.run([sys.executable, "-c", use, exported_dir], env={**told, "HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.rglob("*"))
