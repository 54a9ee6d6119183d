"""eps and lr measured at the start: right on known functions, told in whole lines, kept in the journal, obeyed when given."""

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgezo
from edgezo.config import ACCURACY_BATCH, TuneConfig, make_config
from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import calibration
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.landscape import LEAST_STEPS, WORSENS, Landscape, Probe, Scale, learning_rate, survey
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.optimizer import Schedule, schedule_factor
from edgezo.runtime.reports import Reporter
from edgezo.runtime.rules.normalized import Normalized
from edgezo.runtime.rules.sgd import Sgd
from edgezo.runtime.run import read_run
from edgezo.runtime.theta import Theta

Floats = npt.NDArray[np.float64]
Function = Callable[[Floats], float]
SIZE = 64


def probe_of(function: Function, start: Floats, directions: int = 16, noise: float = 0.0) -> Probe:
    """Along the same signs at every scale; `noise` is of every loss, as rounding makes it."""
    random = np.random.default_rng(0)
    z = random.choice([-1.0, 1.0], (directions, len(start)))

    def probe(scale: float) -> Scale:
        losses = np.array([[function(start + side * scale * row) for side in (1, -1)] for row in z])
        losses = losses + noise * random.standard_normal(losses.shape)
        if not np.isfinite(losses).all():
            raise NonFiniteLossError("not finite")
        return Scale((losses[:, 0] - losses[:, 1]) / (2 * scale), losses.mean(axis=1))

    return probe


def quadratic(curvatures: Floats, lowest: float = 0.0) -> Function:
    """lowest + sum h_i x_i^2 / 2."""
    return lambda x: lowest + float(curvatures @ x**2) / 2


def test_of_a_quadratic_the_gradient_and_the_trace_of_the_hessian_are_measured() -> None:
    curvatures, start = np.linspace(0.1, 4, SIZE), np.linspace(-1, 1, SIZE)
    found = survey(probe_of(quadratic(curvatures), start), -10, -20, 0)
    assert found.curvature == pytest.approx(curvatures.sum(), rel=1e-3)  # exact for signs and a diagonal Hessian
    assert found.grad_rms == pytest.approx(float(np.linalg.norm(curvatures * start)), rel=0.5)  # over 16 directions
    assert found.loss == pytest.approx(quadratic(curvatures)(start), rel=0.01)
    assert found.change < 1e-6
    assert found.reach == pytest.approx(math.sqrt(2 * WORSENS * found.loss / found.curvature), rel=1e-6)


@pytest.mark.parametrize("width", [0.01, 0.1, 1.0])
def test_reach_is_where_half_of_a_slope_is_lost(width: float) -> None:
    """L = sum sin(x_i / w): c(s) / c(0) = sin(s / w) / (s / w), one half at s = 1.895 w."""

    def function(x: Floats) -> float:
        return 10.0 + float(np.sin(x / width).sum())

    found = survey(probe_of(function, np.zeros(SIZE)), -8, -20, 4)
    assert found.reach == pytest.approx(1.895 * width, rel=0.1)
    assert width / 8 < found.eps < width
    assert found.change <= 0.05


def test_a_few_rows_with_large_gradients_do_not_decide_the_reach() -> None:
    gradients, widths = np.array([100.0, *[1.0] * 15]), np.array([0.01, *[1.0] * 15])

    def probe(scale: float) -> Scale:
        return Scale(gradients * np.sinc(scale / widths / math.pi), np.full(16, 10.0))

    assert survey(probe, -12, -20, 4).reach == pytest.approx(1.895, rel=0.1)


def test_directions_that_change_nothing_do_not_decide_the_reach() -> None:
    gradients = np.array([1.0] * 6 + [0.0] * 10)

    def probe(scale: float) -> Scale:
        return Scale(gradients * np.sinc(scale / math.pi), np.full(16, 10.0))

    assert survey(probe, -8, -20, 4).reach == pytest.approx(1.895, rel=0.1)


def test_eps_keeps_above_the_rounding_of_losses() -> None:
    noise = 1e-4
    found = survey(probe_of(lambda x: 1.0 + float(np.sin(x).sum()), np.zeros(SIZE), noise=noise), -16, -20, 4)
    assert found.change <= 0.05
    assert noise / found.eps < 0.05 * found.grad_rms


def test_where_no_eps_is_good_the_least_bad_is_taken_and_said() -> None:
    found = survey(probe_of(lambda x: 1.0, np.zeros(SIZE), noise=0.1), -8, -20, 4)
    assert found.change > 0.5


def test_a_loss_that_is_not_finite_far_out_bounds_the_reach() -> None:
    def function(x: Floats) -> float:
        return 1.0 + float(x.sum()) if np.abs(x).max() < 0.1 else math.inf

    found = survey(probe_of(function, np.zeros(SIZE)), -8, -20, 4)
    assert found.eps <= found.reach < 0.1


def test_a_loss_that_is_finite_nowhere_is_refused() -> None:
    with pytest.raises(
        NonFiniteLossError, match=r"^the loss is not finite at perturbations of [0-9.e-]+; export the model again, or give --eps$"
    ):
        survey(probe_of(lambda x: math.nan, np.zeros(SIZE)), -8, -20, 4)


LANDSCAPE = Landscape(eps=0.01, smooth=0.01, reach=0.12, rises=False, change=0.01, grad_rms=6.0, loss=1.0, curvature=0.0, probes=5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_random_steps_at_the_rate_end_at_the_reach(schedule: Schedule) -> None:
    for steps in (LEAST_STEPS, 100, 1000):
        lr = learning_rate(LANDSCAPE, Normalized(), schedule, 0.1, steps, 16, 1)
        walked = math.sqrt(sum((lr * schedule_factor(schedule, step / steps, 0.1)) ** 2 for step in range(steps)))
        assert walked == pytest.approx(LANDSCAPE.reach)


def test_the_rate_of_sgd_moves_weights_as_far_as_that_of_normalized_updates() -> None:
    grads = [LANDSCAPE.grad_rms, -LANDSCAPE.grad_rms] * 4
    moved = [
        math.sqrt(sum(scale**2 for scale in rule.scales(grads, learning_rate(LANDSCAPE, rule, "cosine", 0.0, 100, 8, 2))))
        for rule in (Sgd(), Normalized())
    ]
    assert moved[0] == pytest.approx(moved[1])


def test_fewer_rows_take_smaller_steps_and_more_rows_do_not_take_larger_ones() -> None:
    rates = [learning_rate(LANDSCAPE, Normalized(), "cosine", 0.0, 100, *rows) for rows in ((1, 1), (4, 1), (1, 16), (64, 2))]
    assert rates[1] == pytest.approx(2 * rates[0])
    assert rates[2] == rates[3] == pytest.approx(4 * rates[0])


def descend(function: Function, start: Floats, lr: float, steps: int) -> float:
    """The loss after normalized steps of 16 directions with a cosine."""
    random, x = np.random.default_rng(1), start.copy()
    for step in range(steps):
        z = random.choice([-1.0, 1.0], (16, len(x)))
        grads = [(function(x + 1e-4 * row) - function(x - 1e-4 * row)) / 2e-4 for row in z]
        x += np.array(Normalized().scales(grads, lr * schedule_factor("cosine", step / steps))) @ z
    return function(x)


@pytest.mark.parametrize("most_curved", [1.0, 30.0])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2])
def test_the_measured_rate_is_near_the_best_of_a_grid(most_curved: float, size: float) -> None:
    """Whatever the scale of weights and of curvature: within a factor of four of the best rate, and far below the start."""
    curvatures, start = np.linspace(0.1, most_curved, SIZE), size * np.random.default_rng(2).standard_normal(SIZE)
    function = quadratic(curvatures)
    lr = learning_rate(survey(probe_of(function, start), -10, -20, 8), Normalized(), "cosine", 0.0, 60, 16, 1)
    losses = {factor: descend(function, start, lr * factor, 60) for factor in (1 / 16, 1 / 4, 1.0, 4.0, 16.0)}
    assert min(losses, key=lambda factor: losses[factor]) in (1 / 4, 1.0, 4.0)
    assert losses[1.0] < 0.5 * function(start)


# on a model

TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "start": "none", "threads": 1}


@pytest.mark.parametrize("edge", ["exported_dir", "lora_dir", "prefix_dir"])
def test_a_run_without_eps_and_lr_measures_them_tells_them_and_keeps_them(
    request: pytest.FixtureRequest, edge: str, reviews: str, tmp_path: Path
) -> None:
    notices: list[str] = []
    directory = request.getfixturevalue(edge)
    result = edgezo.tune(
        directory, tmp_path / "run", data=reviews, valid=reviews, steps=30, eval_every=10, reporter=Reporter(notice=notices.append), **TASK
    )
    config, header = read_run(tmp_path / "run").config, read_run(tmp_path / "run").header
    assert config.eps is not None
    assert config.lr is not None
    rows, kept = f"{config.directions} x {config.batch} rows", header["calibration"]
    at, why = (
        ("there", "")
        if kept["smooth"] == config.eps
        else (f"at {kept['smooth']:.3g}", f"; eps is kept to a quarter of the reach, {kept['reach']:.3g}")
    )
    ending = "the loss is up by a tenth" if kept["rises"] else "half of a projected gradient is left"
    expected = [
        rf"eps {config.eps:.3g}, measured on 16 rows: projected gradients {at} and at a quarter of it differ by [0-9]+ %{why}",
        rf"lr {config.lr:.3g} \({config.rule}, {config.schedule}, about 30 steps of {rows}\): random steps reach {kept['reach']:.3g} in all, where {ending}",
    ]
    assert notices[0].startswith("16 rows of kind classification (")
    assert notices[2].startswith(f"warning: --valid {reviews} has the rows that are learned")
    for line, pattern in zip(notices[3:], expected, strict=True):
        assert re.fullmatch(pattern, line)
    assert kept.keys() == {*Landscape._fields, "lr", "steps", "rows"}
    assert (kept["eps"], kept["lr"], kept["steps"]) == (config.eps, config.lr, 30)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == config.lr
    assert result.before is not None
    assert result.best is not None
    assert result.best.loss < 0.9 * result.before.loss


def test_a_run_that_goes_on_measures_nothing_again(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(lora_dir, tmp_path / "whole", data=reviews, steps=6, schedule="constant", **TASK)
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=6, schedule="constant", minutes=60, **TASK, reporter=Reporter())
    notices: list[str] = []
    edgezo.tune(lora_dir, tmp_path / "whole", resume=True, steps=9, threads=1, reporter=Reporter(notice=notices.append))
    assert len(notices) == 1
    assert notices[0].startswith("going on after step 6 of 9 (6 before), ")
    run = read_run(tmp_path / "whole")
    rates = {record.learning_rate for record in run.records}
    assert (len(run.records), len(rates)) == (9, 1)
    assert rates.pop() == pytest.approx(run.config.lr)
    assert read_run(tmp_path / "run").config.lr == run.config.lr  # steps end before the hour does


def test_what_is_given_is_kept_and_told_when_it_is_far_off(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    notices: list[str] = []
    settings = {"data": reviews, "steps": 2, "valid_share": 0.0, "reporter": Reporter(notice=notices.append), **TASK}
    edgezo.tune(lora_dir, tmp_path / "both", lr=1e-3, eps=2**-8, **settings)
    understood = list(notices)
    assert [line[:9] for line in understood] == ["16 rows o", "the first"]
    notices.clear()
    assert "calibration" not in read_journal(tmp_path / "both" / "journal.bin").header
    edgezo.tune(lora_dir, tmp_path / "lr", lr=1e-7, **settings)
    assert read_run(tmp_path / "lr").config.lr == 1e-7
    pattern = r"warning: --lr 1e-07 is kept, [0-9.e-]+ was measured for 2 steps; the run may learn little, leave --lr out"
    assert notices[:2] == understood
    assert [bool(re.fullmatch(pattern, line)) for line in notices[2:]] == [False, True]
    notices.clear()
    edgezo.tune(lora_dir, tmp_path / "eps", eps=2**-9, **settings)
    assert read_run(tmp_path / "eps").config.eps == 2**-9
    assert [line[:3] for line in notices[2:]] == ["lr "]


def test_a_weight_decay_that_undoes_every_step_is_refused(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^--weight-decay 1e\+06: times the measured lr [0-9.e-]+ is not below 1; give a smaller one, or a smaller --lr$"
    ):
        edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=2, weight_decay=1e6, **TASK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("lr", "decay", "taken"), [(1e-2, 8.0, "8 %"), (1e-2, 0.9, None), (None, None, "50 %")])
def test_a_weight_decay_that_takes_much_is_told(
    lora_dir: Path, reviews: str, tmp_path: Path, lr: float | None, decay: float | None, taken: str | None
) -> None:
    settings = {"data": reviews, "steps": 2, "eps": 2**-8, "lr": lr, **TASK}
    if decay is None:
        edgezo.tune(lora_dir, tmp_path / "measured", **settings)
        decay = 0.5 / (read_run(tmp_path / "measured").config.lr or 0.0)
    notices: list[str] = []
    edgezo.tune(lora_dir, tmp_path / "run", weight_decay=decay, reporter=Reporter(notice=notices.append), **settings)
    rate = read_run(tmp_path / "run").config.lr
    told = f"warning: --weight-decay {decay:g} times lr {rate:.3g} takes {taken} off the matrices that are tuned at a step of the full rate; give a smaller one"
    assert [line for line in notices if "--weight-decay" in line] == ([told] if taken else [])


def test_an_objective_that_changes_in_steps_is_measured_by_its_smooth_one(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(lora_dir, tmp_path / "smooth", data=reviews, steps=2, **TASK)
    notices: list[str] = []
    told = Reporter(notice=notices.append)
    edgezo.tune(lora_dir, tmp_path / "steps", data=reviews, steps=2, objective="accuracy", reporter=told, **TASK)
    one, other = (read_run(tmp_path / name).header["calibration"] for name in ("smooth", "steps"))
    assert one == other
    config = read_run(tmp_path / "steps").config
    assert config.eps == pytest.approx(one["reach"])
    assert config.batch == ACCURACY_BATCH
    why = "by less an objective that changes in steps changes for hardly any row"
    assert [line for line in notices if line.startswith("eps ")] == [f"eps {config.eps:.3g}, the reach measured on 16 rows: {why}"]


@pytest.mark.parametrize(("spent", "steps"), [(0.0, 125), (30.0, 62), (60.0, 1), (90.0, 1)])
def test_minutes_alone_give_the_rate_of_as_many_steps_as_fit_into_what_is_left(
    lora_dir: Path, reviews: str, spent: float, steps: int
) -> None:
    settings = {name: value for name, value in TASK.items() if name != "threads"}
    config = make_config(None, {"data": reviews, "minutes": 1.0, **settings}, "lora")
    dataset = read_dataset(EdgeModel(lora_dir, threads=1), config)
    rows = dataset.config.rows
    assert calibration._expected_steps(dataset.config, 0.24 / rows, dataset, spent) == steps
    few = dataset.config.model_copy(update={"steps": 50})
    assert calibration._expected_steps(few, 0.24 / rows, dataset, spent) == min(50, steps)


def test_measuring_itself_counts_to_the_minutes(lora_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the steps are fitted behind is all that came before: every loss that was measured is made slow here."""
    every, estimates = calibration._expected_steps, Theta.estimates
    slept: list[float] = []
    seen: list[tuple[float, float]] = []

    def slow(*given: Any, **options: Any) -> Any:
        time.sleep(0.05)
        slept.append(0.05)
        return estimates(*given, **options)

    monkeypatch.setattr(Theta, "estimates", slow)
    monkeypatch.setattr(calibration, "_expected_steps", lambda *given: seen.append((given[3], sum(slept))) or every(*given))
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, minutes=60, steps=1, **TASK)
    ((spent, least),) = seen
    assert 0 < least < spent < read_run(tmp_path / "run").opening_seconds


@pytest.mark.parametrize(
    ("landscape", "config", "steps", "expected"),
    [
        ({}, {"directions": 16, "batch": 1}, 60, "about 60 steps of 16 x 1 rows): random steps reach 0.12 in all, where half of a projected gradient is left"),
        ({"rises": True}, {"directions": 1, "batch": 16}, 20, "about 20 steps of 1 x 16 rows): random steps reach 0.12 in all, where the loss is up by a tenth"),
        ({}, {"estimator": "one-sided", "directions": 7, "batch": 4}, 60, "about 60 steps of 4 shared rows): random steps reach 0.12 in all, where half of a projected gradient is left"),
        ({}, {"directions": 16, "batch": 1}, 1, "about 1 step of 16 x 1 rows, at the rate for 20): random steps reach 0.12 in all, where half of a projected gradient is left"),
    ],
)  # fmt: skip
def test_the_line_of_the_rate(landscape: dict[str, Any], config: dict[str, Any], steps: int, expected: str) -> None:
    found = LANDSCAPE._replace(**landscape)
    asked = TuneConfig(data="x", eps=0.01, **config)
    lines = calibration._told(
        asked, asked.model_copy(update={"lr": 1e-3}), True, calibration._Measured(found, False, None, found, 1e-3, steps, 16)
    )
    assert lines == [f"lr 0.001 (sgd, linear, {expected}"]


@pytest.mark.parametrize(
    ("smooth", "at", "why"), [(0.01, "there", ""), (0.04, "at 0.04", f"; eps is kept to a quarter of the reach, {LANDSCAPE.reach:.3g}")]
)
def test_the_line_of_eps_tells_the_scale_that_agrees(smooth: float, at: str, why: str) -> None:
    found = LANDSCAPE._replace(smooth=smooth)
    asked = TuneConfig(data="x", lr=1e-3)
    lines = calibration._told(
        asked, asked.model_copy(update={"eps": 0.01}), True, calibration._Measured(found, False, None, found, 1e-3, 60, 16)
    )
    assert lines == [f"eps 0.01, measured on 16 rows: projected gradients {at} and at a quarter of it differ by 1 %{why}"]


def test_the_reach_of_a_bowl_is_where_its_loss_rises() -> None:
    """c of a quadratic is the same at every scale: nothing of a projected gradient is ever lost."""
    start = 0.1 * np.ones(SIZE)
    found = survey(probe_of(quadratic(np.ones(SIZE)), start), -8, -20, 8)
    assert found.rises
    assert found.eps <= found.reach / 4 < found.smooth
