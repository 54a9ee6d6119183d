"""Lines of progress where standard error is no terminal."""

import re

import pytest

from edgezo import terminal
from edgezo.runtime.reports import StepReport


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
