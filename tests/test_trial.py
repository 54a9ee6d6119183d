"""Steps that are tried before a run and taken back: the rate is measured again after them, and the run knows nothing of them otherwise."""

import re
from pathlib import Path
from typing import Any

import pytest

import edgezo
from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import calibration
from edgezo.runtime.calibration import TRIAL_STEPS, TRIED
from edgezo.runtime.landscape import Landscape
from edgezo.runtime.reports import Reporter
from edgezo.runtime.run import read_run
from edgezo.runtime.theta import Theta

TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "start": "none", "threads": 1}
SHORT: dict[str, Any] = {**TASK, "valid_share": 0.0, "directions": 4, "batch": 1}
BEFORE = Landscape(eps=0.01, reach=0.12, change=0.01, grad_rms=6.0, loss=1.0, curvature=0.0, probes=5)


@pytest.mark.parametrize("edge", ["exported_dir", "lora_dir", "prefix_dir"])
def test_a_run_is_that_of_the_measured_eps_and_rate_with_nothing_left_of_the_trial(
    request: pytest.FixtureRequest, edge: str, reviews: str, tmp_path: Path
) -> None:
    directory, notices = request.getfixturevalue(edge), list[str]()
    edgezo.tune(directory, tmp_path / "run", data=reviews, steps=TRIED, reporter=Reporter(notice=notices.append), **SHORT)
    run = read_run(tmp_path / "run")
    edgezo.tune(directory, tmp_path / "given", data=reviews, steps=TRIED, eps=run.config.eps, lr=run.config.lr, **SHORT)
    assert run.records == read_run(tmp_path / "given").records
    facts = run.header["calibration"]
    tried = facts["trial"]
    assert tried.keys() == {*Landscape._fields, "steps"}
    assert tried["steps"] == TRIAL_STEPS
    assert run.config.eps == min(facts["eps"], tried["eps"])
    reach = tried["reach"] if tried["loss"] < facts["loss"] else min(tried["reach"], facts["reach"])
    assert tried["loss"] != facts["loss"]
    (told,) = (line for line in notices if line.startswith("lr "))
    expected = f"random steps reach {reach:.3g} in all, where half of a projected gradient is left, after 8 steps that were tried and taken back; {facts['reach']:.3g} before them"
    assert told.endswith(expected)


def test_a_run_that_goes_on_after_a_trial_tries_nothing_again(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    edgezo.tune(lora_dir, whole, data=reviews, steps=TRIED, schedule="constant", eval_every=100, **SHORT)
    edgezo.tune(lora_dir, parts, data=reviews, steps=TRIED, schedule="constant", eval_every=100, **SHORT)
    notices: list[str] = []
    edgezo.tune(lora_dir, parts, resume=True, steps=TRIED + 2, threads=1, reporter=Reporter(notice=notices.append))
    assert not notices
    assert read_run(parts).records[:TRIED] == read_run(whole).records


@pytest.mark.parametrize(
    "settings",
    [{"steps": TRIED - 1}, {"lr": 1e-3}, {"eps": 2**-8, "lr": 1e-3}, {"objective": "accuracy"}, {"start": "exact"}],
    ids=["short", "given rate", "both given", "objective in steps", "exact start"],
)
def test_nothing_is_tried(settings: dict[str, Any], lora_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_after_trial", lambda *given: pytest.fail("tried"))
    given = {**TASK, "steps": TRIED, "valid_share": 0.0, "directions": 2, "batch": 1, **settings}
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, **given)
    assert "trial" not in read_run(tmp_path / "run").header.get("calibration", {})


def test_a_trial_that_ruins_the_loss_changes_nothing(lora_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, ruined = Theta.measure, list[int]()

    def ruin(theta: Theta, batch: Any, step: int, learning_rate: float) -> Any:
        if step == 3 and not ruined:
            ruined.append(step)
            raise NonFiniteLossError("the loss is not finite")
        return measure(theta, batch, step, learning_rate)

    monkeypatch.setattr(Theta, "measure", ruin)
    notices: list[str] = []
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=TRIED, reporter=Reporter(notice=notices.append), **SHORT)
    facts = read_run(tmp_path / "run").header["calibration"]
    assert ruined
    assert "trial" not in facts
    (told,) = (line for line in notices if line.startswith("lr "))
    assert re.search(rf"random steps reach {facts['reach']:.3g} in all, where half of a projected gradient is left$", told)
    assert read_run(tmp_path / "run").config.lr == facts["lr"]


@pytest.mark.parametrize(("loss", "reach", "expected"), [(0.9, 0.05, 0.05), (0.9, 0.3, 0.3), (1.1, 0.05, 0.05), (1.1, 0.3, 0.12)])
def test_a_trial_that_did_not_lower_the_loss_cannot_raise_the_rate(loss: float, reach: float, expected: float) -> None:
    assert calibration._agreed(BEFORE, BEFORE._replace(loss=loss, reach=reach)).reach == expected
    assert calibration._agreed(BEFORE, None) is BEFORE


def test_weight_decay_is_refused_before_anything_is_tried(
    lora_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_after_trial", lambda *given: pytest.fail("tried"))
    with pytest.raises(ConfigError, match=r"^--weight-decay 1e\+06: times the measured lr"):
        edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=TRIED, weight_decay=1e6, **SHORT)
