"""When sessions are made: beside the reading of rows; and one at a time, where each would hold the frozen weights again."""

import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgezo
from edgezo.errors import DataError, EdgeModelError
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.session import Session
from edgezo.runtime.text import TextCodec

ROWS = [{"prompt": f"a {word} film:", "answer": answer} for word, answer in (("good", "great"), ("bad", "terrible"), ("fine", "great"))]


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sessions of edge models that there are after each was made."""
    made: list[weakref.ref[Session]] = []
    counts: list[int] = []
    make = EdgeModel._session

    def counted(model: EdgeModel, graph: Any) -> Session:
        session = make(model, graph)
        made.append(weakref.ref(session))
        counts.append(sum(one() is not None for one in made))
        return session

    monkeypatch.setattr(EdgeModel, "_session", counted)
    return counts


SETTINGS: dict[str, Any] = {"max_tokens": 3, "steps": 2, "eval_every": 1, "directions": 2, "batch": 1, "threads": 1}
GIVEN: dict[str, Any] = {"lr": 1e-3, "eps": 0.01}


@pytest.mark.parametrize("objective", ["likelihood", "f1"])
@pytest.mark.parametrize(
    ("settings", "validated"),
    [
        ({"start": "exact", **GIVEN}, True),
        ({"start": "none", **GIVEN}, True),
        ({"start": "none", **GIVEN}, False),
        ({"start": "none"}, False),
        ({"start": "none", "memory": "4GB"}, True),
    ],
)
def test_an_adapters_run_of_answers_holds_frozen_weights_once(
    export_tiny: Callable[..., Path],
    write_rows: Callable[..., str],
    tmp_path: Path,
    alive: list[int],
    objective: str,
    settings: dict[str, Any],
    validated: bool,
) -> None:
    data, edge = write_rows(ROWS * 2), export_tiny("llama", adapter="lora")
    valid = {"valid": data} if validated else {}
    result = edgezo.tune(edge, tmp_path / "run", data=data, objective=objective, **valid, **SETTINGS, **settings)
    assert (result.best is not None and "f1" in result.best.others) is validated
    edgezo.tune(edge, tmp_path / "run", resume=True, steps=3, threads=1)
    edgezo.evaluate(edge, data, run=tmp_path / "run", threads=1)
    assert len(alive) > 2 and max(alive) == 1


def test_whoever_asks_for_both_sessions_has_both(export_tiny: Callable[..., Path]) -> None:
    model = EdgeModel(export_tiny("llama", adapter="lora"), threads=1)
    scoring, generation = model.scoring, model.generation
    assert model.scoring is scoring
    with model.one_session():
        assert (model.scoring, model.generation) == (scoring, generation)
    assert model.generation is generation


def test_a_session_that_reads_weights_in_place_stays(exported_dir: Path) -> None:
    model = EdgeModel(exported_dir, threads=1)
    with model.one_session():
        scoring = model.scoring
        assert model.generation is not None
        assert model.scoring is scoring


def test_a_session_is_made_ahead_in_a_thread_of_its_own_and_once(exported_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = EdgeModel(exported_dir, threads=1).log_probs(["the film"], [" is great"])
    threads: list[threading.Thread] = []
    make = EdgeModel._session

    def noted(model: EdgeModel, graph: Any) -> Session:
        threads.append(threading.current_thread())
        return make(model, graph)

    monkeypatch.setattr(EdgeModel, "_session", noted)
    model = EdgeModel(exported_dir, threads=1)
    model.load_ahead()
    model.load_ahead()
    assert model.log_probs(["the film"], [" is great"]) == expected
    model.load_ahead()
    assert model.scoring is model.scoring
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


@pytest.mark.parametrize("use", ["tune", "evaluate"])
def test_a_session_is_made_while_rows_are_read(
    exported_dir: Path, write_rows: Callable[..., str], tmp_path: Path, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are read on when the session has been begun: the one waits for the other here."""
    begun, make, encode = threading.Event(), EdgeModel._session, TextCodec.encode

    def noted(model: EdgeModel, graph: Any) -> Session:
        begun.set()
        return make(model, graph)

    def waiting(text: TextCodec, *given: Any, **options: Any) -> list[int]:
        assert begun.wait(60)
        return encode(text, *given, **options)

    monkeypatch.setattr(EdgeModel, "_session", noted)
    monkeypatch.setattr(TextCodec, "encode", waiting)
    data = write_rows(ROWS)
    if use == "tune":
        edgezo.tune(exported_dir, tmp_path / "run", data=data, start="none", threads=1, steps=1, **GIVEN)
    else:
        edgezo.evaluate(exported_dir, data, threads=1, max_tokens=2)
    assert begun.is_set()


def test_a_graph_that_cannot_be_loaded_ahead_is_told_at_its_use(edge_dir: Path) -> None:
    model = EdgeModel(edge_dir, threads=1)
    (edge_dir / model.manifest.scoring.file).write_bytes(b"no graph")
    model.load_ahead()
    with pytest.raises(EdgeModelError, match="not readable as an ONNX graph"):
        model.log_probs(["the film"], [" is great"])


def test_weights_stay_while_a_session_is_made_ahead(
    exported_dir: Path, write_rows: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that the engine copied while it was perturbed would pass the proof."""
    make, seen = EdgeModel._session, []

    def slow(model: EdgeModel, graph: Any) -> Session:
        before = {name: array.tobytes() for name, array in model.weights.items()}
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
            seen.append(before == {name: array.tobytes() for name, array in model.weights.items()})
        return make(model, graph)

    monkeypatch.setattr(EdgeModel, "_session", slow)
    edgezo.tune(exported_dir, tmp_path / "run", data=write_rows(ROWS), start="none", threads=1, steps=1, **GIVEN)
    assert seen == [True]


def test_frozen_weights_that_a_proof_needs_twice_are_not_loaded_ahead(export_tiny: Callable[..., Path]) -> None:
    model = EdgeModel(export_tiny("llama", adapter="norms"), threads=1)
    model.load_ahead()
    assert model._ahead is None


def test_rows_that_are_not_understood_are_told_before_a_session_is_made(
    exported_dir: Path, write_rows: Callable[..., str], tmp_path: Path, alive: list[int]
) -> None:
    with pytest.raises(DataError):
        edgezo.tune(exported_dir, tmp_path / "run", data=write_rows([{"title": "a film"}]), threads=1)
    assert alive == []
