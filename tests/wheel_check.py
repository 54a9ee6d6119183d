"""Check the package as its users get it: build, install without extras, tune, evaluate, generate. `.venv/bin/python tests/wheel_check.py`"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REVIEWS = [("a great film", 1), ("a terrible plot", 0), ("the plot is great", 1), ("the film is terrible and long", 0)] * 4
NEEDED = ["edgezo/cli.py", "edgezo/export/pipeline.py", "edgezo/runtime/tune.py", "edgezo/runtime/kernels/windows.onnx", "edgezo/py.typed"]
NEEDED += [f"edgezo/demo_data/{name}.jsonl" for name in ("train", "validation", "test")]
RECIPES = [path.name for path in (ROOT / "edgezo" / "recipes").glob("*.yaml")]
NEEDED += [f"edgezo/recipes/{name}" for name in RECIPES]
SECONDS = 900


class CheckError(Exception):
    """A check that failed."""


def main() -> None:
    """Run every check; stop with exit code 1 at the first that fails."""
    try:
        with tempfile.TemporaryDirectory(prefix="edgezo-wheel-") as folder:
            check_all(Path(folder))
    except CheckError as error:
        sys.exit(f"FAILED {error}")
    print("wheel: every check passed")


def check_all(folder: Path) -> None:
    """Build, install and use the wheel, all below `folder`."""
    run("build", [sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT], folder)
    wheel, sdist = only(folder / "dist", "*.whl"), only(folder / "dist", "*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    python = make_environment(folder / "fresh", wheel)
    run("export a tiny model here", [sys.executable, ROOT / "tests" / "tiny.py", folder / "source"], folder)
    run("export it to an edge model", [sys.executable, "-m", "edgezo", "export", folder / "source", "-o", folder / "edge"], folder)
    check_environment(python, folder)
    check_commands(python.with_name("edgezo"), folder)


def check_wheel(wheel: Path) -> None:
    """Both halves, recipes, the demo's data and the type marker are in it, and every module of the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    require(
        f"{wheel.name} holds both halves, recipes, demo data and py.typed",
        not (missing := set(NEEDED) - names),
        f"missing: {sorted(missing)}",
    )
    modules = {f"edgezo/{part}{path.name}" for place, part in PLACES.items() for path in (ROOT / place).glob("*.py")}
    require("every module of the checkout is in the wheel", not (missing := modules - names), f"missing: {sorted(missing)}")
    strangers = {name for name in names if not name.startswith(("edgezo/", "edgezo-"))}
    require("the wheel installs nothing beside edgezo", not strangers, f"found: {sorted(strangers)}")


PLACES = {"edgezo": "", "export": "export/", "runtime": "runtime/", "examples/notes": "demo_data/"}


def check_sdist(sdist: Path) -> None:
    """The source archive holds both halves as files."""
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive.getmembers() if member.isfile()}
    needed = {"export/pipeline.py", "runtime/tune.py", "examples/notes/train.jsonl", "LICENSE", "pyproject.toml"}
    require(f"{sdist.name} holds both halves and the licence", needed <= names, f"missing: {sorted(needed - names)}")


def make_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with the wheel and its own dependencies; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run("install without extras", [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel], folder)
    return python


def check_environment(python: Path, folder: Path) -> None:
    """What is imported is the installed wheel, and the workstation's packages are not there."""
    code = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'optimum') if u.find_spec(n)])"
    found = run("look for workstation packages", [python, "-c", code], folder)
    require("neither torch, transformers, onnx nor optimum is installed", found.strip() == "[]", found)
    place = run("import edgezo", [python, "-c", "import edgezo; print(edgezo.__file__)"], folder)
    require("edgezo is imported from the environment", Path(place.strip()).is_relative_to(folder / "fresh"), place)


def check_commands(edgezo: Path, folder: Path) -> None:
    """The commands a device runs."""
    rows = [json.dumps({"text": text, "label": label}) for text, label in REVIEWS]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    shown = run("edgezo --version", [edgezo, "--version"], folder).strip()
    require("it prints the version of the wheel", shown == f"edgezo {only(folder / 'dist', '*.whl').name.split('-')[1]}", shown)
    words = ["--template", "{text} It was", "--labels", "terrible,great"]
    sizes = ["--steps", "20", "--batch", "4", "--eval-every", "10"]
    run("edgezo tune", [edgezo, "tune", "edge", "--data", "rows.jsonl", "--valid", "rows.jsonl", *words, *sizes, "-o", "run"], folder)
    shown = json.loads(run("edgezo eval", [edgezo, "eval", "edge", "--data", "rows.jsonl", "--run", "run", "--json"], folder))
    require("eval gives accuracy and loss as JSON", 0 <= shown["accuracy"] <= 1 and shown["loss"] > 0 and shown["rows"] == 16, str(shown))
    generate = [edgezo, "generate", "edge", "--run", "run", "--prompt", "the film", "--max-tokens", "4", "--json"]
    shown = json.loads(run("edgezo generate", generate, folder))
    require("generate gives text as JSON", isinstance(shown["text"], str) and shown["prompt"] == "the film", str(shown))
    shown = json.loads(run("edgezo predict", [edgezo, "predict", "edge", "--run", "run", "--text", "a film", "--json"], folder))
    require("predict gives labels as JSON", shown["predictions"][0]["label"] in {"0", "1"}, str(shown))
    shown = json.loads(run("edgezo tasks", [edgezo, "tasks", "--json"], folder))
    require("tasks lists every recipe of the checkout", len(shown["tasks"]) == len(RECIPES) > 10, str(shown))
    run("edgezo replay", [edgezo, "replay", "edge", "run", "-o", "replayed"], folder)
    shown = json.loads(run("edgezo verify", [edgezo, "verify", "run", "--base", "edge", "--every", "7", "--json"], folder))
    require("verify derives every seventh step again", shown["steps_derived_again"] == 3, str(shown))
    shown = json.loads(run("edgezo inspect", [edgezo, "inspect", "edge", "--json"], folder))
    require("inspect finds 20 tunable tensors", shown["tunable_tensors"] == 20, str(shown))
    shown = json.loads(run("edgezo inspect RUN", [edgezo, "inspect", "run", "--json"], folder))
    require("inspect finds 20 steps", shown["steps"] == 20, str(shown))
    check_missing_extra(edgezo, folder)


def check_missing_extra(edgezo: Path, folder: Path) -> None:
    """Exporting without the extra is one line that says how to get it."""
    done = subprocess.run(
        [edgezo, "export", "x", "-o", "y"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    lines = done.stderr.splitlines()
    right = done.returncode == 1 and not done.stdout and len(lines) == 1 and lines[0].startswith("error: ") and "edgezo[export]" in lines[0]
    require("export without its extra says in one line how to install it", right, done.stdout + done.stderr)
    require("and makes nothing", not (folder / "y").exists())


def run(what: str, command: Sequence[object], folder: Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    require(what, done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    """This process's variables without those that would lead Python back to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}


def only(folder: Path, pattern: str) -> Path:
    """The one file that matches."""
    found = sorted(folder.glob(pattern))
    require(f"one {pattern} was built", len(found) == 1, f"found: {found}")
    return found[0]


def require(what: str, right: bool, found: str = "") -> None:
    """Print one line, or stop."""
    if not right:
        raise CheckError(f"{what}: {found}" if found else what)
    print(f"ok {what}", flush=True)


if __name__ == "__main__":
    main()
