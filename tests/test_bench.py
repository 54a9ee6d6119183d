"""What benches read of a run's metrics, whose first line has no step."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
from command_line import TASK

from edgezo.runtime.run import read_summary
from examples.bench.convergence import rows_by_step
from examples.bench.start import seconds_to_first_step


def test_rows_of_forward_by_step(run: str) -> None:
    found = rows_by_step(Path(run))
    assert list(found) == [0, 1, 2, 3, 4]
    assert all(one < two for one, two in pairwise(found.values()))
    assert found[4] == read_summary(Path(run))["forward_rows"]


@pytest.mark.usefixtures("command")
def test_seconds_to_the_first_step() -> None:
    begun = time.monotonic()
    assert 0 < seconds_to_first_step(Path("edge"), TASK) < time.monotonic() - begun
