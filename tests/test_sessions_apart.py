"""Frozen weights are held by one session at a time, where each session would hold them again."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgezo
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.session import Session

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
