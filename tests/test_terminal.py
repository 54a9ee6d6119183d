"""Lines of progress where standard error is no terminal."""

import os
import re
import signal

import pytest

from edgezo import terminal
from edgezo.runtime.predict import Prediction
from edgezo.runtime.reports import StepReport
from edgezo.runtime.signals import stop_signals


def test_time_left_is_that_of_steps_not_of_what_came_before_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A start of 100 seconds, then ten steps of four; once with minutes that end the run before them."""
    for minutes, expected in ((None, ["0:36", "0:32"]), (2.0, ["0:16", "0:12"])):
        with terminal.tuning() as reporter:
            reporter.begin(0, 10)
            for step in (1, 2):
                seconds = 100 + 4.0 * step
                progress = max(step / 10, (seconds - 100) / (60 * minutes - 100) if minutes else 0.0)
                reporter.step(StepReport(step, 1.0, (0.5,), 1e-3, 4.0, seconds, 100.0, progress, 32 * step))
        assert re.findall(r"(\d+:\d\d) left", capsys.readouterr().err) == expected


def test_seconds_of_a_step_are_a_mean_as_its_loss_is(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.tuning() as reporter:
        reporter.begin(0, 3)
        for step, (loss, step_seconds) in enumerate([(1.0, 9.0), (2.0, 1.0), (3.0, 2.0)], 1):
            reporter.step(StepReport(step, loss, (0.5,), 1e-3, step_seconds, 10.0 * step, 0.0, step / 3, 32 * step))
    expected = ["training loss 1.0000  9.00 s/step", "training loss 1.5000  5.00 s/step", "training loss 2.0000  4.00 s/step"]
    assert re.findall(r"training loss \S+  \S+ s/step", capsys.readouterr().err) == expected


def test_an_answer_alone_keeps_its_lines() -> None:
    answer = Prediction(text=" the first\n  and the second\n")
    assert terminal.prediction_text(answer, alone=True) == "the first\n  and the second"
    assert terminal.prediction_text(answer, alone=False) == "the first and the second"


def test_a_run_that_goes_back_goes_on_to_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A process that goes on at step 101, goes back to 90 after two steps of a second, and has minutes beside its steps."""
    with terminal.tuning() as reporter:
        reporter.begin(100, 200)
        for second, step in enumerate([101, 102, *range(91, 131)], 1):
            progress = max(step / 200, (100 + second) / 600)
            reporter.step(
                StepReport(step, 1.0 if step > 100 and second < 3 else 3.0, (0.5,), 1e-3, 1.0, 100.0 + second, 0.0, progress, 32 * step)
            )
    err = capsys.readouterr().err
    shown, losses = re.findall(r"step (\d+) .* (-?\d+:\d\d) left", err), re.findall(r"training loss (\S+)", err)[:2]
    assert shown[:3] == [("101", "1:39"), ("91", "1:49"), ("102", "1:38")]
    assert losses == ["1.0000", "3.0000"]  # of what was taken back nothing is left
    assert all(not left.startswith("-") for _, left in shown)


def test_a_clock_that_stands_still_is_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.tuning() as reporter:
        reporter.begin(0, None)
        reporter.step(StepReport(1, 1.0, (0.5,), 1e-3, 0.0, 0.0, 0.0, 0.0, 32))
    assert "left" not in capsys.readouterr().err  # and is not shown yet


def test_a_signal_is_heard_where_nobody_can_be_told() -> None:
    def broken() -> None:
        raise SystemExit(1)  # as rich does where the reader of a pipe is gone

    with stop_signals(broken) as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert stopping.is_set()


def test_a_path_is_told_as_it_is_typed() -> None:
    assert [terminal.typed(path) for path in ("run", "my run")] == (["run", '"my run"'] if os.name == "nt" else ["run", "'my run'"])


def test_values_that_differ_are_not_shown_as_the_same() -> None:
    assert terminal.changed_text("lr", 0.5, 0.25) == "0.5 -> 0.25"
    assert terminal.changed_text("lr", 0.0002529350, 0.0002529353) == "0.000252935 -> 0.0002529353"
    assert terminal.changed_text("template", "1", 1) == "'1' -> 1"
