"""Damage an edge model's manifest or its scoring graph, and the refusal that it meets."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgezo.errors import EdgeModelError
from edgezo.manifest import StoredFile
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.model import EdgeModel

Raw = dict[str, Any]


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


def rewrite_scoring(directory: Path, change: Callable[[onnx.GraphProto], object]) -> None:
    """Edit scoring.onnx and mend the manifest's hash and size, so that only the proof can object."""
    path = directory / "scoring.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)
    data = path.read_bytes()
    manifest = read_manifest(directory)
    files = {**manifest.files, path.name: StoredFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())}
    manifest.model_copy(update={"files": files}).write(directory)
