"""Runs of every objective resume, replay and verify; a user's own function is one of them."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from objective_rows import ANSWER_ROWS, CHOICE_ROWS, PREFERENCE_ROWS, objective_of

import edgezo
from edgezo.errors import ConfigError, DataError
from edgezo.runtime.check import check_run
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.outcome import Outcome, load_reward
from edgezo.runtime.run import read_run
from edgezo.runtime.tune import Reporter
from edgezo.runtime.tuned import write_tuned

REWARDS = """
def short(outcomes):
    return [-len(outcome.text) for outcome in outcomes]
def sure(outcomes):
    return [outcome.scores[outcome.gold] - max(outcome.scores) for outcome in outcomes]
def few(outcomes):
    return []
def broken(outcomes):
    raise KeyError("film")
def endless(outcomes):
    return [float("nan") for _ in outcomes]
def forgets(outcomes):
    print("thinking")
def huge(outcomes):
    return [10**400]
def large(outcomes):
    return [-1e308]
def table(outcomes):
    import numpy
    return numpy.ones((1, 2))
def words(outcomes):
    yield from ("good" for _ in outcomes)
"""


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_rewards", raising=False)


def test_a_users_own_function_is_the_objective(model: EdgeModel, rewards: None) -> None:
    objective, examples = objective_of(model, ANSWER_ROWS, objective="own_rewards:short", max_tokens=5)
    texts = objective._answers(examples)
    assert objective.loss(examples) == np.mean([len(text) for text in texts])
    assert next(iter(objective.evaluate(examples).others.items())) == ("reward", -objective.loss(examples))
    objective, examples = objective_of(model, CHOICE_ROWS, objective="own_rewards:sure")
    assert not objective.generates
    assert objective.loss(examples) >= 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such:thing", "--objective no_such:thing: no_such cannot be imported from "),
        ("own_rewards:none", "--objective own_rewards:none: own_rewards has no function 'none'"),
        (
            "own_rewards:few",
            "--objective own_rewards:few: returned 0 values for 1 rows; return a number a row",
        ),
        ("own_rewards:forgets", "--objective own_rewards:forgets: returned None; return a list of numbers, one a row"),
        ("own_rewards:huge", "--objective own_rewards:huge: returned [1000"),
        ("own_rewards:table", "--objective own_rewards:table: returned array([[1., 1.]]); return a list of numbers, one a row"),
        ("own_rewards:words", "--objective own_rewards:words: returned ['good']; return a list of numbers, one a row"),
        ("own_rewards:endless", "--objective own_rewards:endless: returned nan; return finite numbers from -1e+30 to 1e+30"),
        ("own_rewards:large", "--objective own_rewards:large: returned -1e+308; return finite numbers from -1e+30 to 1e+30"),
        (
            "own_rewards:broken",
            "--objective own_rewards:broken: failed at own_rewards.py:9 on a list of 1: KeyError: 'film' (text is None for rows with candidates, scores for all others)",
        ),
    ],
)
def test_what_is_wrong_with_a_users_function_is_told(rewards: None, name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_reward(name)([Outcome({}, "text", None, None)])
    assert str(caught.value).startswith(message)


def test_what_a_users_function_prints_is_no_result(rewards: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        load_reward("own_rewards:forgets")([Outcome({}, "text", None, None)])
    assert capsys.readouterr() == ("", "thinking\n")


RUNS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    (CHOICE_ROWS, {}),
    (CHOICE_ROWS, {"objective": "accuracy"}),
    (ANSWER_ROWS, {"objective": "f1", "max_tokens": 4}),
    (PREFERENCE_ROWS, {}),
    (PREFERENCE_ROWS, {"objective": "dpo"}),
]


@pytest.mark.parametrize("edge", ["exported_dir", "lora_dir"])
@pytest.mark.parametrize(("rows", "settings"), RUNS)
def test_runs_of_every_kind_resume_replay_and_verify(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    write_rows: Callable[..., str],
    edge: str,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    directory, data = request.getfixturevalue(edge), write_rows(rows)
    given = {"data": data, "valid": data, "directions": 2, "batch": 1, "eval_every": 1, "lr": 1e-3, "threads": 1, **settings}
    edgezo.tune(directory, tmp_path / "whole", steps=2, **given)
    result = edgezo.tune(directory, tmp_path / "parts", steps=1, **given)
    assert result.best is not None
    resumed = edgezo.tune(directory, tmp_path / "parts", resume=True, steps=2, threads=1)
    whole, parts = (read_run(tmp_path / name) for name in ("whole", "parts"))
    assert [record.projected_grads for record in whole.records] == [record.projected_grads for record in parts.records]
    assert whole.evaluations == parts.evaluations
    assert resumed.steps == 2
    found = edgezo.evaluate(directory, data, run=tmp_path / "whole", step="last", threads=1).evaluation
    assert found.as_dict() == pytest.approx(whole.evaluations[2].as_dict(), abs=1e-5)
    assert any(any(record.projected_grads) for record in whole.records) or settings.get("objective") in {"accuracy", "f1"}
    checked = check_run(tmp_path / "parts", EdgeModel(directory, threads=1), every=1)
    assert (checked.derived, checked.problems) == (2, [])
    for steps in (1, 2):
        digests = {tuned_digest(directory, tmp_path / name, steps) for name in ("whole", "parts")}
        assert len(digests) == 1


def tuned_digest(directory: Path, run: Path, step: int) -> str:
    """SHA-256 of what a run tuned, rebuilt from its journal."""
    model = EdgeModel(directory, threads=1, run=run, step=step)
    arrays = [model.adapter.a, model.adapter.b] if isinstance(model.adapter, Lora) else list(model.weights.values())
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_dpo_is_relative_to_the_start_of_the_run(lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str]) -> None:
    data = write_rows(PREFERENCE_ROWS)
    given = {"data": data, "valid": data, "directions": 2, "batch": 1, "threads": 1}
    edgezo.tune(lora_dir, tmp_path / "first", steps=3, **given)
    write_tuned(lora_dir, [tmp_path / "first"], [1.0], "last", tmp_path / "adapter", "peft")
    settings = {**given, "objective": "dpo", "init": str(tmp_path / "adapter"), "memory": "64GB"}
    edgezo.tune(lora_dir, tmp_path / "second", steps=1, **settings)
    start = read_run(tmp_path / "second").evaluations[0]
    assert start.others["margin"] == pytest.approx(0, abs=1e-4)
    assert start.loss == pytest.approx(math.log(2), abs=1e-5)
    found = edgezo.evaluate(lora_dir, data, run=tmp_path / "second", step=0, threads=1).evaluation
    assert found.others["margin"] == pytest.approx(0, abs=1e-4)


def test_rows_of_the_head_that_dpo_starts_from_are_in_its_references(
    lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    """As a run that first learned the chosen texts has them."""
    endings = {"good": " it was great", "bad": " it was terrible"}
    texts = write_rows([{"prompt": f"a {word} film:", "completion": ending} for word, ending in endings.items()] * 9, "texts.jsonl")
    edgezo.tune(lora_dir, tmp_path / "texts", data=texts, steps=0, threads=1)
    write_tuned(lora_dir, [tmp_path / "texts"], [1.0], "last", tmp_path / "adapter", "peft")
    data = write_rows(PREFERENCE_ROWS)
    given = {
        "data": data,
        "valid": data,
        "objective": "dpo",
        "init": str(tmp_path / "adapter"),
        "directions": 2,
        "lr": 1e-3,
        "eval_every": 1,
    }
    edgezo.tune(lora_dir, tmp_path / "whole", steps=2, schedule="constant", threads=1, **given)
    edgezo.tune(lora_dir, tmp_path / "parts", steps=1, schedule="constant", threads=1, **given)
    edgezo.tune(lora_dir, tmp_path / "parts", resume=True, steps=2, threads=1)
    whole, parts = (read_run(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole.journal.heads[0].tokens)
    assert whole.records == parts.records
    assert whole.evaluations == parts.evaluations
    assert check_run(tmp_path / "whole", EdgeModel(lora_dir, threads=1), every=1).problems == []


def test_an_objective_that_nothing_changes_is_warned_of(
    lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constant_rewards.py").write_text("def one(outcomes):\n    return [1] * len(outcomes)\n")
    monkeypatch.chdir(tmp_path)
    notices: list[str] = []
    settings = {"data": write_rows(CHOICE_ROWS), "objective": "constant_rewards:one", "directions": 2, "threads": 1, "steps": 7}
    edgezo.tune(lora_dir, tmp_path / "run", reporter=Reporter(notice=notices.append), **settings)
    assert [notice for notice in notices if notice.startswith("warning: in 5 steps no direction changed the objective")] == notices[-1:]
    edgezo.tune(lora_dir, tmp_path / "short", reporter=Reporter(notice=notices.append), **{**settings, "steps": 1})
    assert notices[-1].startswith("warning: in 1 step no direction changed the objective")


def test_an_adapters_default_directions_are_lowered_to_the_rows(lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str]) -> None:
    notices: list[str] = []
    data = write_rows(CHOICE_ROWS)
    edgezo.tune(lora_dir, tmp_path / "run", data=data, steps=1, threads=1, reporter=Reporter(notice=notices.append))
    assert notices[0] == f"3 rows of {data}: 3 directions a step instead of 16, since each needs rows of its own"
    assert len(read_run(tmp_path / "run").records[0].projected_grads) == 3
    edgezo.tune(lora_dir, tmp_path / "run", resume=True, steps=2, threads=1)
    with pytest.raises(DataError, match=r"^--directions 4: more than the 3 rows of "):
        edgezo.tune(lora_dir, tmp_path / "other", data=data, directions=4, threads=1)
