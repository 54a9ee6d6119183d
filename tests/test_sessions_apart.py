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


@pytest.mark.parametrize("objective", ["likelihood", "f1"])
@pytest.mark.parametrize("start", ["exact", "none"])
def test_an_adapters_run_of_answers_holds_frozen_weights_once(
    export_tiny: Callable[..., Path], write_rows: Callable[..., str], tmp_path: Path, alive: list[int], objective: str, start: str
) -> None:
    data = write_rows(ROWS * 2)
    settings: dict[str, Any] = {"objective": objective, "start": start, "lr": 1e-3, "eps": 0.01, "directions": 2, "batch": 1, "threads": 1}
    edge = export_tiny("llama", adapter="lora")
    result = edgezo.tune(edge, tmp_path / "run", data=data, valid=data, max_tokens=3, steps=2, eval_every=1, **settings)
    assert result.best is not None and "f1" in result.best.others
    assert len(alive) > 3 and max(alive) == 1


def test_a_session_that_reads_weights_in_place_stays(exported_dir: Path) -> None:
    model = EdgeModel(exported_dir, threads=1)
    scoring = model.scoring
    with model.alone("generation"):
        generation = model.generation
        assert model.scoring is scoring
    assert model.generation is generation
