"""Runs: learn, stop, go on, and are rebuilt from base and journal to the last bit."""

import hashlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgezo
from edgezo.config import make_config
from edgezo.errors import ConfigError, DataError, RunError
from edgezo.runtime.check import check_run
from edgezo.runtime.dataset import Dataset
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.order import WINDOW_BATCHES, DataOrder
from edgezo.runtime.run import journal_header, read_run
from edgezo.runtime.tune import Reporter, StepReport, tune

SETTINGS: dict[str, Any] = {
    "template": "{text} It was",
    "labels": "terrible,great",
    "batch": 4,
    "lr": 1e-4,
    "schedule": "constant",
    "eval_every": 5,
    "start": "none",
}


def digest(directory: Path, run: Path, step: Any = "last", threads: int = 1) -> str:
    """SHA-256 over the tuned weights of a step."""
    model = EdgeModel(directory, run=run, step=step, threads=threads)
    return hashlib.sha256(b"".join(array.tobytes() for array in model.weights.values())).hexdigest()


def test_tuning_lowers_the_loss(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    result = edgezo.tune(exported_dir, tmp_path / "run", data=reviews, valid=reviews, steps=60, **SETTINGS)
    assert result.before is not None
    assert result.best is not None
    assert result.best.loss < 0.7 * result.before.loss
    assert (result.steps, result.ended) == (60, "finished")


def test_the_edge_model_is_not_changed(edge_dir: Path, reviews: str, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in edge_dir.iterdir()}
    edgezo.tune(edge_dir, tmp_path / "run", data=reviews, steps=3, **SETTINGS)
    assert {path.name: path.read_bytes() for path in edge_dir.iterdir()} == before


@pytest.mark.parametrize(
    "extra", [{}, {"noise": "gaussian"}, {"weight_decay": 0.5}, {"seed": 2**64 - 1}, {"directions": 3, "rule": "normalized"}]
)
def test_a_stopped_and_resumed_run_is_the_run_that_never_stopped(
    exported_dir: Path, reviews: str, tmp_path: Path, extra: dict[str, Any]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    edgezo.tune(exported_dir, whole, data=reviews, steps=12, threads=1, **SETTINGS, **extra)
    edgezo.tune(exported_dir, parts, data=reviews, steps=5, threads=1, **SETTINGS, **extra)
    edgezo.tune(exported_dir, parts, resume=True, steps=9, threads=1)
    edgezo.tune(exported_dir, parts, resume=True, steps=12, threads=1)
    assert read_journal(whole / "journal.bin").records == read_journal(parts / "journal.bin").records
    assert digest(exported_dir, whole) == digest(exported_dir, parts)


def test_the_weights_in_memory_are_those_of_base_and_journal(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    model = EdgeModel(exported_dir, threads=2)
    tune(model, make_config(None, {"data": reviews, "valid": reviews, "steps": 11, **SETTINGS}), tmp_path / "run")
    live = hashlib.sha256(b"".join(array.tobytes() for array in model.weights.values())).hexdigest()
    assert digest(exported_dir, tmp_path / "run", threads=1) == live
    assert digest(exported_dir, tmp_path / "run", 10) != live


def test_a_step_of_several_directions_is_recorded_and_told_whole(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    reports: list[StepReport] = []
    edgezo.tune(
        exported_dir,
        tmp_path / "run",
        data=reviews,
        steps=3,
        directions=4,
        reporter=Reporter(step=reports.append),
        **{**SETTINGS, "batch": 2},
    )
    records = read_journal(tmp_path / "run" / "journal.bin").records
    assert [len(set(record.projected_grads)) for record in records] == [4, 4, 4]
    assert [(report.projected_grads, report.learning_rate) for report in reports] == [record[:2] for record in records]
    opening, *lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert opening.keys() == {"opening_seconds", "forward_rows", "seconds"}
    for line, report in zip(lines, reports, strict=True):
        assert line["projected_grad_rms"] == pytest.approx(np.sqrt(np.mean(np.square(report.projected_grads))))
        assert line.keys() == {"step", "loss", "projected_grad_rms", "lr", "forward_rows", "step_seconds", "seconds"}


def test_each_direction_has_rows_of_its_own(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--directions 17: more than the 16 rows of .*, each direction needs rows of its own"):
        edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=1, directions=17, **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_evaluating_on_the_way_changes_nothing(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    for name, extra in (("quiet", {}), ("often", {"valid": reviews, "eval_every": 1})):
        edgezo.tune(exported_dir, tmp_path / name, data=reviews, steps=6, threads=1, **{**SETTINGS, **extra})
    assert digest(exported_dir, tmp_path / "quiet") == digest(exported_dir, tmp_path / "often")


def test_step_zero_is_the_base_rounded_to_its_grid(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=2, **SETTINGS)
    base, start = EdgeModel(exported_dir), EdgeModel(exported_dir, run=tmp_path / "run", step=0)
    for name, array in base.weights.items():
        assert np.abs(array - start.weights[name]).max() < 1e-6


def test_the_best_state_is_the_one_with_the_best_validation(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    result = edgezo.tune(exported_dir, tmp_path / "run", data=reviews, valid=reviews, steps=20, **{**SETTINGS, "lr": 5e-2})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: (line["valid"]["accuracy"], -line["valid"]["loss"]) for line in lines if "valid" in line}
    assert sorted(scores) == [0, 5, 10, 15, 20]
    assert scores[result.best_step] == max(scores.values())
    assert read_run(tmp_path / "run").best_step == result.best_step
    assert EdgeModel(exported_dir, run=tmp_path / "run").step == result.best_step
    found = edgezo.evaluate(exported_dir, reviews, run=tmp_path / "run").evaluation
    assert found.loss == pytest.approx(-scores[result.best_step][1], rel=1e-5)


def test_an_evaluation_that_was_lost_is_made_when_the_run_goes_on(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    whole = edgezo.tune(exported_dir, tmp_path / "run", data=reviews, valid=reviews, steps=10, **SETTINGS)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    assert "valid" in lines[-1]
    path.write_text("\n".join(lines[:-1]) + "\n")  # as if killed before the last evaluation
    again = edgezo.tune(exported_dir, tmp_path / "run", resume=True)
    assert (again.best_step, again.best) == (whole.best_step, whole.best)


def test_a_tuned_model_is_not_tuned_again(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    model = EdgeModel(exported_dir)
    config = make_config(None, {"data": reviews, "steps": 1, **SETTINGS})
    tune(model, config, tmp_path / "run")
    for tuned in (model, EdgeModel(exported_dir, run=tmp_path / "run")):
        with pytest.raises(RunError, match="the model given is tuned already"):
            tune(tuned, config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_minutes_end_a_run(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    """The first step is at the beginning of the schedule, whatever came before it; only a busy machine makes none in six seconds."""
    result = edgezo.tune(exported_dir, tmp_path / "run", data=reviews, minutes=0.1, **{**SETTINGS, "schedule": "linear"})
    run = read_run(tmp_path / "run")
    assert (result.ended, result.steps) == ("out of time", len(run.records))
    assert result.seconds >= 6
    if run.records:
        rates = [record.learning_rate / run.config.lr for record in run.records]
        assert rates[0] > 0.99
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] < 0.5 or len(rates) < 10


def test_minutes_count_what_comes_before_the_first_step(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    notices: list[str] = []
    begun, run = time.monotonic(), tmp_path / "run"
    result = edgezo.tune(exported_dir, run, data=reviews, minutes=1e-6, **SETTINGS, reporter=Reporter(notice=notices.append))
    assert (result.ended, result.steps) == ("out of time", 0)
    assert 0 < result.seconds < time.monotonic() - begun
    assert re.fullmatch(r"no step: --minutes 1e-06 in all were over before the first, \d+ s are spent; give more --minutes", notices[-1])
    opening = read_run(run).opening_seconds
    assert 0 < opening == read_run(run).seconds <= round(result.seconds, 3)  # as the run directory has it
    more = edgezo.tune(exported_dir, run, resume=True, minutes=10.0, steps=1)
    assert (more.ended, more.steps) == ("finished", 1)
    assert more.seconds > read_run(run).opening_seconds > opening
    edgezo.tune(exported_dir, run, resume=True, minutes=1e-6, reporter=Reporter(notice=notices.append))
    assert notices[-1] == "nothing to tune: --steps 1, and as many are done; give more --steps and --minutes"


def test_a_run_that_goes_on_says_at_what_rate(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {**SETTINGS, "data": reviews, "valid": reviews, "lr": 1e-4, "eps": 0.01, "schedule": "linear", "eval_every": 2}
    edgezo.tune(exported_dir, tmp_path / "run", steps=3, **given)
    notices: list[str] = []
    edgezo.tune(exported_dir, tmp_path / "run", resume=True, steps=6, reporter=Reporter(notice=notices.append))
    run = read_run(tmp_path / "run")
    assert run.records[3].learning_rate == pytest.approx(1e-4 * 3 / 6)
    best = max((number for number in run.evaluations if number <= 3), key=lambda number: (run.evaluations[number].score(), -number))
    assert notices == [f"going on after step 3 of 6 (3 before), the next with lr 5e-05; best so far: step {best}"]


def test_a_run_of_minutes_that_goes_on_by_steps_had_no_other_number_of_them(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    def stop(report: StepReport) -> None:
        signal.raise_signal(signal.SIGINT)

    given: dict[str, Any] = {**SETTINGS, "data": reviews, "lr": 1e-4, "eps": 0.01, "schedule": "constant"}
    edgezo.tune(exported_dir, tmp_path / "run", minutes=60, reporter=Reporter(step=stop), **given)
    notices: list[str] = []
    edgezo.tune(exported_dir, tmp_path / "run", resume=True, steps=2, reporter=Reporter(notice=notices.append))
    assert notices == ["going on after step 1 of 2, the next with lr 0.0001"]


def test_a_run_without_steps_and_without_an_exact_start_says_that_nothing_is_tuned(
    exported_dir: Path, reviews: str, tmp_path: Path
) -> None:
    notices: list[str] = []
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=0, **SETTINGS, reporter=Reporter(notice=notices.append))
    assert notices[0] == "--steps 0 without an exact start: nothing is tuned, the run holds what it started from; give --steps N"


def test_a_signal_finishes_the_step_and_the_run_goes_on_later(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    def stop(report: StepReport) -> None:
        if report.step == 4:
            signal.raise_signal(signal.SIGTERM)

    result = edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=9, threads=1, reporter=Reporter(step=stop), **SETTINGS)
    assert (result.ended, result.steps) == ("interrupted", 4)
    edgezo.tune(exported_dir, tmp_path / "run", resume=True, threads=1)
    edgezo.tune(exported_dir, tmp_path / "whole", data=reviews, steps=9, threads=1, **SETTINGS)
    assert digest(exported_dir, tmp_path / "run") == digest(exported_dir, tmp_path / "whole")


def test_a_run_can_be_made_outside_the_main_thread(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    thread = threading.Thread(target=lambda: edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=2, **SETTINGS))
    thread.start()
    thread.join()
    assert len(read_run(tmp_path / "run").records) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 1e-5}, r"--lr 1e-05 differs from the run's 0.0001; a resumed run keeps it"),
        ({"seed": 3}, r"--seed 3 differs from the run's 0"),
        ({"noise": "gaussian"}, r"--noise 'gaussian' differs"),
        ({"batch": 8}, r"--batch 8 differs"),
        ({"directions": 2}, r"--directions 2 differs"),
        ({"rule": "normalized"}, r"--rule 'normalized' differs"),
    ],
)
def test_what_must_not_change_is_refused_by_name(
    exported_dir: Path, reviews: str, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=2, **SETTINGS)
    with pytest.raises(RunError, match=message):
        edgezo.tune(exported_dir, tmp_path / "run", resume=True, steps=4, **changed)
    assert len(read_run(tmp_path / "run").records) == 2


def test_other_data_is_refused_on_resume(exported_dir: Path, reviews: str, tmp_path: Path, write_rows: Callable[..., str]) -> None:
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=2, **SETTINGS)
    write_rows([{"text": "something else", "label": 1}])
    with pytest.raises(RunError, match="is not the data the run was started with"):
        edgezo.tune(exported_dir, tmp_path / "run", resume=True, steps=4)


def test_resume_takes_no_configuration_file(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=1, **SETTINGS)
    with pytest.raises(ConfigError, match="--resume continues with the run's own settings"):
        edgezo.tune(exported_dir, tmp_path / "run", resume=True, config=tmp_path / "run" / "config.json")


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_every_epoch_holds_every_row_once(batch_size: int) -> None:
    rows = 2 * batch_size * WINDOW_BATCHES
    order = DataOrder([row % 5 for row in range(rows)], batch_size, seed=1)
    steps = rows // batch_size
    for epoch in range(2):
        seen = [row for step in range(epoch * steps, (epoch + 1) * steps) for row in order.batch(step)]
        assert sorted(seen) == list(range(rows))


def test_rows_of_like_length_meet() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(4, 100, 640)
    order = DataOrder(lengths.tolist(), 16, seed=0)
    padded = [16 * max(lengths[row] for row in order.batch(step)) for step in range(40)]
    assert sum(padded) < 1.25 * lengths.sum()


@pytest.mark.parametrize(("rows", "batch_size"), [(3, 64), (24, 16), (24, 64), (96, 64), (100, 64), (400, 64), (400, 16)])
def test_a_step_sees_few_rows_twice(rows: int, batch_size: int) -> None:
    lengths = np.random.default_rng(0).integers(8, 100, rows)
    order = DataOrder(lengths.tolist(), batch_size, seed=0)
    different = [len(set(order.batch(step))) for step in range(8 * WINDOW_BATCHES)]
    assert min(different) > 0.6 * min(rows, batch_size)
    assert np.mean(different) > 0.95 * min(rows, batch_size)


def test_a_run_goes_on_in_the_order_it_began_with(
    exported_dir: Path, reviews: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen rows, and so two orders; a header without one is of version 1."""

    def begin(name: str, steps: int) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(
                "edgezo.runtime.tune.journal_header",
                lambda *given: {name: value for name, value in journal_header(*given).items() if name != "order"},
            )
            patch.setattr(Dataset.order, "__defaults__", (1,))
            edgezo.tune(exported_dir, tmp_path / name, data=reviews, steps=steps, threads=1, **SETTINGS)
        return tmp_path / name

    whole, cut = begin("whole", 12), begin("cut", 6)
    edgezo.tune(exported_dir, cut, resume=True, steps=12, threads=1)
    losses = [[record.loss for record in read_run(path).records] for path in (whole, cut)]
    assert losses[0] == losses[1]
    edgezo.tune(exported_dir, tmp_path / "new", data=reviews, steps=12, threads=1, **SETTINGS)
    assert [record.loss for record in read_run(tmp_path / "new").records] != losses[0]
    assert not check_run(whole, EdgeModel(exported_dir, threads=1), every=4).problems


def test_order_depends_on_the_seed_and_not_on_the_past() -> None:
    lengths = list(range(50))
    assert DataOrder(lengths, 4, 0).batch(33) == DataOrder(lengths, 4, 0).batch(33)
    assert DataOrder(lengths, 4, 0).batch(33) != DataOrder(lengths, 4, 1).batch(33)
