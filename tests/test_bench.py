"""The benches read what runs write: a line more in a run's metrics broke two of them once."""

from pathlib import Path

import pytest
from command_line import TASK

from edgezo.runtime.run import read_summary
from examples.bench.convergence import rows_by_step
from examples.bench.start import seconds_to_first_step


def test_rows_of_forward_by_step(run: str) -> None:
    found = rows_by_step(Path(run))
    rows = [found[step] for step in (0, 1, 2, 3, 4)]
    assert rows == sorted(rows)
    assert rows[4] == read_summary(Path(run))["forward_rows"]


@pytest.mark.usefixtures("command")
def test_seconds_to_the_first_step() -> None:
    assert 0 < seconds_to_first_step(Path("edge"), TASK) < 600
