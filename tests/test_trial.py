"""Steps that are tried before a run and taken back: the rate is measured again after them, and the run knows nothing of them otherwise."""

import math
import time
from pathlib import Path
from typing import Any

import pytest

import edgezo
from edgezo.config import TuneConfig, make_config
from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import calibration
from edgezo.runtime.calibration import TRIAL_RUN_STEPS, TRIAL_STEPS, calibrate, measuring_config
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.landscape import Landscape, learning_rate
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.replay import apply_records
from edgezo.runtime.reports import Reporter
from edgezo.runtime.rules import make_rule
from edgezo.runtime.run import read_run
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.theta import Theta, mutable_weights
from edgezo.runtime.tuned import write_tuned

TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "start": "none", "threads": 1}
SHORT: dict[str, Any] = {**TASK, "valid_share": 0.0, "directions": 4, "batch": 1}


def rate_of(landscape: Landscape, config: TuneConfig, steps: int = TRIAL_RUN_STEPS) -> float:
    """The rate of a run of so many steps, by one measurement."""
    rows = config.rows / config.directions
    return learning_rate(landscape, make_rule(config, {}), config.schedule, config.warmup, steps, config.directions, rows)


def landscape_of(facts: dict[str, Any]) -> Landscape:
    """The numbers of a journal's header as they were measured."""
    return Landscape(**{name: facts[name] for name in Landscape._fields})


def reach_of(facts: dict[str, Any]) -> str:
    """How the reach is told."""
    ending = "the loss is up by a tenth" if facts["rises"] else "half of a projected gradient is left"
    return f": random steps reach {facts['reach']:.3g} in all, where {ending}"


@pytest.mark.parametrize("edge", ["exported_dir", "lora_dir", "prefix_dir"])
def test_a_run_is_that_of_the_measured_eps_and_rate_with_nothing_left_of_the_trial(
    request: pytest.FixtureRequest, edge: str, reviews: str, tmp_path: Path
) -> None:
    directory, notices, stages = request.getfixturevalue(edge), list[str](), list[str]()
    reporter = Reporter(notice=notices.append, stage=stages.append)
    edgezo.tune(directory, tmp_path / "run", data=reviews, steps=TRIAL_RUN_STEPS, reporter=reporter, **SHORT)
    measuring = [stage for stage in stages if stage.startswith("measuring")]
    assert measuring == ["measuring the loss around the start", "measuring it again after 8 steps, which are taken back"]
    run = read_run(tmp_path / "run")
    edgezo.tune(directory, tmp_path / "given", data=reviews, steps=TRIAL_RUN_STEPS, eps=run.config.eps, lr=run.config.lr, **SHORT)
    assert run.records == read_run(tmp_path / "given").records
    facts = run.header["calibration"]
    after = facts["trial"]
    assert after.keys() == {*Landscape._fields, "tried_steps"}
    assert after["tried_steps"] == TRIAL_STEPS
    assert run.config.eps == min(facts["eps"], after["eps"])
    assert run.config.lr == facts["lr"]
    (told,) = (line for line in notices if line.startswith("lr "))
    lowered = after["loss"] < facts["loss"]
    trusted = min((after, facts), key=lambda one: math.inf if one is facts and lowered else rate_of(landscape_of(one), run.config))
    assert told.endswith(reach_of(trusted))
    found = f", and the loss around them measured: random steps reached {facts['reach']:.3g} before, {after['reach']:.3g} after"
    held = f": they did not lower the loss, so the rate measured {'after them holds, which is smaller' if trusted is after else 'before them holds'}"
    assert notices[notices.index(told) - 1] == f"8 steps were tried and taken back{found if lowered else held}"


@pytest.mark.parametrize(
    ("edge", "more"), [("exported_dir", {"rule": "momentum"}), ("lora_dir", {"minutes": 60.0}), ("lora_dir", {"init": "adapter"})]
)
def test_what_is_measured_after_the_trial_is_the_loss_around_eight_steps_of_a_run(
    request: pytest.FixtureRequest, edge: str, more: dict[str, Any], reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = request.getfixturevalue(edge)
    monkeypatch.chdir(tmp_path)
    if "init" in more:
        edgezo.tune(directory, "first", data=reviews, steps=3, eps=1e-2, lr=1e-2, **SHORT)
        write_tuned(directory, [Path("first")], [1.0], "last", Path("adapter"), "peft")
    edgezo.tune(directory, "run", data=reviews, steps=TRIAL_RUN_STEPS, **SHORT, **more)
    run = read_run("run")
    before = landscape_of(run.header["calibration"])
    lr = rate_of(before, run.config)
    edgezo.tune(directory, "eight", data=reviews, steps=TRIAL_STEPS, eps=before.eps, lr=lr, **{**SHORT, **more, "schedule": "constant"})
    eight, model = read_run("eight"), EdgeModel(directory, threads=1)
    config = run.config.model_copy(update={"eps": None, "lr": None, "steps": 1, "minutes": None})
    measuring = measuring_config(model, config)
    weights = mutable_weights(model, measuring, eight.start)
    dataset = read_dataset(model, config)
    theta = Theta(model, measuring, weights, Objective(Sequences(model), dataset.task, config))
    apply_records(eight.config, eight.records, theta.weights, theta.rule)
    found = calibrate(theta, config, dataset, time.monotonic(), eight.start).facts
    assert {"tried_steps": TRIAL_STEPS, **{name: found[name] for name in Landscape._fields}} == run.header["calibration"]["trial"]


def test_a_run_that_goes_on_after_a_trial_tries_nothing_again(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    whole, parts, settings = tmp_path / "whole", tmp_path / "parts", {**SHORT, "schedule": "constant"}
    edgezo.tune(lora_dir, parts, data=reviews, steps=TRIAL_RUN_STEPS, **settings)
    notices: list[str] = []
    edgezo.tune(lora_dir, parts, resume=True, steps=TRIAL_RUN_STEPS + 2, threads=1, reporter=Reporter(notice=notices.append))
    assert [notice.split(",")[0] for notice in notices] == [
        f"going on after step {TRIAL_RUN_STEPS} of {TRIAL_RUN_STEPS + 2} ({TRIAL_RUN_STEPS} before)"
    ]
    config = read_run(parts).config
    edgezo.tune(lora_dir, whole, data=reviews, steps=TRIAL_RUN_STEPS + 2, eps=config.eps, lr=config.lr, **settings)
    assert read_run(parts).records == read_run(whole).records


@pytest.mark.parametrize(
    "settings",
    [{"steps": TRIAL_RUN_STEPS - 1}, {"lr": 1e-3}, {"eps": 2**-8, "lr": 1e-3}, {"objective": "accuracy"}, {"start": "exact"}],
    ids=["short", "given rate", "both given", "objective in steps", "exact start"],
)
def test_nothing_is_tried(settings: dict[str, Any], lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    given = {**TASK, "steps": TRIAL_RUN_STEPS, "valid_share": 0.0, "directions": 2, "batch": 1, **settings}
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
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=TRIAL_RUN_STEPS, reporter=Reporter(notice=notices.append), **SHORT)
    facts = read_run(tmp_path / "run").header["calibration"]
    assert ruined
    assert facts["trial"] == {"tried_steps": TRIAL_STEPS}
    (told,) = (line for line in notices if line.startswith("lr "))
    assert told.endswith(reach_of(facts))
    tried = "8 steps were tried and taken back: the loss was not finite after them, so the rate measured before them holds"
    assert notices[notices.index(told) - 1] == tried
    assert read_run(tmp_path / "run").config.lr == facts["lr"] == rate_of(landscape_of(facts), read_run(tmp_path / "run").config)


def test_a_trial_up_the_slope_cannot_raise_the_rate(lora_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Theta.measure

    def upwards(theta: Theta, batch: Any, step: int, learning_rate: float) -> Any:
        return [found._replace(projected_grad=-found.projected_grad) for found in measure(theta, batch, step, learning_rate)]

    monkeypatch.setattr(Theta, "measure", upwards)
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=TRIAL_RUN_STEPS, **SHORT)
    run = read_run(tmp_path / "run")
    facts = run.header["calibration"]
    assert facts["trial"]["loss"] > facts["loss"]
    assert facts["lr"] == min(rate_of(landscape_of(measured), run.config) for measured in (facts, facts["trial"]))


@pytest.mark.parametrize(
    ("of_trial", "raises"),
    [({"reach": 0.3}, True), ({"grad_rms": 0.1}, True), ({"reach": 0.05}, False), ({"grad_rms": 20.0, "reach": 0.13}, False)],
    ids=["wider", "flatter", "narrower", "steeper"],
)
@pytest.mark.parametrize("loss", [0.9, 1.1])
def test_a_trial_that_did_not_lower_the_loss_can_lower_the_rate_and_not_raise_it(
    loss: float, of_trial: dict[str, float], raises: bool
) -> None:
    config = make_config(None, {"data": "no file", "rule": "sgd"})
    before = Landscape(eps=0.01, smooth=0.01, reach=0.12, rises=False, change=0.01, grad_rms=6.0, loss=1.0, curvature=0.0, probes=5)
    after = before._replace(loss=loss, **of_trial)
    assert (rate_of(after, config) > rate_of(before, config)) is raises
    trusted = calibration._trusted(before, after, make_rule(config, {}), config)
    assert trusted is (before if loss > 1 and raises else after)
    measured = calibration._Measured(before, True, after, trusted, 1e-3, TRIAL_RUN_STEPS, 16)
    told = ", and the loss around them measured: random steps reached 0.12 before, "
    if loss > 1:
        told = (
            f": they did not lower the loss, so the rate measured {'before them holds' if raises else 'after them holds, which is smaller'}"
        )
    assert measured.trial()[0].startswith(f"8 steps were tried and taken back{told}")


def test_weight_decay_that_only_the_rate_of_the_trial_would_not_stand_is_taken(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    settings = {**SHORT, "steps": 4 * TRIAL_RUN_STEPS}
    edgezo.tune(lora_dir, tmp_path / "plain", data=reviews, **settings)
    plain = read_run(tmp_path / "plain")
    facts = plain.header["calibration"]
    decay = 0.9 / facts["lr"]
    assert rate_of(landscape_of(facts), plain.config) * decay > 1
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, weight_decay=decay, **settings)
    assert read_run(tmp_path / "run").header["calibration"] == facts


def test_weight_decay_that_the_run_would_not_stand_is_refused(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--weight-decay 1e\+06: times the measured lr"):
        edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=TRIAL_RUN_STEPS, weight_decay=1e6, **SHORT)
    assert not (tmp_path / "run").exists()
