"""Divergence: noticed beyond noise and beyond differences of rows, taken back exactly, told in whole lines, and ended when it will not stop."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgezo
from edgezo.config import make_config
from edgezo.errors import DivergenceError, NonFiniteLossError, RunError
from edgezo.runtime import tuner
from edgezo.runtime.check import check_run
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import CHECKSUM, LENGTH, MAGIC, STEP, UNDO, record_bytes
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.reports import Reporter, StepReport
from edgezo.runtime.run import measured_lr, read_run
from edgezo.runtime.theta import Theta
from edgezo.runtime.tune import tune
from edgezo.runtime.tuner import MOST_UNDOS, SMALLER, Tuner
from edgezo.runtime.watch import LEVEL_STEPS, Rise, find_rise, lowest_level, worse_than_start
from edgezo.storage import JOURNAL

TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "start": "none"}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_noise_and_a_falling_loss_are_no_rise(seed: int, drop: float) -> None:
    losses = 1.0 + drop * np.exp(-np.arange(300) / 50) + 0.2 * np.random.default_rng(seed).standard_normal(300)
    assert not any(find_rise(losses[:count].tolist(), 16) for count in range(1, 301))


def test_an_explosion_is_seen_after_two_steps_and_a_rise_after_some() -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(100)
    calm = (1.0 + noise[:40]).tolist()
    assert find_rise([1.0], 16) is find_rise([1.0, 9.0], 16) is None
    found = find_rise([1.0, 9.0, 9.0], 16)
    assert found is not None
    assert (found.loss, found.level, found.good_step) == (9.0, 1.0, 0)
    assert find_rise([*calm, 1.3], 16) is None
    assert find_rise([*calm, 4.0, 4.0], 16) is not None
    slow = [*calm, *(1.4 + noise[40:60]).tolist()]
    first = next(count for count in range(41, 61) if find_rise(slow[:count], 16))
    assert 42 <= first <= 52
    found = find_rise(slow[:first], 16)
    assert found is not None
    assert found.good_step < 40


def test_losses_of_a_single_row_scatter_by_their_own_size() -> None:
    assert find_rise([1.0, 3.0, 3.0], 1) is None
    assert find_rise([1.0, 9.0, 9.0], 1) is not None


def test_the_lowest_level_is_a_mean_and_ends_at_its_last_step() -> None:
    losses = [3.0] * 10 + [1.0] * LEVEL_STEPS + [2.0] * 5
    assert lowest_level(losses) == (pytest.approx(1.0), 9 + LEVEL_STEPS, LEVEL_STEPS)
    assert lowest_level([3.0, 1.0]) == (2.0, 1, 2)


@pytest.mark.parametrize(
    ("accuracy", "loss", "worse"), [(0.5, 1.2, True), (0.5, 1.05, False), (0.6, 1.2, False), (0.4, 1.05, False), (0.4, 1.2, True)]
)
def test_a_state_is_worse_than_the_start_by_metric_and_loss(accuracy: float, loss: float, worse: bool) -> None:
    assert worse_than_start(Evaluation(100, 1.0, 0.5), Evaluation(100, loss, accuracy)) is worse


def digest(model: EdgeModel) -> str:
    """SHA-256 over the weights and the adapter."""
    arrays = [*model.weights.values(), *([model.adapter.b] if hasattr(model.adapter, "b") else [])]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


@pytest.mark.parametrize("edge", ["exported_dir", "lora_dir"])
def test_a_rate_far_too_large_recovers_and_the_run_is_its_journal(
    request: pytest.FixtureRequest, edge: str, reviews: str, tmp_path: Path
) -> None:
    directory, notices = request.getfixturevalue(edge), list[str]()
    settings = {
        "data": reviews,
        "valid": reviews,
        "steps": 60,
        "eval_every": 20,
        "lr": 3.0,
        "eps": 2**-8,
        "rule": "normalized",
        "batch": 2,
        **TASK,
    }
    kind = "lora" if edge == "lora_dir" else None
    model = EdgeModel(directory, threads=1)
    result = tune(model, make_config(None, settings, kind), tmp_path / "run", reporter=Reporter(notice=notices.append))
    told = [line for line in notices if "back to step" in line]
    pattern = r"step \d+: .+; back to step \d+, on from there with a quarter of the learning rate, [0-9.e-]+"
    assert re.fullmatch(f"{pattern}; without --lr a new run measures one", told[0])
    assert all(re.fullmatch(pattern, line) for line in told[1:])
    contents = read_journal(tmp_path / "run" / "journal.bin")
    assert contents.undos == len(told) > 0
    assert contents.lr_scale == SMALLER ** len(told)
    assert len(contents.records) == result.steps == 60
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr_scale"] for line in lines if "undone_to" in line] == [SMALLER**count for count in range(1, len(told) + 1)]
    assert result.before is not None
    assert result.best is not None
    assert result.best.score() >= result.before.score()
    assert digest(EdgeModel(directory, run=tmp_path / "run", step="last", threads=1)) == digest(model)


def test_a_rate_far_too_large_is_lowered_to_the_measured_one_and_then_by_quarters(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    notices: list[str] = []
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, lr=3.0, steps=12, threads=1, reporter=Reporter(notice=notices.append), **TASK)
    run = read_run(tmp_path / "run")
    measured = run.header["calibration"]["lr"]
    assert 0 < measured < 3 * SMALLER
    told = [line for line in notices if "back to step" in line]
    assert told[0].endswith(f"on from there with the learning rate that was measured, {measured:.3g}")
    assert all("with a quarter of the learning rate" in line for line in told[1:])
    assert run.journal.lr_scale == pytest.approx(measured / 3 * SMALLER ** (len(told) - 1))
    assert told[-1].split("back to step ")[1].startswith("0,")
    assert max(record.learning_rate for record in run.records) <= measured * (1 + 1e-6)


@pytest.mark.parametrize("lr", [None, 0.5])
def test_after_resume_a_measured_rate_is_quartered_and_a_given_one_lowered_to_the_measured(
    lora_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float | None
) -> None:
    notices: list[str] = []
    ruined = [NonFiniteLossError("the loss is not finite")]
    edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=1, lr=lr, threads=1, **TASK)
    measured = read_run(tmp_path / "run").header["calibration"]["lr"]
    measure = Theta.measure

    def ruin(theta: Theta, batch: Any, step: int, learning_rate: float) -> Any:
        if ruined:
            raise ruined.pop()
        return measure(theta, batch, step, learning_rate)

    monkeypatch.setattr(Theta, "measure", ruin)
    edgezo.tune(lora_dir, tmp_path / "run", resume=True, steps=4, threads=1, reporter=Reporter(notice=notices.append))
    (told,) = (line for line in notices if "back to step" in line)
    assert told.endswith(
        f"{'a quarter of the learning rate' if lr is None else 'the learning rate that was measured'}, {(lr or SMALLER) * measured / (lr or 1.0):.3g}"
    )
    assert read_run(tmp_path / "run").journal.lr_scale == pytest.approx(SMALLER if lr is None else measured / lr)


def test_steps_after_going_back_are_watched_as_after_a_resume(
    lora_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rise that was the rows' alone keeps the run quiet; a loss that is not finite then takes steps back, and others come."""
    quiet, measure = list[int](), Theta.measure
    monkeypatch.setattr(tuner, "find_rise", lambda losses, rows: Rise(1.0, 1.0, 0) if len(losses) == 3 else None)
    go_back = Tuner._go_back

    def ruin(theta: Theta, batch: Any, step: int, learning_rate: float) -> Any:
        if step == 5 and not quiet:
            raise NonFiniteLossError("the loss is not finite")
        return measure(theta, batch, step, learning_rate)

    def going_back(loop: Tuner, step: int, why: str) -> None:
        quiet.append(loop.quiet_until)
        go_back(loop, 2, why)
        quiet.append(loop.quiet_until)
        raise KeyboardInterrupt

    monkeypatch.setattr(Theta, "measure", ruin)
    monkeypatch.setattr(Tuner, "_go_back", going_back)
    settings = {"data": reviews, "lr": 1e-6, "eps": 2**-8, "schedule": "constant", "threads": 1, **TASK}
    with pytest.raises(KeyboardInterrupt):
        edgezo.tune(lora_dir, tmp_path / "run", steps=8, **settings)
    assert quiet == [3 + LEVEL_STEPS, 0]
    assert read_run(tmp_path / "run").journal.quiet_step is None


@pytest.mark.parametrize("facts", [None, [], {}, {"lr": "1"}, {"lr": float("nan")}, {"lr": -1.0}, {"lr": True}])
def test_a_header_without_a_measured_rate_that_is_one(facts: Any) -> None:
    assert measured_lr({"calibration": facts}) is None
    assert measured_lr({"calibration": {"lr": 0.5}}) == 0.5


def test_a_run_that_was_stopped_after_an_undo_goes_on_with_its_rate(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    settings = {"data": reviews, "lr": 3.0, "eps": 2**-8, "schedule": "constant", "threads": 1, **TASK}
    edgezo.tune(lora_dir, tmp_path / "run", steps=12, **settings)
    scale = read_journal(tmp_path / "run" / "journal.bin").lr_scale
    assert scale < 1
    edgezo.tune(lora_dir, tmp_path / "run", resume=True, steps=14, threads=1)
    contents = read_journal(tmp_path / "run" / "journal.bin")
    assert contents.records[-1].learning_rate == pytest.approx(3.0 * contents.lr_scale)
    assert contents.lr_scale <= scale


@pytest.mark.parametrize("lr", [None, 1e-9])
def test_a_measured_rate_that_no_schedule_lowers_is_halved_where_nothing_gets_better(
    lora_dir: Path, reviews: str, tmp_path: Path, write_rows: Callable[..., str], lr: float | None
) -> None:
    """Validation rows with the other label: every step makes them worse."""
    rows = [json.loads(line) for line in Path(reviews).read_text().splitlines()]
    valid = write_rows([{**row, "label": 1 - row["label"]} for row in rows], "valid.jsonl")
    notices: list[str] = []
    settings = {"data": reviews, "valid": valid, "schedule": "constant", "eval_every": 1, "eps": 2**-8, "lr": lr, **TASK}
    edgezo.tune(lora_dir, tmp_path / "run", steps=5, threads=1, reporter=Reporter(notice=notices.append), **settings)
    contents = read_journal(tmp_path / "run" / "journal.bin")
    told = [line for line in notices if "half the learning rate" in line]
    if lr is not None:
        assert (told, contents.lr_scale) == ([], 1.0)
        return
    assert all(re.fullmatch(r"step \d: 2 evaluations without a new best; on with half the learning rate, [0-9.e-]+", line) for line in told)
    taken_back = [line for line in notices if "back to step" in line]
    assert contents.lr_scale == 0.5 ** len(told) * SMALLER ** len(taken_back)
    assert contents.undos == len(taken_back)
    assert len(told) >= 1


def test_rows_that_differ_are_not_a_divergence(exported_dir: Path, write_rows: Callable[..., str], tmp_path: Path) -> None:
    """A rate too small to change anything, on batches of like length of which some are much harder than others."""
    rows = [{"text": "a film", "label": 1}, {"text": "a film that is long and a plot", "label": 0}]
    edgezo.tune(exported_dir, tmp_path / "run", data=write_rows(rows * 16), steps=16, lr=1e-9, eps=1e-3, batch=4, threads=1, **TASK)
    contents = read_journal(tmp_path / "run" / "journal.bin")
    assert any(find_rise([record.loss for record in contents.records[:count]], 4) for count in range(1, 17))
    assert (contents.undos, len(contents.records)) == (0, 16)


@pytest.mark.parametrize("times", [1, MOST_UNDOS])
def test_a_loss_that_is_not_finite_is_taken_back_until_that_was_too_often(
    exported_dir: Path, reviews: str, tmp_path: Path, times: int
) -> None:
    model, done = EdgeModel(exported_dir, threads=1), list[int]()

    def damage(report: StepReport) -> None:
        if report.step == 3 and len(done) < times:
            done.append(3)
            model.weights["model.norm.weight"][0] = np.nan

    notices: list[str] = []
    config = make_config(None, {"data": reviews, "steps": 9, "lr": 1e-4, "eps": 1e-3, "batch": 4, **TASK})
    reporter = Reporter(step=damage, notice=notices.append)
    if times == 1:
        tune(model, config, tmp_path / "run", reporter=reporter)
        assert len(read_run(tmp_path / "run").records) == 9
    else:
        message = (
            r"^\S+run: diverged 8 times, the last time: step 3: the loss at theta \+ eps z is nan; .*; stopped at step \d, the last good one, "
            r"start a new run without --lr and --eps, or with a --lr below 1\.53e-09$"
        )
        with pytest.raises(DivergenceError, match=message):
            tune(model, config, tmp_path / "run", reporter=reporter)
        assert len(read_run(tmp_path / "run").records) < 3
    undone = [line for line in notices if "back to step" in line]
    assert len(undone) == (1 if times == 1 else MOST_UNDOS - 1)


def test_a_look_back_is_the_same_where_the_run_once_ended(
    lora_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation where an earlier call ended is none that the run makes by itself, however good."""
    places, look_back, loss_of = list[int](), Tuner._look_back, Tuner._loss_at

    def looking_back(loop: Tuner, rise: Rise) -> None:
        loop.evaluations[3] = loop.evaluations[3]._replace(accuracy=1.0, loss=0.0)
        look_back(loop, rise)

    def loss_at(loop: Tuner, step: int, rows: Any) -> float:
        places.append(step)
        return loss_of(loop, step, rows)

    settings = {"data": reviews, "valid": reviews, "lr": 1e-6, "eps": 2**-8, "eval_every": 2, "schedule": "constant", "threads": 1, **TASK}
    edgezo.tune(lora_dir, tmp_path / "run", steps=3, **settings)
    monkeypatch.setattr(tuner, "find_rise", lambda losses, rows: Rise(1.0, 1.0, 1) if len(losses) == 5 else None)
    monkeypatch.setattr(Tuner, "_look_back", looking_back)
    monkeypatch.setattr(Tuner, "_loss_at", loss_at)
    edgezo.tune(lora_dir, tmp_path / "run", resume=True, steps=6, threads=1)
    assert len(places) >= 2
    assert 3 not in places


def test_a_run_that_ended_at_a_step_that_outgrew_its_grid_goes_back_as_it_would_have(
    exported_dir: Path, reviews: str, tmp_path: Path
) -> None:
    """The record of a step is written before the weights change."""
    told: list[str] = []
    settings = {"data": reviews, "lr": 1e6, "eps": 1e-2, "schedule": "constant", "rule": "sgd", "batch": 4, "threads": 1, **TASK}
    with pytest.raises(DivergenceError):
        edgezo.tune(exported_dir, tmp_path / "whole", steps=6, reporter=Reporter(notice=told.append), **settings)
    assert any("is below the float32 resolution" in line for line in told)
    whole = (tmp_path / "whole" / JOURNAL).read_bytes()
    undone = [place for place, kind in records(whole) if kind == UNDO]
    assert len(undone) == MOST_UNDOS
    for number, place in enumerate(undone):
        cut = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", cut)
        (cut / JOURNAL).write_bytes(whole[:place])
        last, kind = len(read_run(cut).records), read_journal(cut / JOURNAL).last_kind
        told = []
        if number == 0:
            assert kind == STEP
            message = f"{cut}: ended within step {last}, which diverged; go on with --resume, which takes it back, or use --step {last - 1}"
            with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
                EdgeModel(exported_dir, run=cut, step="last", threads=1)
            with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
                check_run(cut, EdgeModel(exported_dir, threads=1), every=1)
        with pytest.raises(DivergenceError):
            edgezo.tune(exported_dir, cut, resume=True, threads=1, reporter=Reporter(notice=told.append))
        assert not any("nothing to tune" in line for line in told)
        assert (cut / JOURNAL).read_bytes() == whole


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Place and kind of every record of a journal with one direction a step."""
    place = len(MAGIC) + LENGTH.size + LENGTH.unpack_from(data, len(MAGIC))[0] + CHECKSUM.size
    while place < len(data):
        yield place, data[place : place + 1]
        place += record_bytes(data, place, 1)
